"""What viewers want to know of one stream: its newest frame, its last costs, its sums."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.transforms import resize
from eventful_det.models.cost import FrameCost
from eventful_det.runtime.tracking import Tracker
from eventful_det.serving.pool import PoolResult

HISTORY = 240  # frames in a strip chart
_RECENT = 2.0  # seconds over which rates and means are taken
_LONGEST = 960  # side of the pictures that are sent, in pixels
_QUALITY = 82  # of their JPEG


@dataclass(frozen=True)
class Shot:
    """One frame of a stream as viewers get it.

    Attributes:
        sequence: counts the frames that were detected in, from 1.
        result: of the detector.
    """

    sequence: int
    result: PoolResult

    @cached_property
    def jpeg(self) -> bytes:
        """The frame without boxes; encoded when first asked for, so that frames nobody sees cost nothing."""
        return encode_jpeg(self.result.image)


class Mark(NamedTuple):
    """One frame in a strip chart: its sequence number, when it was done (`time.monotonic`), what it cost."""

    sequence: int
    at: float
    cost: FrameCost


@dataclass(frozen=True)
class Totals:
    """Sums since a stream began: frames, flushes, MACs, those of the dense detector, seconds of the detector."""

    frames: int = 0
    flushes: int = 0
    macs: int = 0
    dense_macs: int = 0
    seconds: float = 0.0

    def plus(self, cost: FrameCost) -> Totals:
        """With one more frame."""
        return Totals(
            self.frames + 1,
            self.flushes + cost.flush,
            self.macs + cost.total,
            self.dense_macs + cost.dense_total,
            self.seconds + cost.latency,
        )


@dataclass
class Channel:
    """One stream.

    Attributes:
        name: unique.
        title: for people, for example the name of the file.
        release: called when the stream is gone; may be called again.
        tracker: gives objects ids.
        status: "starting", "running", "ended" or "failed".
        error: why it failed.
        newest: the newest frame.
        history: of the strip chart, oldest first.
        totals: since the stream began.
    """

    name: str
    title: str
    release: Callable[[], None]
    tracker: Tracker | None = None
    status: str = "starting"
    error: str | None = None
    newest: Shot | None = None
    history: deque[Mark] = field(default_factory=lambda: deque(maxlen=HISTORY))
    totals: Totals = Totals()

    def show(self, result: PoolResult) -> None:
        """Take in the next frame."""
        if self.tracker is not None:
            result = replace(result, detections=self.tracker(result).detections)
        self.totals = self.totals.plus(result.cost)
        self.newest = Shot(self.totals.frames, result)
        self.history.append(Mark(self.totals.frames, time.monotonic(), result.cost))
        self.status = "running"

    def end(self, error: str | None) -> None:
        """There will be no more frames."""
        self.status, self.error = "ended" if error is None else "failed", error
        self.release()

    def recent(self) -> list[Mark]:
        """The frames of the last two seconds, at least one where there is any."""
        since = time.monotonic() - _RECENT
        return [mark for mark in self.history if mark.at >= since] or list(self.history)[-1:]


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """An RGB image as JPEG, at most 960 pixels long."""
    scale = min(1.0, _LONGEST / max(image.shape[:2]))
    small = resize(image, *(max(1, round(side * scale)) for side in image.shape[:2]))
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1])
