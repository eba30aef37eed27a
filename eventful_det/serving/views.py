"""What viewers see of one stream: its latest frame and what the last ones cost."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.video.transforms import resize
from eventful_det.detectors.results import FrameCost
from eventful_det.recognition.session import RecognitionResult
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.session import StreamResult

AnyResult = StreamResult | RecognitionResult
AnyPool = StreamPool[StreamResult] | StreamPool[RecognitionResult]
Follower = Callable[[StreamResult], StreamResult]
HISTORY = 160  # frames in a strip chart
_KEPT = 2  # frames: where boxes are held, two are done within milliseconds, before anybody could fetch the first
_LONGEST = 960  # side of the pictures that are sent, in pixels
_QUALITY = 82  # of their JPEG


@dataclass
class LatestFrame:
    """One frame as viewers get it.

    Attributes:
        number: of the frame in its stream, from 1.
        result: of the detector or recogniser.
        work, flush: of the last frame that was not held, by which this one's boxes were found.
    """

    number: int
    result: AnyResult
    work: Tensor
    flush: bool
    _jpeg: bytes | None = None
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def jpeg(self) -> bytes:
        """The frame without boxes; encoded once, when first asked for: frames that nobody sees cost nothing."""
        with self._encoding:
            if self._jpeg is None:
                self._jpeg = encode_jpeg(self.result.image)
            return self._jpeg


class CostSample(NamedTuple):
    """One frame in a strip chart: its number, when it was done (`time.monotonic`), what it cost."""

    number: int
    at: float
    cost: FrameCost


@dataclass
class StreamView:
    """One stream.

    Attributes:
        title: for people, for example the name of the file.
        release: called when the stream is gone; may be called again.
        followers: work over the detections, one after the other: steadier scores, ids.
        error: why the server gave the stream up.
        frames: the latest ones, oldest first.
        history: of the strip chart, oldest first.
    """

    title: str
    release: Callable[[], None]
    followers: Sequence[Follower] = ()
    error: str | None = None
    frames: deque[LatestFrame] = field(default_factory=lambda: deque(maxlen=_KEPT))
    history: deque[CostSample] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def newest(self) -> LatestFrame | None:
        """The latest frame."""
        return self.frames[-1] if self.frames else None

    def show(self, result: AnyResult) -> None:
        """Take in the next frame."""
        if isinstance(result, StreamResult):
            for follow in self.followers:
                result = follow(result)
        number, last = result.frame_index + 1, self.newest
        work, flush = (last.work, last.flush) if result.held and last else (result.work, result.cost.flush)
        self.frames.append(LatestFrame(number, result, work, flush))
        self.history.append(CostSample(number, time.monotonic(), result.cost))


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """An RGB image as JPEG, at most 960 pixels long."""
    scale = min(1.0, _LONGEST / max(image.shape[:2]))
    small = resize(image, *(max(1, round(side * scale)) for side in image.shape[:2]))
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1])
