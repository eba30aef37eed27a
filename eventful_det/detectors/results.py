"""What a detector gives: detections, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from eventful_det.gating.state import TensorTree


@dataclass
class Detections(TensorTree):
    """Objects detected in one frame, best first.

    Attributes:
        boxes: `(n, 4)` xyxy in pixels.
        scores: `(n,)` in [0, 1].
        labels: `(n,)` indices into the class names, from 0.
        tracks: `(n,)` ids of objects followed from frame to frame, -1 = not followed (yet); None without a tracker.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    tracks: Tensor | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __getitem__(self, index: Tensor | slice | Sequence[int] | int) -> Detections:
        """Some of the objects, as in `detections[detections.scores > 0.5]`: a mask `(n,)`, places, a slice, or one."""
        places = [index] if isinstance(index, int) else index
        return self.map(lambda values: values[places])

    def __iter__(self) -> Iterator[Detections]:
        """Each object by itself."""
        return (self[i] for i in range(len(self)))

    def scaled(self, x: float, y: float) -> Detections:
        """The same objects with coordinates multiplied by `x` and `y`."""
        return dataclasses.replace(self, boxes=self.boxes * self.boxes.new_tensor([x, y, x, y]))


@dataclass(frozen=True)
class FrameCost:
    """What one frame cost.

    Attributes:
        macs: multiply-adds by part of the detector, gate arithmetic included; every detector has a "backbone".
        dense: what the dense detector would have spent on the same frame, by part.
        seconds: time of each part, plus "other"; empty when not measured.
        recomputed: tokens recomputed.
        tokens: tokens of the frame.
        flush: whether everything was recomputed because the stream began anew.
    """

    macs: dict[str, int]
    dense: dict[str, int]
    recomputed: int
    tokens: int
    flush: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def idle(self) -> Self:
        """The cost of a frame like this one on which the network does not run."""
        return type(self)(dict.fromkeys(self.dense, 0), self.dense, 0, self.tokens, False)

    @property
    def total(self) -> int:
        """MACs of the whole detector."""
        return sum(self.macs.values())

    @property
    def dense_total(self) -> int:
        """MACs of the whole dense detector on the same frame."""
        return sum(self.dense.values())

    @property
    def latency(self) -> float:
        """Seconds of the whole detector; 0 when not measured."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class StepResult:
    """One frame of one stream.

    Attributes:
        detections: in pixels of the frame given to `step`.
        cost: of this frame.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
    """

    detections: Detections
    cost: FrameCost
    work: Tensor
