"""How far gated detections drift from dense ones on the user's own video, without labels.

The dense detector runs beside the stream on every n-th frame, as its shadow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torchvision.ops import box_iou

from eventful_det.models.detector import Detector
from eventful_det.models.roi_heads import Detections

if TYPE_CHECKING:
    from eventful_det.runtime.stream import Viewer

SURE = 0.5  # detections of at least this score are compared
_OVERLAP = 0.5


@dataclass(frozen=True)
class Drift:
    """Sure detections of one frame or of many, beside those of the dense detector.

    Attributes:
        frames: that were compared.
        ours, dense: detections of each.
        both: detections that both have: of the same class, overlapping by half.
        overlap: sum of the intersections over unions of those.
        seconds: that the dense detector took.
    """

    frames: int = 0
    ours: int = 0
    dense: int = 0
    both: int = 0
    overlap: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Drift) -> Drift:
        return Drift(
            self.frames + other.frames,
            self.ours + other.ours,
            self.dense + other.dense,
            self.both + other.both,
            self.overlap + other.overlap,
            self.seconds + other.seconds,
        )

    @property
    def agreement(self) -> float | None:
        """F1 of our detections with the dense ones as truth, 0 to 1; None if there are none at all."""
        return 2 * self.both / (self.ours + self.dense) if self.ours + self.dense else None

    @property
    def lost(self) -> float | None:
        """Share of the dense detections that we do not have; None if there are none."""
        return 1 - self.both / self.dense if self.dense else None

    @property
    def spurious(self) -> float | None:
        """Share of our detections that the dense detector does not have; None if there are none."""
        return 1 - self.both / self.ours if self.ours else None

    @property
    def mean_overlap(self) -> float | None:
        """Mean intersection over union of the detections that both have; None if there are none."""
        return self.overlap / self.both if self.both else None

    def summary(self) -> dict[str, float | int | None]:
        """All of it, for a results file."""
        return {
            "frames": self.frames,
            "agreement_f1": self.agreement,
            "lost": self.lost,
            "spurious": self.spurious,
            "mean_overlap": self.mean_overlap,
            "detections": self.ours,
            "dense_detections": self.dense,
            "dense_ms": 1e3 * self.seconds / self.frames if self.frames else None,
        }


class Shadow:
    """Runs the dense detector on every n-th frame of a stream and compares.

    Args:
        detector: whose modules are shared.
        viewer: of the stream.
        every: n >= 1. The first frame to be compared is the n-th.

    Attributes:
        total: of all frames so far.
    """

    def __init__(self, detector: Detector, viewer: Viewer, every: int) -> None:
        self._dense, self._viewer, self._every = detector.with_rule(None), viewer, every
        self.total = Drift()

    def compare(self, index: int, image: NDArray[np.uint8], ours: Detections) -> Drift | None:
        """Compare a frame if it is one of those.

        Args:
            index: of the frame, from 0.
            image: `(h, w, 3)` the frame.
            ours: what the stream found, in pixels of the frame.
        """
        if (index + 1) % self._every:
            return None
        frame = self._viewer.look(image, self._dense.device)
        (step,) = self._dense.step(frame[None], self._dense.init_state())
        dense = self._viewer.tell(step, image, index, None).detections
        drift = compare(ours, dense, step.cost.latency, SURE)
        self.total += drift
        return drift


def compare(ours: Detections, dense: Detections, seconds: float = 0.0, sure: float = SURE) -> Drift:
    """Compare the detections of one frame whose score is at least `sure`."""
    ours, dense = _at_least(ours, sure), _at_least(dense, sure)
    overlaps = list(matches(ours, dense))
    return Drift(1, len(ours), len(dense), len(overlaps), sum(overlaps), seconds)


def matches(ours: Detections, theirs: Detections) -> Iterable[float]:
    """Overlaps of the detections that both have: same class, overlap of at least half; each once, our best first."""
    overlap = box_iou(ours.boxes, theirs.boxes) * (ours.labels[:, None] == theirs.labels[None])
    for row in overlap:
        if row.numel() and row.max() >= _OVERLAP:
            yield float(row.max())
            overlap[:, row.argmax()] = 0


def _at_least(detections: Detections, score: float) -> Detections:
    chosen = detections.scores >= score
    return detections.map(lambda values: values[chosen])
