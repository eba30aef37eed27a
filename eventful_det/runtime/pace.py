"""How long steps take on this machine now."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SPIKE = 2.0  # a step is taken to have lasted at most so many times longer than expected
_FIRST = 0.1  # of the first step that is measured, taken to be spent whatever is recomputed


@dataclass(frozen=True)
class Load:
    """What a step has to do.

    Attributes:
        frames: number of frames.
        gmacs: 1e9 multiply-adds.
    """

    frames: int
    gmacs: float


@dataclass(frozen=True)
class Pace:
    """How long steps take on this machine now: a part per frame and a part per multiply-add.

    Attributes:
        frame: seconds per frame, whatever is recomputed.
        gmac: seconds per 1e9 multiply-adds.
    """

    frame: float
    gmac: float

    @staticmethod
    def first(load: Load, seconds: float) -> Pace:
        """From the first step that was measured, most of its time for multiply-adds, which errs on the safe side."""
        return Pace(_FIRST * seconds / load.frames, (1 - _FIRST) * seconds / max(load.gmacs, 1e-9))

    def seconds(self, load: Load) -> float:
        """How long a step is expected to take."""
        return self.frame * load.frames + self.gmac * load.gmacs

    def gmacs(self, frames: int, seconds: float) -> float:
        """How many 1e9 multiply-adds fit into a step; negative if not even none do."""
        return (seconds - self.frame * frames) / self.gmac

    def learn(self, load: Load, seconds: float, gain: float = 0.3) -> Pace:
        """After a step that took so long: the error is made good by each part in proportion to its square.

        That is a normalised least-mean-squares step in units of the estimates themselves: a still scene teaches what a
        frame takes, a busy one what multiply-adds take, and neither ever changes its sign.

        Args:
            load: of the step.
            seconds: that it took.
            gain: in (0, 1]; how much of the error of the expectation for such a step is corrected at once.
        """
        expected = self.seconds(load)
        frame, work = self.frame * load.frames, self.gmac * load.gmacs
        error = gain * (min(seconds, _SPIKE * expected) - expected) / (frame**2 + work**2)
        return Pace(self.frame * max(0.5, 1 + error * frame), self.gmac * max(0.5, 1 + error * work))


@dataclass
class Clock:
    """Learns how long steps take.

    Attributes:
        pace: of steps that recompute some tokens; of a dense one until there is one.
        dense: seconds per 1e9 multiply-adds of the last step that recomputed everything.
    """

    pace: Pace | None = None
    dense: float = math.inf

    def observe(self, load: Load, seconds: float, whole: bool) -> None:
        """Learn from a step; `whole` if it recomputed everything, which is done in other ways and at another pace."""
        if whole:
            self.dense = seconds / load.gmacs
        if self.pace is None:
            self.pace = Pace.first(load, seconds)
        elif not whole:
            self.pace = self.pace.learn(load, seconds)

    def gmacs(self, frames: int, seconds: float) -> float:
        """How many 1e9 multiply-adds fit into a step; none as long as nothing is known."""
        return 0.0 if self.pace is None else self.pace.gmacs(frames, seconds)

    def prefers_dense(self, load: Load, dense_gmacs: float, seconds: float) -> bool:
        """Whether recomputing everything is expected to take no longer than `load`, nor than so many seconds."""
        return self.pace is not None and self.dense * dense_gmacs <= min(seconds, self.pace.seconds(load))
