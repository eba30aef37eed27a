"""Boxes for every frame of a camera at once, while the detector works in a thread, at its own pace.

A frame gets the boxes that were known before, moved to it, which takes a few milliseconds. Whenever the detector is
idle it takes the present frame; when its answer comes, the answer is moved on through the frames that came meanwhile,
in the same thread, and replaces the boxes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from eventful_det.data.source import VideoFrame
from eventful_det.detectors.results import Detections
from eventful_det.runtime.motion import BoxMover
from eventful_det.runtime.scene_cuts import SceneCuts
from eventful_det.runtime.session import StreamResult

Detect = Callable[[VideoFrame, Detections | None], StreamResult]
"""Runs the detector on a frame, on which objects are expected in these boxes (pixels of the frame)."""


class LiveBoxes:
    """The frames of one live stream, in order, and boxes for each of them.

    Args:
        detect: called in a thread, one frame after the other.
        scene_cuts: forget the boxes when another scene begins.
    """

    def __init__(self, detect: Detect, scene_cuts: bool = True) -> None:
        self._detect = detect
        self._cuts = SceneCuts() if scene_cuts else None
        self._mover = BoxMover()
        self._thread = ThreadPoolExecutor(1, "detector")
        self._lock = threading.Lock()  # for what follows, which both threads use
        self._since: deque[NDArray[np.uint8]] = deque()  # frames behind the one that the detector works on
        self._answer: tuple[BoxMover, StreamResult] | None = None
        self._scene = 0
        self._working: Future[None] | None = None
        self._last: StreamResult | None = None  # the detector's last answer
        self._frames = 0
        self._anew = False  # another scene began since the detector took its last frame

    def show(self, frame: VideoFrame, dropped: int = 0) -> StreamResult:
        """The boxes on the next frame. Only the first frame waits for the detector.

        Where the detector has answered since the frame before, the result's cost is that of the answer, and `held` is
        false.

        Args:
            frame: of the source.
            dropped: frames that were overtaken so far.
        """
        began = time.perf_counter()
        cut = (self._cuts is not None and self._cuts(frame.image)) or frame.resumed
        if cut or (self._last is not None and self._last.image.shape != frame.image.shape):
            self._begin_scene()
        answer = self._take(frame.image)
        self._mover.move(frame.image)
        if self._working is None:
            self._hand_out(frame)
            if self._last is None:
                assert self._working is not None
                self._working.result()
                answer = self._take(frame.image)
                self._mover.move(frame.image)
        assert self._last is not None
        cost = self._last.cost if answer else self._last.cost.idle()
        moving = {"motion": time.perf_counter() - began}
        self._frames += 1
        return dataclasses.replace(
            self._last,
            detections=self._mover.boxes() if self._mover.following else _nothing(self._last.detections),
            frame_index=self._frames - 1,
            timestamp=frame.timestamp,
            cost=cost if answer else dataclasses.replace(cost, seconds=moving),
            work=self._last.work if answer else torch.zeros_like(self._last.work),
            image=frame.image,
            held=not answer,
            frame_age=frame.age,
            dropped=dropped,
        )

    def close(self) -> None:
        """Wait for the detector's last answer."""
        self._thread.shutdown()

    def _begin_scene(self) -> None:
        self._mover.forget()
        self._anew = True
        with self._lock:  # whatever the detector says of the scene before does not count
            self._scene += 1

    def _take(self, image: NDArray[np.uint8]) -> bool:
        """Go over to the detector's answer if it is there, otherwise have it moved on to this frame; whether it is."""
        with self._lock:
            answer, self._answer = self._answer, None
            if answer is None and self._working is not None and not self._working.done():
                self._since.append(image)
                return False
        if self._working is not None and self._working.done():
            working, self._working = self._working, None
            working.result()  # raises what the detector raised
        if answer is None:
            return False
        self._mover, self._last = answer
        return True

    def _hand_out(self, frame: VideoFrame) -> None:
        """Have the detector begin with a frame, to which the boxes have been moved."""
        frame, self._anew = dataclasses.replace(frame, resumed=self._anew or frame.resumed), False
        self._since.clear()
        self._working = self._thread.submit(self._work, frame, self._mover.fork(), self._scene)

    def _work(self, frame: VideoFrame, mover: BoxMover, scene: int) -> None:
        """In the thread: detect, then catch up with the frames that came meanwhile."""
        result = self._detect(frame, mover.boxes() if mover.following else None)
        mover.key(result.detections)
        while True:
            with self._lock:
                if scene != self._scene and self._last is not None:
                    return
                if not self._since:
                    self._answer = mover, result
                    return
                image = self._since.popleft()
            mover.move(image)


def _nothing(like: Detections) -> Detections:
    return like.map(lambda values: values[:0])
