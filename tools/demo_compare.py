"""The dense detector beside a stream: for tools/demo.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from eventful_det.models.detector import Detector
from eventful_det.models.regions import Detections
from eventful_det.runtime.drift import matches
from eventful_det.runtime.stream import StreamResult


class Comparison:
    """The dense detector beside the stream, on the same frames."""

    def __init__(self, detector: Detector, show: float, **options: Any) -> None:
        self.show = show
        self.images: deque[Any] = deque()
        self.dense = detector.with_rule(None).stream(self._feed(), **options)
        self.both = self.ours = self.theirs = 0
        self.ratios: list[float] = []

    def _feed(self) -> Iterator[Any]:
        while True:
            yield self.images.popleft()

    def add(self, result: StreamResult) -> None:
        """Run the dense detector on a frame and compare."""
        self.images.append(result.image)
        dense = next(self.dense)
        ours, theirs = [d.scores >= self.show for d in (result.detections, dense.detections)]
        self.both += len(list(matches(select(result.detections, ours), select(dense.detections, theirs))))
        self.ours, self.theirs = self.ours + int(ours.sum()), self.theirs + int(theirs.sum())
        if result.cost.latency and not result.cost.flush:
            self.ratios.append(dense.cost.latency / result.cost.latency)

    def summary(self) -> dict[str, Any]:
        """F1 of our detections with the dense ones as truth; how many times faster a frame is, flushes excluded."""
        found = self.ours + self.theirs
        return {
            "agreement_f1": 2 * self.both / found if found else None,
            "detections": self.ours,
            "dense_detections": self.theirs,
            "times_faster_median": float(np.median(self.ratios)) if self.ratios else None,
        }


def select(detections: Detections, chosen: Any) -> Detections:
    """Some of the detections."""
    return detections.map(lambda values: values[chosen])
