"""What frames cost: multiply-adds, milliseconds, tokens, memory. One MAC is one multiply-add (= 2 FLOP)."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eventful_det.detectors.results import FrameCost

TOTAL = "total"


@dataclass(frozen=True)
class Spread:
    """A distribution: its mean and median, and the values that 5 and 95 of 100 do not exceed."""

    mean: float
    median: float
    p5: float
    p95: float

    @staticmethod
    def of(values: Sequence[float] | NDArray[np.float64]) -> Spread:
        """The spread of some values, at least one."""
        p5, median, p95 = np.percentile(np.asarray(values), [5, 50, 95])
        return Spread(float(np.mean(values)), float(median), float(p5), float(p95))


@dataclass(frozen=True)
class Efficiency:
    """What the frames of some streams cost. Keys of the dictionaries are the parts of `FrameCost`, and "total".

    Attributes:
        frames: how many; all of them count below, flushes and held frames included, unless said otherwise.
        flushes: frames on which everything was recomputed because a stream began anew.
        gmacs: mean per frame, in 1e9 multiply-adds.
        gmacs_steady: the same without the flushes; empty when all frames are flushes.
        gmacs_dense: what the dense detector spends on frames of the same size.
        ms: times per frame, its share of a step that it had in common with other streams; empty when not measured.
        latency: milliseconds from the moment the frames of a step are at hand until all its detections are there; equal
            to `ms["total"]` when every stream has steps of its own. None when not measured.
        latency_flush: the same of the flushes alone; None when there was none.
        frames_per_second: of all streams together, reading the frames not counted; `nan` when not measured.
        tokens: mean number of tokens per frame.
        recomputed: mean number of tokens recomputed per frame.
    """

    frames: int
    flushes: int
    gmacs: dict[str, float]
    gmacs_steady: dict[str, float]
    gmacs_dense: dict[str, float]
    ms: dict[str, Spread]
    latency: Spread | None
    latency_flush: Spread | None
    frames_per_second: float
    tokens: float
    recomputed: float


def summarise(costs: Sequence[FrameCost], latencies: Sequence[float] | None = None) -> Efficiency:
    """Aggregate the costs of frames.

    Args:
        costs: of at least one frame.
        latencies: seconds that each of them took to be there; by default the time that it cost.
    """
    seconds = [cost.latency for cost in costs]
    waits = 1e3 * np.array(seconds if latencies is None else latencies)
    flushes = np.array([cost.flush for cost in costs])
    timed = sum(seconds) > 0
    return Efficiency(
        frames=len(costs),
        flushes=int(flushes.sum()),
        gmacs=_gmacs([cost.macs for cost in costs]),
        gmacs_steady=_gmacs([cost.macs for cost in costs if not cost.flush]),
        gmacs_dense=_gmacs([cost.dense for cost in costs]),
        ms=_milliseconds(costs),
        latency=Spread.of(waits) if timed else None,
        latency_flush=Spread.of(waits[flushes]) if timed and flushes.any() else None,
        frames_per_second=len(costs) / sum(seconds) if timed else math.nan,
        tokens=float(np.mean([cost.tokens for cost in costs])),
        recomputed=float(np.mean([cost.recomputed for cost in costs])),
    )


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak of `device` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # where that is not allowed, the peak is that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes since `reset_peak_memory`: of the tensors on a GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gmacs(macs: Sequence[dict[str, int]]) -> dict[str, float]:
    if not macs:
        return {}
    parts = {part: sum(frame[part] for frame in macs) / len(macs) / 1e9 for part in macs[0]}
    return parts | {TOTAL: sum(parts.values())}


def _milliseconds(costs: Sequence[FrameCost]) -> dict[str, Spread]:
    parts = dict.fromkeys(part for cost in costs for part in cost.seconds)
    times = {part: 1e3 * np.array([cost.seconds.get(part, 0.0) for cost in costs]) for part in parts}
    if not times:
        return {}
    times[TOTAL] = np.sum(list(times.values()), axis=0)
    return {part: Spread.of(t) for part, t in times.items()}
