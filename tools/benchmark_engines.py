"""Gated frames against the fastest dense network there is: engines and precisions in one process.

    python tools/benchmark.py engine=[torch,openvino] precision=[float32,bfloat16] threads=1 clip=my.mp4
    python tools/benchmark.py engine=[torch,compile,openvino,onnxruntime] onnx=yolox_nano.onnx only=shipped

    python tools/benchmark.py engine=[openvino] precision=[bfloat16,int8] only=shipped clip=my.mp4   # int8: needs nncf
    python tools/benchmark.py recogniser=vivit_b_epic k=50 engine=[torch,openvino] threads=1   # steps of a recogniser

Every engine runs the whole detector, dense and gated; those of a precision take turns frame by frame. Ratios are those
of one frame, against the dense network with the least median in the same precision, whatever its engine. `torch rows
float32` is the default rule in eager PyTorch; it stands beside every precision, and has ratios of its own. With hold=2
the methods of the default policy are streams, from frame to boxes, with a key frame each and with every second frame's
boxes moved; a call is of two frames. Otherwise resizing is not timed, either.
Decoding and drawing are not timed; boxes and non-maximum suppression are.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import actions
import torch
from benchmark_cases import Arithmetic, Case, EngineName, Options, cases_of
from benchmark_methods import build_detector, make_frames, selector_of
from common import say, show_table, write_results
from torch import Tensor

from eventful_det.benchmark.timing import Timed, paired_ratios, time_together
from eventful_det.data.video.transforms import Image
from eventful_det.detectors.protocol import AnyRule, VideoDetector
from eventful_det.engine.backends import (
    Backend,
    Format,
    ONNXRuntime,
    OpenVINO,
    Torch,
    import_package,
    quickest_precision,
)
from eventful_det.engine.export import Network, export_engine, graphs_of, in_engine
from eventful_det.errors import UserError
from eventful_det.evaluation.efficiency import Spread
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.outputs import markdown_table, write_json, write_text
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.runtime.stream import Stream

NOTE = (
    "Time of the whole network on one frame, in ms. against: the median of the ratios, frame by frame, to the fastest "
    "dense network of the same precision, with their 5th and 95th percentiles; above 1 = faster. MACs: share of those "
    "of the dense network. p95/p50: how even frames are. state: remembered between frames. against rows: the same "
    "ratio to the default rule in eager PyTorch in float32."
)
ROWS = "torch rows float32"
_KNOWN: dict[EngineName, tuple[Arithmetic, ...]] = {
    "torch": ("float32", "bfloat16"),
    "compile": ("float32", "bfloat16"),
    "openvino": ("float32", "bfloat16", "int8"),
    "onnxruntime": ("float32",),
}
_BEFORE = 2  # calls before those that take turns
Step = Callable[[Tensor], tuple[float, int]]  # a frame to 1e9 multiply-adds and bytes of state


def step_of(network: VideoDetector[Any] | Recogniser, rule: AnyRule, k: int) -> Step:
    """A stream of a network."""
    state: Any = network.init_state()

    def run(frame: Tensor) -> tuple[float, int]:
        (step,) = network.step([frame], state, rule=rule, selector=selector_of(k))
        return step.cost.total / 1e9, state.nbytes

    return run


def parts_of(network: VideoDetector[Any], rule: AnyRule, k: int, frames: Sequence[Tensor]) -> dict[str, float]:
    """The median milliseconds of each part of a network; the gate is in the first."""
    state = network.init_state()
    seconds = [
        network.step([frame], state, rule=rule, selector=selector_of(k), timing=True)[0].cost.seconds
        for frame in frames
    ][_BEFORE:]
    return {part: 1e3 * Spread.of([one[part] for one in seconds]).median for part in seconds[0]}


def engines(
    network: Network,
    size: tuple[int, int],
    buckets: tuple[float | int, ...],
    config: Options,
    precision: Arithmetic,
    images: Sequence[Image],
    folder: Path,
) -> dict[EngineName, Any]:
    """The network, now a `CompiledDetector` or `CompiledRecogniser`, in every engine that knows the precision.

    Images are what int8 is calibrated on.
    """
    made: dict[EngineName, Any] = {}
    for engine in config.engine or ():
        if precision not in _KNOWN[engine]:
            continue
        backend: Backend
        if precision != "int8" and engine in ("torch", "compile"):
            backend = Torch(graphs_of(network, size), precision, compiled=engine == "compile")
        else:
            format: Format = "openvino" if engine == "openvino" else "onnx"
            path = folder / ("int8" if precision == "int8" else format)
            if not path.exists():
                calibrate = images if precision == "int8" else None
                export_engine(network, path, format=format, size=size, buckets=buckets, calibrate=calibrate)
            kind = OpenVINO if engine == "openvino" else ONNXRuntime
            rest = quickest_precision() if precision == "int8" else precision  # of what is not in int8
            backend = kind(path, rest, torch.get_num_threads())
        made[engine] = in_engine(network, size, buckets, backend)
        made[engine].warm_up()
    return made


def stream_of(detector: VideoDetector[Any], rule: AnyRule, images: Sequence[Image], hold: int, each: int) -> Step:
    """A stream of a detector, `each` frames at a call, of which every `hold`-th is a key frame."""
    stream = Stream(detector, images, rule=rule, hold=hold, scene_cuts=False)

    def run(_: Tensor) -> tuple[float, int]:
        costs = [next(stream).cost.total for _ in range(each)]
        return sum(costs) / each / 1e9, stream.state_bytes

    return run


def cnn_steps(path: Path, config: Options, precision: Arithmetic) -> dict[str, Step]:
    """A network of the user's in ONNX, on inputs of its own size, without what follows it."""
    engines: dict[EngineName, type[OpenVINO] | type[ONNXRuntime]] = {"onnxruntime": ONNXRuntime, "openvino": OpenVINO}
    providers = ["CPUExecutionProvider"]
    (entry,) = import_package("onnxruntime").InferenceSession(str(path), providers=providers).get_inputs()
    if not all(isinstance(side, int) for side in entry.shape):
        raise UserError(f"onnx={path} has an input of shape {entry.shape}; give a network of a fixed size")
    image = torch.rand(*entry.shape, generator=torch.Generator().manual_seed(config.seed))
    steps: dict[str, Step] = {}
    for engine, kind in engines.items():
        if engine in (config.engine or ()) and precision in _KNOWN[engine] and precision != "int8":
            backend = kind(path.parent, precision, torch.get_num_threads())
            backend.suffix = path.suffix
            steps[f"{path.stem} {engine}"] = partial(_run_cnn, backend, path.stem, image)
    return steps


def _run_cnn(backend: Backend, name: str, image: Tensor, _: Tensor) -> tuple[float, int]:
    backend.run(name, image)
    return 0.0, 0


def run_case(case: Case, config: Options, folder: Path) -> dict[str, Any]:
    """A case's entry in `results.json`."""
    detector = build_detector(case, config.classes, config.seed)
    detector.requires_grad_(False)
    patch = detector.spec.patch
    tokens = case.size[0] * case.size[1] // patch**2
    k = case.budget(tokens)
    count = config.warm_up + config.repetitions
    hold = 1 if k else config.hold
    frames = make_frames(case, patch, k, hold * (count + (hold > 1) * _BEFORE), config.clip, config.seed)
    needed = frames if hold > 1 or "int8" in config.precision else ()
    images = [frame.mul(255).round().byte().permute(1, 2, 0).numpy() for frame in needed]
    rows: list[dict[str, Any]] = []
    for precision in config.precision:  # one after the other: engines of all of them would need too much memory
        steps: dict[str, Step] = {}
        made = engines(detector, case.size, case.buckets, config, precision, images, folder)
        for engine, compiled in made.items():
            for name, rule in ("dense", Dense()), ("gated", compiled.rule):
                if hold > 1:
                    steps[f"{engine} {name}"] = stream_of(compiled, rule, images, 1, hold)
                    steps[f"{engine} {name}, hold {hold}"] = stream_of(compiled, rule, images, hold, hold)
                else:
                    steps[f"{engine} {name}"] = step_of(compiled, rule, k)
        if hold == 1 and "torch" in (config.engine or ()):
            steps[ROWS] = step_of(detector, Rows(), k)
        if config.onnx is not None:
            steps |= cnn_steps(Path(config.onnx), config, precision)
        rows += take_turns(steps, frames, config, precision, hold)
        for row in rows if config.profile and hold == 1 else ():
            engine, _, name = row["method"].partition(" ")
            if row["precision"] == precision and engine in made and name in ("dense", "gated"):
                row["parts_ms"] = parts_of(made[engine], Dense() if name == "dense" else made[engine].rule, k, frames)
    name = case.name if hold == 1 else f"{case.name}, streams, {hold} frames at a time"
    return {"name": name, "model": case.model, "size": case.size, "k": k, "tokens": tokens, "rows": rows}


def run_recogniser(name: str, config: Options, folder: Path) -> dict[str, Any]:
    """The entry of a recogniser's step, random weights, in `results.json`: dense, rows and paper."""
    torch.manual_seed(config.seed)
    recogniser = Recogniser(actions.config_of(name)).eval().requires_grad_(False)
    model = recogniser.config
    tokens = model.grid[0] * model.grid[1] + 1
    k = config.k or tokens // 8
    still = torch.rand(model.tubelet[0], model.channels, *model.size)
    tubelets = [torch.where(torch.rand(model.size) < 0.5, still, torch.rand_like(still)) for _ in range(8)]
    frames = [tubelets[i % len(tubelets)] for i in range(config.warm_up + config.repetitions)]
    compiled = dataclasses.replace(config, engine=tuple(one for one in config.engine or () if one != "torch"))
    rows: list[dict[str, Any]] = []
    for precision in config.precision:  # weights are held in it, so that none is converted at a step
        own = recogniser if precision == "float32" else copy.deepcopy(recogniser).to(getattr(torch, precision))
        rules: dict[str, AnyRule] = {"dense": Dense(), "rows": Rows(), "paper": Paper()}
        steps: dict[str, Step] = {}
        for rule in rules if config.engine is None or "torch" in config.engine else ():
            steps[f"torch {rule}"] = step_of(own, rules[rule], k - (rule == "rows"))  # and the class token
        for engine, other in engines(recogniser, model.size, (k - 1,), compiled, precision, (), folder).items():
            steps[f"{engine} dense"] = step_of(other, Dense(), k)
            steps[f"{engine} rows"] = step_of(other, Rows(), k - 1)
        rows += take_turns(steps, frames, config, precision)
    return {"name": f"{name} step, k={k}", "model": name, "size": model.size, "k": k, "tokens": tokens, "rows": rows}


def take_turns(
    steps: dict[str, Step], frames: Sequence[Tensor], config: Options, precision: Arithmetic, each: int = 1
) -> list[dict[str, Any]]:
    """Time methods of a precision on the same frames, `each` of them at a call, and compare them."""
    for step in steps.values():  # whatever is not compiled yet, is compiled now
        for frame in frames[:_BEFORE]:
            step(frame)
    calls = {name: partial(_step, step, frames) for name, step in steps.items()}
    return compare(time_together(calls, config.repetitions, config.warm_up, seed=config.seed), precision, each)


def _step(step: Step, frames: Sequence[Tensor], i: int) -> tuple[float, int]:
    return step(frames[i])


def compare(own: dict[str, Timed[tuple[float, int]]], precision: Arithmetic, each: int = 1) -> list[dict[str, Any]]:
    """The methods of a precision against the fastest dense one of them; a call is of `each` frames."""
    seconds = {name: [call.seconds / each for call in calls.calls] for name, calls in own.items()}
    dense = {name: Spread.of(seconds[name]).median for name in own if name.endswith("dense")}
    fastest = min(dense, key=lambda name: dense[name])
    rows = []
    for name, calls in own.items():
        time, ratio = Spread.of(seconds[name]), paired_ratios(seconds[fastest], seconds[name])
        to_rows = paired_ratios(seconds[ROWS], seconds[name]).median if ROWS in own else None
        gmacs = sum(call.result[0] for call in calls.calls) / len(calls.calls)
        whole = sum(call.result[0] for call in own[fastest].calls) / len(own[fastest].calls)
        rows.append(
            {
                "precision": precision,
                "method": name,
                "against": fastest,
                "gmacs": gmacs or None,
                "macs_share": gmacs / whole if gmacs else None,
                "ms_p50": 1e3 * time.median,
                "ms_p95": 1e3 * time.p95,
                "p95_over_p50": time.p95 / time.median,
                "faster": ratio.median,
                "faster_p5": ratio.p5,
                "faster_p95": ratio.p95,
                "time_share": 1 / ratio.median,
                "faster_than_rows": to_rows,
                "state_bytes": calls.calls[-1].result[1],
            }
        )
    return rows


def lines_of(case: dict[str, Any]) -> list[list[str]]:
    """A case as text; the first line holds the titles."""
    titles = ["precision", "method", "GMACs", "MACs %", "p50 ms", "p95/p50", "against (p5-p95)", "time %"]
    lines = [[*titles, "against rows", "state MB"]]
    for row in case["rows"]:
        known = row["gmacs"] is not None
        lines.append(
            [
                row["precision"],
                f"{row['method']} *" if row["method"] == row["against"] else row["method"],
                f"{row['gmacs']:.2f}" if known else "-",
                f"{100 * row['macs_share']:.0f}" if known else "-",
                f"{row['ms_p50']:.1f}",
                f"{row['p95_over_p50']:.2f}",
                f"{row['faster']:.2f} ({row['faster_p5']:.2f}-{row['faster_p95']:.2f})",
                f"{100 * row['time_share']:.1f}",
                "-" if row["faster_than_rows"] is None else f"{row['faster_than_rows']:.2f}",
                f"{row['state_bytes'] / 1e6:.1f}",
            ]
        )
    return lines


def markdown(about: dict[str, Any], cases: Sequence[dict[str, Any]]) -> str:
    """All cases as Markdown."""
    text = (
        f"`{about['command']}`\n\n{about['machine']}; {about['repetitions']} repetitions. {NOTE} * the fastest dense.\n"
    )
    for case in cases:
        text += f"\n## {case['name']}\n\n" + markdown_table(lines_of(case), left=2)
        for row in case["rows"]:
            if "parts_ms" in row:
                parts = ", ".join(f"{part} {ms:.1f}" for part, ms in row["parts_ms"].items())
                text += f"\n{row['precision']}, {row['method']}, median ms of its parts: {parts}\n"
    return text


def bench_engines(config: Options, about: dict[str, Any]) -> None:
    """Run the cases of whole detectors, print a table of each and write the results."""
    if config.device not in ("auto", "cpu"):
        raise UserError(f"engine={list(config.engine or ())} runs on CPUs; leave device={config.device} out")
    for precision in config.precision:
        if not any(precision in _KNOWN[engine] for engine in config.engine or ("torch",)):
            raise UserError(f"precision={precision}: none of these engines computes in it; leave it out")
    if config.recogniser is not None and "int8" in config.precision:
        raise UserError("precision=int8 is for detectors; leave it out for a recogniser")
    skipped: list[str] = []
    if config.recogniser is not None:
        runs = [partial(run_recogniser, config.recogniser, config)]
    else:
        cases, skipped = cases_of(config)
        runs = [partial(run_case, case, config) for case in cases if case.what == "detector"]
    if not runs:
        raise UserError(f"no case of a whole detector is left; see only={config.only}")
    for name in skipped:
        say(f"left out, because it needs clip=...: {name}")
    about = about | {"machine": f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"}
    results: list[dict[str, Any]] = []
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(Path(folder)))
        whole = about | {"note": NOTE, "left_out": skipped, "cases": results}
        write_results(Path(config.output), whole)  # a run may be cut short
        write_text(Path(config.output) / "benchmark.md", markdown(about, results))
        if config.save is not None:
            write_json(Path(config.save), whole)
            write_text(Path(config.save).with_suffix(".md"), markdown(about, results))
        show(results[-1])


def show(case: dict[str, Any]) -> None:
    """Print a case, as much of it as fits on a terminal."""
    show_table(([line[1], line[0], *line[3:8]] for line in lines_of(case)), case["name"], left=2)


def _cpu() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
