"""How many streams a machine can serve: a pool beside the same streams one by one and beside the dense detector.

    python tools/benchmark.py streams=[1,2,4,8,16]                       # a synthetic clip, shipped weights
    python tools/benchmark.py streams=[4] clip=my.mp4 budget=20GMACs threads=1
    python tools/benchmark.py streams=[8] hold=2                         # and with boxes held, streams taking turns

Every stream plays the same clip from another moment on. The methods take turns round by round, in an order drawn anew
each time; a round is one frame of every stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmark_cases import Options
from common import AnyDetector, choose_device, console, progress_bar, show_table, write_results

from eventful_det.benchmark.timing import Timed, paired_ratios, time_together
from eventful_det.data.video import open_source
from eventful_det.data.video.transforms import Image
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC
from eventful_det.errors import UserError
from eventful_det.evaluation.efficiency import Spread
from eventful_det.gating.dense import Dense
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import Budget
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.session import StreamResult

_LONGEST = 200  # frames of the clip that are kept in memory
NOTE = (
    "pool: all streams in one step under one budget. one by one: each alone, in turn, under the same budget (of GMACs "
    "and seconds its part). dense: the dense detector. hold n: on every n-th frame of a stream, its boxes held in "
    "between. GMACs are per frame, in 1e9 multiply-adds; x: how many times faster than dense, and than one by one, the "
    "median of the ratios of n rounds each; p95: of the time of a round, in medians. Resizing counts, decoding not."
)
DENSE, ALONE, POOL = "dense", "one by one", "pool"


@dataclass(frozen=True)
class Round:
    """What a round cost.

    Attributes:
        gmacs: per frame.
        dense_gmacs: what the dense detector spends.
        state_bytes: remembered of all streams.
    """

    gmacs: float
    dense_gmacs: float
    state_bytes: int


def bench_streams(config: Options, about: dict[str, Any]) -> None:
    """Run all numbers of streams, print a table and write the results."""
    budget = parse_budget(config.budget)
    assert budget is not None and config.streams is not None
    if config.hold > config.repetitions:
        raise UserError(f"hold must be at most repetitions={config.repetitions}, got {config.hold}")
    detector = load_detector(config.weights or (None if config.clip else SYNTHETIC)).to(choose_device(config.device))
    clip = _clip(config.clip or "synthetic:1")
    rows: list[dict[str, Any]] = []
    for count in config.streams:
        rows += _bench(detector, budget, clip, count, config)
        results = about | {"budget": str(budget), "clip_frames": len(clip), "streams": rows, "note": NOTE}
        write_results(Path(config.output), results)  # a run may be cut short
    show_table(_table(rows), left=2)
    console.print(NOTE)


def _clip(source: str) -> list[Image]:
    with open_source(source) as opened:
        return [frame.image for frame in islice(opened, _LONGEST)]


def _play(clip: Sequence[Image], start: int) -> Iterator[Image]:
    """The clip from some frame on, again and again."""
    while True:
        yield clip[start % len(clip)]
        start += 1


def _bench(
    detector: AnyDetector, budget: Budget, clip: Sequence[Image], count: int, config: Options
) -> list[dict[str, Any]]:
    """The rows of a number of streams."""
    methods = {
        DENSE: _pools(detector, None, clip, [count]),
        ALONE: _pools(detector, _part(budget, count), clip, [1] * count),
        POOL: _pools(detector, budget, clip, [count]),
    }
    if config.hold != 1:
        methods[f"{DENSE}, hold {config.hold}"] = _pools(detector, None, clip, [count], config.hold)
        methods[f"{POOL}, hold {config.hold}"] = _pools(detector, budget, clip, [count], config.hold)
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(f"{count} streams", total=config.warm_up + config.repetitions)
        timed = time_together(
            methods,
            config.repetitions,
            config.warm_up,
            detector.device,
            config.seed,
            on_repetition=lambda: progress.update(task, advance=1, refresh=True),
        )
    return [_row(name, count, timed, config.hold) for name in methods]


def _part(budget: Budget, count: int) -> Budget:
    """Of a budget for a round of so many streams, what each has when it is alone."""
    if budget is None or isinstance(budget, float):
        return budget
    if isinstance(budget, int):
        return budget // count
    return type(budget)(next(iter(vars(budget).values())) / count)


def _pools(
    detector: AnyDetector, budget: Budget, clip: Sequence[Image], sizes: Sequence[int], hold: int = 1
) -> Callable[[int], Round]:
    """A callable that runs a round of all streams, in pools of these sizes; without a budget, of the dense detector."""
    rule = Dense() if budget is None else Rows()
    pools = [StreamPool(detector, budget=budget, rule=rule, scene_cuts=False, hold=hold) for _ in sizes]
    homes = [pool for pool, size in zip(pools, sizes, strict=True) for _ in range(size)]
    for i, pool in enumerate(homes):
        pool.add(_play(clip, i * len(clip) // len(homes)), name=str(i))

    def run(_: int) -> Round:
        results: list[StreamResult] = [result for pool in pools for result in pool.step()]
        return Round(
            gmacs=sum(result.cost.total for result in results) / len(results) / 1e9,
            dense_gmacs=sum(result.cost.dense_total for result in results) / len(results) / 1e9,
            state_bytes=sum(pool.metrics().total.state_bytes for pool in pools),
        )

    return run


def _row(name: str, count: int, timed: dict[str, Timed[Round]], hold: int) -> dict[str, Any]:
    """What a method did, beside the others."""
    calls = timed[name].calls
    seconds = {method: _cycles([call.seconds for call in one.calls], hold) for method, one in timed.items()}
    gmacs, dense = (sum(getattr(c.result, k) for c in calls) / len(calls) for k in ("gmacs", "dense_gmacs"))
    spread = Spread.of([call.seconds for call in calls])
    return {
        "streams": count,
        "method": name,
        "frames_per_second": count * hold / Spread.of(seconds[name]).median,
        "gmacs": gmacs,
        "share_of_dense": gmacs / dense,
        "faster_than_dense": paired_ratios(seconds[DENSE], seconds[name]),
        "faster_than_one_by_one": paired_ratios(seconds[ALONE], seconds[name]),
        "p95_to_median": spread.p95 / spread.median,
        "state_bytes": calls[-1].result.state_bytes,
    }


def _cycles(seconds: Sequence[float], hold: int) -> list[float]:
    """The time of every `hold` rounds, in which each stream has its turn once."""
    return [sum(seconds[i : i + hold]) for i in range(0, len(seconds) - hold + 1, hold)]


def _table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("streams", "method", "fps", "GMACs", "of dense", "x dense", "x alone", "p95", "MB")
    ]
    lines += [
        (
            str(row["streams"]),
            row["method"],
            f"{row['frames_per_second']:.1f}",
            f"{row['gmacs']:.2f}",
            f"{row['share_of_dense']:.0%}",
            f"{row['faster_than_dense'].median:.2f}",
            f"{row['faster_than_one_by_one'].median:.2f}",
            f"{row['p95_to_median']:.2f}",
            f"{row['state_bytes'] / 1e6:.1f}",
        )
        for row in rows
    ]
    return lines
