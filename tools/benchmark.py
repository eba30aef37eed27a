"""How long frames take, beside what they cost: dense, our rules and, on request, the official code, in one run.

    python tools/benchmark.py                                    # the cases of configs/benchmark.yaml
    python tools/benchmark.py threads=2 repetitions=31 clip=my.mp4 peer=path/to/eventful-transformer
    python tools/benchmark.py only=672x672 profile=true          # the cases whose name holds "672x672"
    python tools/benchmark.py recogniser=vivit_b_epic k=50 engine=[torch,openvino]   # action recognition
    python tools/benchmark.py streams=[1,2,4,8,16] budget=0.25   # many streams: see tools/benchmark_streams.py
    python tools/benchmark.py engine=[torch,openvino]            # engines: see tools/benchmark_engines.py
    python tools/benchmark.py cases='[{model: vitdet_tiny, size: [384,640], what: detector, fraction: 0.125}]'

The methods of a case live in one process, see the same frames and take turns frame by frame, in an order drawn anew
each time, each with its own stream; ratios are taken frame by frame. Before that each runs a few frames alone, which
tells its peak memory, the attention kernels that it uses and, with profile=true, where its time goes.

Writes results.json, benchmark.md and, with profile=true, a profile-*.txt for each case and method.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_cases import DENSE, PARTS, PEERS, Case, Options, cases_of
from benchmark_engines import bench_engines
from benchmark_methods import Method, Step, prepare
from benchmark_streams import bench_streams
from common import choose_device, command, console, progress_bar, say, show_table, write_results
from torch import Tensor

from eventful_det.benchmark.official_code import OfficialCode
from eventful_det.benchmark.timing import (
    Operation,
    Timed,
    attention_kernels,
    paired_ratios,
    peak_of,
    profile_operations,
    time_together,
)
from eventful_det.evaluation.efficiency import Spread
from eventful_det.outputs import markdown_table, owned, write_text

NOTE = (
    "GMACs are 1e9 multiply-adds as counted while running; timm's dense blocks spend some on the padded tokens of "
    "incomplete windows. fewer, faster: how many times fewer MACs and less time than dense; faster is the median of "
    "the ratios frame by frame, with their 5th and 95th percentiles. per MAC: faster / fewer, 1 where time follows "
    "MACs. first: the very first frame, which allocates and recomputes everything. state: remembered between frames. "
    "peak: memory on top of weights and frames, first frame included, each method alone. All is float32."
)
_ALONE = 4  # frames that a method runs alone at most


@dataclass(frozen=True)
class Alone:
    """A method when nothing else runs: peak memory in bytes, calls of fused attention kernels, operators by time."""

    peak: int
    kernels: dict[str, int]
    operations: list[Operation]


def run_alone(method: Method, frames: Sequence[Tensor], device: torch.device, profile: bool) -> Alone:
    """Run a few frames, first frame included, and forget them."""
    method.step(frames[0])  # so that no method pays for loading what all of them need
    method.reset()
    peak = peak_of(lambda: [method.step(frame) for frame in frames[:2]], device)
    kernels = attention_kernels(lambda: method.step(frames[2]))
    operations = profile_operations(lambda: method.step(frames[3]), device) if profile else []
    method.reset()
    return Alone(peak, kernels, operations)


def run_case(case: Case, config: Options, code: OfficialCode | None) -> dict[str, Any]:
    """A case's entry in `results.json`."""
    device = choose_device(config.device)
    count = max(config.warm_up + config.repetitions, _ALONE)
    setting = prepare(case, config, count, device, code)
    methods, frames = setting.methods, setting.frames
    alone = {name: run_alone(method, frames, device, config.profile) for name, method in methods.items()}
    notes = [
        *setting.notes,
        f"Attention: {'; '.join(f'{name} {_attention(alone[name].kernels)}' for name in methods)}.",
    ]
    timed = take_turns(case.name, methods, frames, config, device)
    rows = [
        {"method": name, **row, **_facts(method, timed[name], alone[name])}
        for name, method in methods.items()
        for row in compare(timed[name], timed[DENSE], PARTS[case.what])
    ]
    if set(methods) >= set(PEERS):
        (own,) = compare(timed["peer"], timed["peer_dense"], PARTS[case.what])
        notes.append(f"peer against peer_dense: {own['mac_ratio']:.2f} times fewer MACs, {_faster(own)} times faster.")
    for name in methods if config.profile else ():
        show_profile(f"{case.name} {name}", alone[name].operations, Path(config.output))
    about = {**dataclasses.asdict(case), "name": case.name, "k": setting.k, "tokens": setting.tokens}
    return {**about, "notes": notes, "rows": rows}


def take_turns(
    title: str, methods: dict[str, Method], frames: Sequence[Tensor], config: Options, device: torch.device
) -> dict[str, Timed[Step]]:
    """Time all methods on the same frames, with a progress bar."""

    def step(method: Method, i: int) -> Step:
        return method.step(frames[i])

    # Without a thread that refreshes the bar: it would take time from what is being timed.
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(title, total=config.warm_up + config.repetitions)
        return time_together(
            {name: partial(step, method) for name, method in methods.items()},
            config.repetitions,
            config.warm_up,
            device,
            config.seed,
            on_repetition=lambda: progress.update(task, advance=1, refresh=True),
        )


def compare(timed: Timed[Step], reference: Timed[Step], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Per part what it cost and took, and how many times less than the reference."""
    rows = []
    for part in parts:
        gmacs, seconds = _gmacs(timed, part), _seconds(timed, part)
        mac_ratio = _gmacs(reference, part) / gmacs if gmacs else math.nan
        time, ratio = Spread.of(seconds), paired_ratios(_seconds(reference, part), seconds)
        rows.append(
            {
                "part": part,
                "gmacs": gmacs,
                "mac_ratio": mac_ratio,
                "ms_p50": 1e3 * time.median,
                "ms_p95": 1e3 * time.p95,
                "time_ratio": ratio.median,
                "time_ratio_p5": ratio.p5,
                "time_ratio_p95": ratio.p95,
                "time_ratio_per_mac_ratio": ratio.median / mac_ratio,
            }
        )
    return rows


def _gmacs(timed: Timed[Step], part: str) -> float:
    return sum(call.result.macs[part] for call in timed.calls) / len(timed.calls) / 1e9


def _seconds(timed: Timed[Step], part: str) -> list[float]:
    return [call.result.seconds.get(part, call.seconds) for call in timed.calls]


def _facts(method: Method, timed: Timed[Step], alone: Alone) -> dict[str, Any]:
    """What holds for all parts of a method together."""
    return {
        "ms_first": 1e3 * timed.first.seconds,
        "state_bytes": method.state_bytes(),
        "peak_bytes": alone.peak,
        "attention_kernels": alone.kernels,
    }


def _attention(kernels: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in kernels.items()) or "not fused"


def _faster(row: dict[str, Any]) -> str:
    return f"{row['time_ratio']:.2f} ({row['time_ratio_p5']:.2f}-{row['time_ratio_p95']:.2f})"


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A case as text; the first line holds the titles. What holds for a whole method is told with its last part."""
    last = {row["method"]: row["part"] for row in rows}
    lines = [_cells(row, last[row["method"]] == row["part"]) for row in rows]
    return [list(lines[0]), *(list(line.values()) for line in lines)]


def _cells(row: dict[str, Any], last: bool) -> dict[str, str]:
    facts = {
        "first ms": f"{row['ms_first']:.1f}",
        "state MB": f"{row['state_bytes'] / 1e6:.1f}",
        "peak MB": f"{row['peak_bytes'] / 1e6:.0f}",
    }
    return {
        "method": row["method"],
        "part": row["part"],
        "GMACs": f"{row['gmacs']:.2f}" if row["gmacs"] >= 1 else f"{row['gmacs']:.3f}",
        "fewer": f"{row['mac_ratio']:.2f}",
        "p50 ms": f"{row['ms_p50']:.1f}",
        "p95 ms": f"{row['ms_p95']:.1f}",
        "faster (p5-p95)": _faster(row),
        "per MAC": f"{row['time_ratio_per_mac_ratio']:.2f}",
        **{title: text if last else "" for title, text in facts.items()},
    }


def markdown(about: dict[str, Any], cases: Sequence[dict[str, Any]]) -> str:
    """All cases as Markdown."""
    text = f"`{about['command']}`\n\n{about['machine']}; {about['repetitions']} repetitions. {NOTE}\n"
    for case in cases:
        text += f"\n## {case['name']}\n\n{' '.join(case['notes'])}\n\n"
        text += markdown_table(table(case["rows"]), left=2)
    return text


def show(case: dict[str, Any]) -> None:
    """Print a case, as much of it as fits on a terminal."""
    show_table([line[:8] for line in table(case["rows"])], case["name"], left=2)
    console.print(*case["notes"], sep="\n")


def show_profile(title: str, operations: Sequence[Operation], directory: Path) -> None:
    """Write where the time of a steady frame goes, and print the beginning."""
    lines = [
        f"{title}: operators in one frame, each without those that it calls",
        f"{'share':>6} {'ms':>9} {'calls':>6}  operator",
        *(f"{op.share:6.1%} {1e3 * op.seconds:9.2f} {op.calls:6}  {op.name}" for op in operations[:30]),
    ]
    name = re.sub(r"[^\w.=+-]+", "-", f"profile-{title}")
    write_text(directory / f"{name}.txt", "\n".join(lines) + "\n")
    console.print(*lines[:14], sep="\n", soft_wrap=True)


def run(config: Options) -> None:
    """Run the cases one after another, then write the results."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    code = None if config.peer is None else OfficialCode(config.peer)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "command": command(),
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32",
        "repetitions": config.repetitions,
        "warm_up": config.warm_up,
        "seed": config.seed,
    }
    with owned(Path(config.output)):
        if config.engine is not None or config.recogniser is not None:
            bench_engines(config, about)
        elif config.streams is None:
            bench_cases(config, about, code)
        else:
            bench_streams(config, about)


def bench_cases(config: Options, about: dict[str, Any], code: OfficialCode | None) -> None:
    """Run the cases, print a table of each and write the results."""
    cases, skipped = cases_of(config)
    for name in skipped:
        say(f"left out, because it needs clip=... or peer=...: {name}")
    directory = Path(config.output)
    results: list[dict[str, Any]] = []
    for case in cases:
        results.append(run_case(case, config, code))
        # A run may be cut short.
        write_results(directory, about | {"note": NOTE, "left_out": skipped, "cases": results})
        write_text(directory / "benchmark.md", markdown(about, results))
        show(results[-1])


if __name__ == "__main__":
    from command_line import start

    start("benchmark")
