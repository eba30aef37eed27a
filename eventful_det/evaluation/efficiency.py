"""What frames cost: multiply-adds, milliseconds, tokens, memory. One MAC is one multiply-add (= 2 FLOP)."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from eventful_det.models.cost import FrameCost

TOTAL = "total"


@dataclass(frozen=True)
class Milliseconds:
    """Times of one part over some frames."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True)
class Efficiency:
    """What the frames of some streams cost. Keys of the dictionaries are the parts of `FrameCost`, and "total".

    Attributes:
        frames: how many; all of them count below, flushes and held frames included, unless said otherwise.
        flushes: frames on which everything was recomputed because a stream began anew.
        gmacs: mean per frame, in 1e9 multiply-adds.
        gmacs_steady: the same without the flushes; empty when all frames are flushes.
        gmacs_dense: what the dense detector spends on frames of the same size.
        ms: times per frame; empty when they were not measured.
        ms_flush: times of the flushes alone; empty when there was none.
        tokens: mean number of tokens per frame.
        recomputed: mean number of tokens recomputed per frame.
    """

    frames: int
    flushes: int
    gmacs: dict[str, float]
    gmacs_steady: dict[str, float]
    gmacs_dense: dict[str, float]
    ms: dict[str, Milliseconds]
    ms_flush: dict[str, Milliseconds]
    tokens: float
    recomputed: float


def summarise(costs: Sequence[FrameCost]) -> Efficiency:
    """Aggregate the costs of frames (at least one)."""
    flushes = [cost for cost in costs if cost.flush]
    return Efficiency(
        frames=len(costs),
        flushes=len(flushes),
        gmacs=_gmacs([cost.macs for cost in costs]),
        gmacs_steady=_gmacs([cost.macs for cost in costs if not cost.flush]),
        gmacs_dense=_gmacs([cost.dense for cost in costs]),
        ms=_milliseconds(costs),
        ms_flush=_milliseconds(flushes),
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


def _milliseconds(costs: Sequence[FrameCost]) -> dict[str, Milliseconds]:
    parts = dict.fromkeys(part for cost in costs for part in cost.seconds)
    times = {part: np.array([cost.seconds.get(part, 0.0) for cost in costs]) for part in parts}
    if not times:
        return {}
    times[TOTAL] = np.sum(list(times.values()), axis=0)
    return {
        part: Milliseconds(float(t.mean()), float(np.median(t)), float(np.percentile(t, 95)))
        for part, t in ((part, 1e3 * t) for part, t in times.items())
    }
