"""What the streams of a pool did so far: counts of all their frames, rates and means of the last ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from eventful_det.detectors.results import FrameCost

_RECENT = 100  # frames that rates and means are taken over


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
            frames=sum(one.frames for one in every),
            dropped=sum(one.dropped for one in every),
            flushes=sum(one.flushes for one in every),
            macs=sum(one.macs for one in every),
            dense_macs=sum(one.dense_macs for one in every),
            frames_per_second=rate,
            gmacs=_mean(weights, [one.gmacs for one in here]),
            dense_gmacs=_mean(weights, [one.dense_gmacs for one in here]),
            milliseconds=_mean(weights, [one.milliseconds for one in here]),
            state_bytes=sum(one.state_bytes for one in here),
            active=bool(here),
        )


@dataclass
class Tally:
    """Keeps count of one stream's frames."""

    frames: int = 0
    dropped: int = 0
    flushes: int = 0
    macs: int = 0
    dense_macs: int = 0
    state_bytes: int = 0
    error: str | None = None
    recent: deque[tuple[float, FrameCost]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def count(self, cost: FrameCost, dropped: int, state_bytes: int) -> None:
        """A frame more."""
        self.frames += 1
        self.dropped = dropped
        self.flushes += cost.flush
        self.macs += cost.total
        self.dense_macs += cost.dense_total
        self.state_bytes = state_bytes
        self.recent.append((time.monotonic(), cost))

    def metrics(self, active: bool, lost: bool = False) -> StreamMetrics:
        """The counts, and rates and means of the last frames."""
        recent = list(self.recent)
        count = len(recent)
        elapsed = time.monotonic() - recent[0][0] if recent else 0.0
        return StreamMetrics(
            frames=self.frames,
            dropped=self.dropped,
            flushes=self.flushes,
            macs=self.macs,
            dense_macs=self.dense_macs,
            state_bytes=self.state_bytes,
            error=self.error,
            frames_per_second=count / elapsed if active and count > 1 and elapsed else 0.0,
            gmacs=sum(cost.total for _, cost in recent) / count / 1e9 if count else 0.0,
            dense_gmacs=sum(cost.dense_total for _, cost in recent) / count / 1e9 if count else 0.0,
            milliseconds=1e3 * sum(cost.latency for _, cost in recent) / count if count else 0.0,
            active=active,
            lost=lost,
        )


def _mean(weights: list[float], values: list[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))
