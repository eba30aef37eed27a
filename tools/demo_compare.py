"""The dense detector beside a stream: for tools/demo.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from eventful_det.models.detector import Detector
from eventful_det.runtime.drift import Drift, compare
from eventful_det.runtime.rescoring import Rescorer
from eventful_det.runtime.stream import StreamResult


class Comparison:
    """The dense detector beside the stream, on the same frames."""

    def __init__(self, detector: Detector, show: float, rescore: bool, **options: Any) -> None:
        self.show = show
        self.images: deque[Any] = deque()
        stream = detector.with_rule(None).stream(self._feed(), **options)
        self.dense = map(Rescorer(), stream) if rescore else stream
        self.total = Drift()
        self.ratios: list[float] = []

    def _feed(self) -> Iterator[Any]:
        while True:
            yield self.images.popleft()

    def add(self, result: StreamResult) -> None:
        """Run the dense detector on a frame and compare."""
        self.images.append(result.image)
        dense = next(self.dense)
        self.total += compare(result.detections, dense.detections, dense.cost.latency, self.show)
        if result.cost.latency and not result.cost.flush:
            self.ratios.append(dense.cost.latency / result.cost.latency)

    def summary(self) -> dict[str, Any]:
        """F1 of our detections with the dense ones as truth; how many times faster a frame is, flushes excluded."""
        return {
            "agreement_f1": self.total.agreement,
            "detections": self.total.ours,
            "dense_detections": self.total.dense,
            "times_faster_median": float(np.median(self.ratios)) if self.ratios else None,
        }
