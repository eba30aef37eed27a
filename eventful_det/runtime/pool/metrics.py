"""What the streams of a pool did so far: counts of all their frames, rates and means of the last ones."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eventful_det.detectors.results import FrameCost
from eventful_det.runtime.session import Result

_RECENT = 100  # frames that rates and means are taken over
_COUNTS = ("frames", "dropped", "flushes", "macs", "dense_macs")
_MEANS = ("gmacs", "dense_gmacs", "milliseconds")


@dataclass(frozen=True)
class StreamMetrics:
    """One stream, or all streams of a pool together.

    Attributes:
        frames: detected in so far.
        dropped: skipped so far because newer ones had come.
        flushes: frames on which everything was recomputed because the stream began anew.
        macs, dense_macs: multiply-adds of all frames, and what the dense detector would have spent.
        frames_per_second: of the last 100 frames.
        gmacs, dense_gmacs: the same for the last 100 frames, in 1e9 per frame.
        milliseconds: per frame, of the last 100; a round's are shared by its streams.
        age_p95: of a live source, 95th percentile of the ages in seconds that the last 100 frames had when their boxes
            were there; None for others.
        state_bytes: remembered between frames.
        active: whether the stream is still in the pool.
        lost: its camera or server is lost, and being called again.
        error: why it failed, if it did.
    """

    frames: int = 0
    dropped: int = 0
    flushes: int = 0
    macs: int = 0
    dense_macs: int = 0
    frames_per_second: float = 0.0
    gmacs: float = 0.0
    dense_gmacs: float = 0.0
    milliseconds: float = 0.0
    age_p95: float | None = None
    state_bytes: int = 0
    active: bool = True
    lost: bool = False
    error: str | None = None


@dataclass(frozen=True)
class PoolMetrics:
    """The streams of a pool by name, those that left last included."""

    streams: Mapping[str, StreamMetrics]

    @property
    def total(self) -> StreamMetrics:
        """All streams together; rates, means and bytes are of those that are still there."""
        every = list(self.streams.values())
        here = [one for one in every if one.active]
        rate = sum(one.frames_per_second for one in here)
        weights = [one.frames_per_second / rate if rate else 1 / len(here) for one in here]
        return StreamMetrics(
            **{name: sum(getattr(one, name) for one in every) for name in _COUNTS},
            **{name: sum(w * getattr(one, name) for w, one in zip(weights, here, strict=True)) for name in _MEANS},
            frames_per_second=rate,
            state_bytes=sum(one.state_bytes for one in here),
            active=bool(here),
        )


class Tally:
    """Keeps count of one stream's frames.

    Attributes:
        error: why it failed, if it did.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self._counts = StreamMetrics()
        self._recent: deque[tuple[float, FrameCost, float | None]] = deque(maxlen=_RECENT)

    def count(self, result: Result, state_bytes: int) -> None:
        """A frame more."""
        before, cost = self._counts, result.cost
        self._counts = dataclasses.replace(
            before,
            frames=before.frames + 1,
            dropped=result.dropped,
            flushes=before.flushes + cost.flush,
            macs=before.macs + cost.total,
            dense_macs=before.dense_macs + cost.dense_total,
            state_bytes=state_bytes,
        )
        self._recent.append((time.monotonic(), cost, result.frame_age))

    def metrics(self, active: bool, lost: bool = False) -> StreamMetrics:
        """The counts, and rates and means of the last frames."""
        recent = list(self._recent)
        ages = [age for _, _, age in recent if age is not None]
        count = len(recent)
        elapsed = time.monotonic() - recent[0][0] if recent else 0.0
        return dataclasses.replace(
            self._counts,
            error=self.error,
            frames_per_second=count / elapsed if active and count > 1 and elapsed else 0.0,
            gmacs=sum(cost.total for _, cost, _ in recent) / max(1, count) / 1e9,
            dense_gmacs=sum(cost.dense_total for _, cost, _ in recent) / max(1, count) / 1e9,
            milliseconds=1e3 * sum(cost.latency for _, cost, _ in recent) / max(1, count),
            age_p95=float(np.percentile(ages, 95)) if ages else None,
            active=active,
            lost=lost,
        )
