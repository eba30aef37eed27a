"""How far gated detections drift from dense ones on the user's own video, without labels.

The dense detector runs beside the stream on every n-th frame, as its shadow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray
from torchvision.ops import box_iou

from eventful_det.detectors.protocol import InputTransform, S, VideoDetector
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.gating.dense import Dense

_OVERLAP = 0.5


@dataclass(frozen=True)
class Drift:
    """Sure detections of one frame or of many, beside those of the dense detector.

    Attributes:
        frames: that were compared.
        ours, dense: detections of each.
        both: detections that both have: of the same class, overlapping by half.
        overlap: sum of the intersections over unions of those.
        timed: frames among these that were timed; flushes are not.
        seconds, dense_seconds: that these took the stream and the dense detector.
    """

    frames: int = 0
    ours: int = 0
    dense: int = 0
    both: int = 0
    overlap: float = 0.0
    timed: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0

    def __add__(self, other: Drift) -> Drift:
        return Drift(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

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
            "dense_ms": 1e3 * self.dense_seconds / self.timed if self.timed else None,
            "times_faster": self.dense_seconds / self.seconds if self.seconds else None,
        }


class DriftMonitor(Generic[S]):
    """Runs the dense detector on every n-th frame of a stream and compares.

    Args:
        detector: of the stream.
        transform: makes its inputs.
        every: n >= 1. The first frame to be compared is the n-th.
        score: detections of at least this score are compared.

    Attributes:
        total: of all frames so far.
    """

    def __init__(self, detector: VideoDetector[S], transform: InputTransform, every: int, score: float) -> None:
        self._detector, self._transform, self._every, self._score = detector, transform, every, score
        self.total = Drift()

    def compare(self, index: int, image: NDArray[np.uint8], detections: Detections, cost: FrameCost) -> Drift | None:
        """Compare a frame if it is one of those.

        Args:
            index: of the frame, from 0.
            image: `(h, w, 3)` the frame.
            detections: of the stream, in pixels of the frame.
            cost: of the frame in the stream.
        """
        if (index + 1) % self._every:
            return None
        frame = self._transform(image).to(self._detector.device)
        state = self._detector.init_state()
        (step,) = self._detector.step([frame], state, rule=Dense(), timing=bool(cost.seconds))
        drift = compare(detections, self._transform.restore(step.detections, image), self._score)
        if cost.seconds and not cost.flush:
            drift = dataclasses.replace(drift, timed=1, seconds=cost.latency, dense_seconds=step.cost.latency)
        self.total += drift
        return drift


def compare(ours: Detections, dense: Detections, score: float) -> Drift:
    """Compare the detections of one frame whose score is at least `score`."""
    ours, dense = _at_least(ours, score), _at_least(dense, score)
    overlaps = list(matches(ours, dense))
    return Drift(1, len(ours), len(dense), len(overlaps), sum(overlaps))


def matches(ours: Detections, theirs: Detections) -> Iterable[float]:
    """Overlaps of the detections that both have: same class, overlap of at least half; each once, our best first."""
    overlap = box_iou(ours.boxes, theirs.boxes) * (ours.labels[:, None] == theirs.labels[None])
    for row in overlap:
        if row.numel() and row.max() >= _OVERLAP:
            yield float(row.max())
            overlap[:, row.argmax()] = 0


def _at_least(detections: Detections, score: float) -> Detections:
    return detections[detections.scores >= score]
