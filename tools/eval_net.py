"""Evaluate a detector on video: average precision, multiply-adds, time. Or a recogniser on clips: accuracy.

    python tools/eval_net.py                                     # the shipped weights on the synthetic data set
    python tools/eval_net.py gate=dense weights=runs/train/model.safetensors
    python tools/eval_net.py eval=sweep                          # budgets and baselines: CSV, table, plot
    python tools/eval_net.py eval=sweep max_videos=2 max_frames=20
    python tools/eval_net.py eval=sweep data=clips               # your own, labelled or not: agreement with dense
    python tools/eval_net.py eval=latency data=clips             # what is known when frames arrive, 10 and 30 a second
    python tools/eval_net.py experiment=sweep_vid weights=...    # ImageNet VID: everything a paper's table needs
    python tools/eval_net.py data=actions eval=sweep             # action recognition

The same command goes on where a killed run was, and does not run finished videos again. `streams=8` runs eight videos
side by side; `torchrun --nproc_per_node=N` shares the videos out between processes. Neither changes a result.

Frames that cannot be read are skipped, counted and named; they are in no number.

Writes results.json to `output`; beside it coco_results.json (detections of a single evaluation), or sweep.csv,
sweep.json, sweep.md, sweep.png and sweep.pdf; or latency_aware.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import actions
import eval_actions
import torch
import torch.distributed as dist
from command_line import options_of, refuse
from common import (
    AnyDetector,
    Data,
    as_list,
    build_gate,
    choose_device,
    command,
    console,
    progress_bar,
    say,
    show_table,
    warn,
    write_results,
)
from eval_methods import EvalOptions, chosen, sweep_methods
from rich.progress import track

from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.labelling.remap import for_classes
from eventful_det.data.streams import share_out
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.weight_files import DEFAULT, find_weights
from eventful_det.detectors.hub import local_source
from eventful_det.detectors.rf_detr.loading import is_rf_detr
from eventful_det.engine.backends import Precision
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import ENOUGH, labelled_frames
from eventful_det.evaluation.flushes import ap50_since_flush
from eventful_det.evaluation.latency_aware import Look, detector_look, latency_aware, markdown
from eventful_det.evaluation.small_cnn import SmallCNN
from eventful_det.evaluation.sweep import collect, complete, first, report, run_methods
from eventful_det.evaluation.sweep.runs import Method, MethodRun
from eventful_det.evaluation.sweep.store import ResultStore, code_hash, file_hash
from eventful_det.evaluation.sweep.summary import Row, row_of
from eventful_det.files import written_whole
from eventful_det.options import Count, Natural
from eventful_det.outputs import owned, write_json, write_text
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.runtime.motion.key_frames import parse_hold

READERS = 4  # threads that read frames ahead for a GPU; on a CPU they would take time from what is measured
REASONS = 20  # of skipped frames that results.json quotes
PATIENCE = timedelta(days=30)  # of a process that is done, with those that are not
TERMINAL = ("method", "AP50", "agree", "GMACs backbone", "GMACs total", "time %")  # sweep.md has all columns
NOTE = (
    "Precisions lie in [0, 1]. GMACs are 1e9 multiply-adds per frame. Times come from this one run on this machine, "
    "in which the methods took turns video by video; relative_time is the median over videos of the ratio to dense. "
    "Latency runs from when the frames of a step are at hand, decoded and resized, until all its detections are there; "
    "with several streams, that is the latency of the step they share, and fps counts the frames of all of them."
)


@dataclass(frozen=True)
class Options:
    """What may be asked of the evaluation; configs/eval_net.yaml explains it."""

    task: actions.Task | None
    data: Data
    gate: dict[str, Any]
    eval: EvalOptions
    weights: str | None
    precision: Precision | Literal["auto"]
    labels: str | None
    common_classes: bool
    rescore: bool
    output: str
    device: str
    max_videos: Count | None
    max_frames: Count | None
    scene_cuts: bool
    streams: Count
    workers: Natural | None
    views: Literal["shared", "separate", "both"]
    temporal_views: Count | None


def evaluate_single(config: Options, detector: AnyDetector, data: CocoVideo, directory: Path) -> dict[str, Any]:
    """Evaluate the rule of the gate group."""
    labelled_frames(data)
    gate, options = build_gate(config.gate), config.eval
    ways: dict[str, Any] = {"hold": parse_hold(options.hold), "scale": options.scale, "square": options.square}
    method = Method(str(config.gate["rule"]), None, gate.rule, gate.selector, **ways)
    run = gather(config, complete_all(config, detector, data, [method]), method, data)
    scores = run.scores()
    row = row_of(run)
    write_json(directory / "coco_results.json", run.results, indent=None)
    show_table([list(line) for line in zip(*report.table([row]), strict=True) if line[1] != "-"])
    lines = [[n, report.percent(ap, 1), str(scores.objects_by_class[n])] for n, ap in scores.ap50_by_class.items()]
    show_table([["class", "AP50", "objects"], *lines])
    common = scores.ap50_of_common(ENOUGH)
    say(f"AP50 {report.percent(common, 1)} over the classes with {ENOUGH} or more objects")
    return {
        "rows": [row],
        "ap50_by_class": scores.ap50_by_class,
        "objects_by_class": scores.objects_by_class,
        f"ap50_of_classes_with_{ENOUGH}_objects": common,
        "ap50_since_flush": ap50_since_flush(run.data, run.results, run.ages()),
        "efficiency": run.efficiency,
        "videos": _by_video(run),
        "skipped": _skipped(run.skipped),
    }


def evaluate_sweep(config: Options, detector: AnyDetector, data: CocoVideo, directory: Path) -> dict[str, Any]:
    """Evaluate all curves in one run."""
    import_module("matplotlib")  # rather missed now than when all is done
    methods = sweep_methods(config.eval.curves or {})
    if config.eval.only is not None:
        only = as_list(config.eval.only)
        complete_all(config, detector, data, chosen(methods, only))
        say(f"{', '.join(only)}: kept in {directory}; the command without eval.only makes the table")
        return {}
    cnn = None if config.eval.small_cnn is None else small_cnn(config.eval.small_cnn, detector)
    store = complete_all(config, detector, data, methods)
    dense = next((method for method in methods if method.is_dense), None)
    reference = None if dense is None else gather(config, store, dense, data)
    rows: list[Row] = []
    skipped: dict[int, str] = {}
    for method in track(methods, "scoring", console=console, transient=True):  # one by one, for the memory's sake
        run = reference if method is dense and reference else gather(config, store, method, data)
        rows.append(row_of(run, reference))
        skipped |= run.skipped
    if cnn is not None:
        network, name = cnn
        holds = [Method(name, hold, hold=hold) for hold in (1, 2, 4, 8)]
        done = run_methods(network, run.data, holds, scene_cuts=config.scene_cuts)
        rows += [row_of(one, reference) for one in done]
    with written_whole(directory / "sweep.csv") as part:
        report.write_csv(rows, part)
    write_json(directory / "sweep.json", rows)
    write_text(directory / "sweep.md", report.markdown(rows))
    title = f"Average precision against cost (videos: {rows[0].videos}, frames: {rows[0].frames})"
    for suffix in ("png", "pdf"):
        with written_whole(directory / f"sweep.{suffix}") as part:
            report.plot(rows, part, title)
    header, *lines = report.table(rows)
    show_table([list(TERMINAL), *([line[header.index(name)] for name in TERMINAL] for line in lines)])
    say(f"plot: {directory / 'sweep.png'}")
    return {"rows": rows, "skipped": _skipped(skipped)}


def evaluate_latency(config: Options, detector: AnyDetector, data: CocoVideo, directory: Path) -> dict[str, Any]:
    """Latency-aware precision of every curve that recomputes every frame, boxes standing still and moved."""
    labelled_frames(data)
    looks: dict[str, Callable[[], Look]] = {
        method.name: partial(detector_look, detector, method)
        for method in sweep_methods(config.eval.curves or {})
        if method.hold == 1 and not method.square
    }
    if config.eval.small_cnn is not None:
        cnn, name = small_cnn(config.eval.small_cnn, detector)
        looks[name] = partial(detector_look, cnn, Method(name))
    rows = []
    for fps in config.eval.fps:
        for name, new_look in looks.items():
            for move in (False, True):
                rows.append(latency_aware(data, detector.names, name, fps, new_look, move))
                say(markdown(rows[-1:]).splitlines()[-1])
    write_text(directory / "latency_aware.md", markdown(rows))
    return {"latency_aware": rows, "skipped": _skipped({})}


def small_cnn(path: str, detector: AnyDetector) -> tuple[SmallCNN, str]:
    """A CNN to compare a detector with, and its name."""
    return SmallCNN(path, detector.names, torch.get_num_threads()), Path(path).stem


def complete_all(config: Options, detector: AnyDetector, data: CocoVideo, methods: list[Method]) -> ResultStore:
    """Run what has not been run, on all processes of torchrun; only the first returns, the others are done.

    Every process runs videos of its own and leaves the results in the store, from where the first one takes them.
    """
    about = {
        "weights": weights_hash(config.weights),
        "precision": config.precision,
        "data": file_hash(config.data.val),
        "detector": repr((detector.names, detector.input_transform)),
        "scene_cuts": config.scene_cuts,
        "streams": config.streams,
        "device": detector.device.type,
    }
    store = ResultStore(Path(config.output) / "videos", about, data)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = sorted(share_out([len(video.frames) for video in data.videos], ranks)[rank])
    own = CocoVideo(data.categories, [data.videos[i] for i in share], data.image_root)
    workers = config.workers if config.workers is not None else 0 if detector.device.type == "cpu" else READERS
    options: dict[str, Any] = {"streams": config.streams, "workers": workers, "scene_cuts": config.scene_cuts}
    frames = sum(len(video.frames) for video in own.videos)
    with progress_bar(disable=rank > 0) as progress:
        task = progress.add_task("warming up", total=frames * len(methods))

        def advance(method: Method) -> None:
            progress.update(task, advance=1, description=method.name)

        complete(detector, own, methods, store, on_frame=advance, **options)
    if ranks > 1:
        dist.barrier()
        if rank:
            sys.exit()
        complete(detector, data, methods, store, **options)  # what another process could not keep
    return store


def weights_hash(source: str | None) -> str:
    """A hash of what `load_detector` reads; of weights that lie elsewhere, their name."""
    source = None if source is None else str(local_source(source))
    if source is not None and Path(source).is_dir():  # an engine, or as transformers writes them
        files = sorted(path for path in Path(source).iterdir() if path.is_file())
        return hashlib.sha256("".join(path.name + file_hash(path) for path in files).encode()).hexdigest()
    if source is None or not is_rf_detr(source):
        return file_hash(find_weights(source))
    return file_hash(source) if Path(source).is_file() else source


def gather(config: Options, store: ResultStore, method: Method, data: CocoVideo) -> MethodRun:
    """What a method did, with the scores that the config asks for."""
    run = collect(store, method, data)
    return run.rescored() if config.rescore else run


def _by_video(run: MethodRun) -> list[dict[str, Any]]:
    """AP50 and cost of each video that could be read; None where a video has no label."""
    return [
        {
            "name": video.video.name,
            "frames": len(video.costs),
            "ap50": run.scores(video).ap50 if any(frame.labelled for frame in video.video.frames) else None,
            "gmacs_total": sum(cost.total for cost in video.costs) / len(video.costs) / 1e9,
            "ms_mean": 1e3 * video.seconds / len(video.costs),
        }
        for video in run.videos
        if video.costs
    ]


def _skipped(skipped: dict[int, str]) -> dict[str, Any]:
    """How many frames could not be read, and why not the first of them."""
    if skipped:
        first_of_all = next(iter(skipped.values()))
        warn(f"{len(skipped)} frames could not be read; they are in no number. The first: {first_of_all}")
    return {"frames": len(skipped), "reasons": list(skipped.values())[:REASONS]}


def load_data(config: Options) -> CocoVideo:
    """The data set of the config, and warnings about what it lacks.

    Raises:
        UserError: it cannot be used, or is empty.
    """
    data = first(load_coco_video(config.data.val), config.max_videos, config.max_frames)
    if not data.videos:
        raise UserError(f"{config.data.val} holds no video with frames; there is nothing to evaluate. Prepare it again")
    if all(len(video.frames) == 1 for video in data.videos):
        warn(
            f"every video of {config.data.val} has one frame, so that nothing can be gated; "
            "if these are frames of videos, import them with datasets/import_annotations.py"
        )
    if any(frame.labelled for frame in data.frames) and not any(frame.annotations for frame in data.frames):
        warn(f"{config.data.val} has not one box on its labelled frames; average precisions are not defined")
    return data


def evaluate_all(config: Options) -> None:
    """Evaluate, then write the results."""
    refuse("eval_net", config, ("views", "temporal_views"), "for recognisers of actions")
    if config.eval.curves is None:
        refuse("eval_net", config, ("eval.only", "eval.fps", "eval.small_cnn"), "for curves, as eval=sweep has them")
    else:
        refuse("eval_net", config, ("eval.hold", "eval.scale", "eval.square", "gate"), "each curve has its own")
    if config.eval.fps:
        refuse("eval_net", config, ("eval.only", "rescore", "streams", "workers", "scene_cuts"), "not for latencies")
    build_gate(config.gate)
    data = load_data(config)
    device = choose_device(config.device)
    detector: AnyDetector = load_detector(config.weights, config.labels, precision=config.precision).to(device)
    if config.common_classes:
        data = for_classes(data, detector.names)
    directory = Path(config.output)
    evaluate = evaluate_single if config.eval.curves is None else evaluate_sweep
    if config.eval.fps:
        evaluate = evaluate_latency
    # Jobs that share out a sweep write whole files into one folder; so do the processes of torchrun.
    alone = config.eval.only is None and not (dist.is_initialized() and dist.get_rank())
    with owned(directory) if alone else contextlib.nullcontext():
        results = evaluate(config, detector, data, directory)
        if results:
            report_results(config, detector.device, data, directory, results)


def evaluate_recogniser(config: Options) -> None:
    """Evaluate a recogniser on clips, then write the results."""
    names = ("labels", "common_classes", "rescore", "max_frames", "streams", "workers", "scene_cuts")
    refuse("eval_net", config, names, "for detectors; a recogniser of actions sees whole clips and no boxes")
    sweep = options_of("eval_net", ["eval=sweep"]).eval
    if config.eval not in (EvalOptions(hold=config.eval.hold), sweep):
        raise UserError("a recogniser of actions knows eval=sweep as it is, and of eval=single the option hold alone")
    directory, weights = Path(config.output), config.weights or actions.DEFAULT
    gate = None if config.eval.curves is not None else actions.own_gate(build_gate(config.gate))
    recogniser = load_recogniser(weights, temporal_views=config.temporal_views, precision=config.precision).to(
        choose_device(config.device)
    )
    about = {"weights": weights, "data": config.data.val, "threads": torch.get_num_threads()}
    same = repr((about, weights_hash(weights), code_hash(), recogniser.device, config.temporal_views, config.precision))
    hold = 1 if config.eval.hold == "auto" else config.eval.hold  # there are no boxes that could move
    options: dict[str, Any] = {"max_clips": config.max_videos, "hold": hold, "views": config.views}
    options["kept"] = directory / "clips" / hashlib.sha256(same.encode()).hexdigest()[:12]
    with owned(directory):
        results = eval_actions.evaluate(recogniser, config.data, gate, directory, **options)
        write_results(directory, {"command": command(), **about, **results})


def report_results(
    config: Options, device: torch.device, data: CocoVideo, directory: Path, results: dict[str, Any]
) -> None:
    """Write `results.json`."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "command": command(),
        "weights": config.weights or DEFAULT,
        "labelled_frames": sum(frame.labelled for frame in data.frames),
        "streams": config.streams,
        "rescore": config.rescore,
        "data": config.data.val,
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "note": NOTE,
    }
    write_results(directory, about | results)


def run(config: Options) -> None:
    """Evaluate with or without torchrun."""
    if actions.recognises(config.task, config.weights):
        evaluate_recogniser(config)
        return
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        evaluate_all(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    from command_line import start

    start("eval_net")
