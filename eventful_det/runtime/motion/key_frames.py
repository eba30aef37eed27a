"""On which frames the network runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import AnyRule
from eventful_det.runtime.motion.boxes import BoxMover


@dataclass(frozen=True)
class KeyFrames:
    """When the network runs again.

    Attributes:
        every: at most so many frames from one key frame to the next; 1 = on every frame.
        quality: it runs earlier when boxes look less than this as they did on the key frame, see `BoxMover`: objects
            turn or were lost.
        novelty: it runs earlier when a larger share of the picture outside of all boxes begins to move.
    """

    every: int = 6
    quality: float = 0.7
    novelty: float = 0.03

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"hold must be at least 1 (= every frame), got {self.every}")

    @staticmethod
    def each(every: int) -> KeyFrames:
        """Every n-th frame, whatever moves."""
        return KeyFrames(every, 0.0, math.inf)

    def early(self, mover: BoxMover) -> bool:
        """Whether to run before it is time, by what became of the boxes."""
        return mover.quality < self.quality or mover.novelty > self.novelty

    @staticmethod
    def of(hold: Hold) -> KeyFrames:
        """What `hold` means: key frames, or the number n of every n-th one; None = the product's choice.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(hold, KeyFrames):
            return hold
        if hold is None:
            return DEFAULT_HOLD
        if isinstance(hold, bool) or not isinstance(hold, int):
            raise UserError(f"hold must be a number of frames, KeyFrames or None, got {hold!r}")
        return KeyFrames.each(hold)


DEFAULT_HOLD = KeyFrames(every=2, quality=0.8)
"""Where nobody says otherwise: every second frame, and every one where boxes cannot be followed."""
Hold = int | KeyFrames | None
"""On which frames the network runs: every n-th, as `KeyFrames` say, or (None) as `DEFAULT_HOLD` and the budget say.

None is every frame where somebody chooses tokens in place of the product: with a `Selector` of one's own, and with the
rules that are there for comparison (`Dense`, `Paper`, `Rows(exact=True)`).
"""


def hold_for(hold: Hold, rule: AnyRule) -> Hold:
    """`hold` under a rule."""
    compares = isinstance(rule, (Dense, Paper)) or (isinstance(rule, Rows) and rule.exact)
    return 1 if hold is None and compares else hold


def parse_hold(value: int | str) -> Hold:
    """`hold` as written in a config: a number, "auto" or "adaptive"."""
    return {"auto": None, "adaptive": KeyFrames()}[value] if isinstance(value, str) else value
