"""Boxes for every frame of a camera at once, while the detector works in a thread, at its own pace.

A frame gets the boxes that were known before, moved to it, which takes a few milliseconds. Whenever the detector is
idle it takes the newest frame, of several cameras that of the one that waits longest. Its answer is moved on through
the frames that came meanwhile, in the same thread, and replaces the boxes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from eventful_det.data.source import VideoFrame
from eventful_det.detectors.protocol import S
from eventful_det.detectors.results import Detections, StepResult
from eventful_det.runtime.control import NetworkStepper
from eventful_det.runtime.motion.boxes import EVERY_ID, BoxMover, View
from eventful_det.runtime.scene_cuts import SceneCuts
from eventful_det.runtime.session import KeyFrame, StreamResult, StreamSession

_NICE = 5  # steps of priority below the thread that shows frames

Detect = Callable[[VideoFrame, Detections | None], StreamResult]
"""Runs the detector on a frame, on which objects are expected in these boxes (pixels of the frame)."""


def detector_of(stepper: NetworkStepper[S, StepResult, StreamResult], session: StreamSession[S]) -> Detect:
    """The steps of a stream, whose session holds no frames and moves no boxes by itself."""

    def detect(frame: VideoFrame, expected: Detections | None) -> StreamResult:
        key = session.begin(frame)
        assert isinstance(key, KeyFrame)
        if expected is not None:
            key = dataclasses.replace(key, expected=session.as_input(expected, frame.image))
        (result,) = stepper.step([(session, key)])
        return result

    return detect


def _step_back() -> None:
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, priority + _NICE))


class DetectorThread:
    """Works for one or more streams in turn; each waits at most once.

    It steps back where frames are shown: on Linux the thread has a lower priority, the threads of its own included.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "detector", initializer=_step_back)
        self._lock = threading.Lock()
        self._waiting: deque[LiveBoxes] = deque()
        self._busy = False

    def ask(self, boxes: LiveBoxes) -> None:
        """Have the detector look at the newest frame of a stream, when it is its turn."""
        with self._lock:
            if boxes not in self._waiting:
                self._waiting.append(boxes)
            if not self._busy:
                self._busy = True
                self._thread.submit(self._run)

    def close(self) -> None:
        """Wait for the detector's last answer."""
        with self._lock:
            self._waiting.clear()
        self._thread.shutdown()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                boxes = self._waiting.popleft()
            boxes.detect()


class LiveBoxes:
    """The frames of one live stream, in order, and boxes for each of them.

    Args:
        detect: called in the thread, one frame after the other.
        thread: of the detector.
        scene_cuts: forget the boxes when another scene begins.
        track: give all objects ids, the unsure as well.
    """

    def __init__(self, detect: Detect, thread: DetectorThread, scene_cuts: bool = True, track: bool = False) -> None:
        self._detect, self.thread = detect, thread
        self._cuts = SceneCuts() if scene_cuts else None
        self._size = (0, 0)  # of the last frame
        self._frames = 0  # that were shown
        self._unshown: tuple[VideoFrame, int] | None = None  # the last frame, while the first answer is awaited
        self._answered = threading.Event()  # or failed
        self._lock = threading.Lock()  # for what follows, which both threads use; never held while the detector works
        self._mover = BoxMover(EVERY_ID if track else None)
        self._newest: VideoFrame | None = None  # that the detector has not taken
        self._since: deque[View] = deque()  # frames behind the one that the detector works on
        self._working = False
        self._scene = 0
        self._anew = False  # another scene began since the detector took its last frame
        self._last: StreamResult | None = None  # the detector's last answer
        self._fresh = False  # it has not been shown
        self._error: BaseException | None = None

    def show(self, frame: VideoFrame, dropped: int = 0, wait: bool = True) -> StreamResult | None:
        """The boxes on the next frame.

        Where the detector has answered since the frame before, the result's cost is that of the answer, and `held` is
        false.

        Args:
            frame: of the source.
            dropped: frames that were overtaken so far.
            wait: for the detector's very first answer.

        Returns:
            The result; None before the first answer.
        """
        began = time.perf_counter()
        size = frame.image.shape[0], frame.image.shape[1]
        cut = (self._cuts is not None and self._cuts(frame.image)) or frame.resumed
        cut, self._size = self._size != (0, 0) and (cut or self._size != size), size
        view = self._mover.view(frame.image)
        with self._lock:
            if cut:  # whatever the detector says of the scene before does not count
                self._mover.forget()
                self._scene, self._anew = self._scene + 1, True
            self._mover.follow(view)
            if self._working:
                self._since.append(view)
            self._newest = frame
        self.thread.ask(self)
        if wait:
            self._answered.wait()
        return self._shown(frame, dropped, began)

    def late(self) -> StreamResult | None:
        """The last frame of a source that ended before the first answer; None until that is there.

        Raises:
            StopIteration: it was shown.
        """
        if self._unshown is None:
            raise StopIteration
        return self._shown(*self._unshown, time.perf_counter()) if self._answered.is_set() else None

    def _shown(self, frame: VideoFrame, dropped: int, began: float) -> StreamResult | None:
        """The boxes that are known by now on the last frame; None before the first answer."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._unshown = (frame, dropped) if self._last is None else None
            if self._last is None:
                return None
            last, fresh, self._fresh = self._last, self._fresh, False
            detections = self._mover.boxes() if self._mover.following else last.detections[:0]
        self._frames += 1
        moving = {"motion": time.perf_counter() - began}
        return dataclasses.replace(
            last,
            detections=detections,
            frame_index=self._frames - 1,
            timestamp=frame.timestamp,
            cost=last.cost if fresh else dataclasses.replace(last.cost.idle(), seconds=moving),
            work=last.work if fresh else torch.zeros_like(last.work),
            image=frame.image,
            held=not fresh,
            frame_age=frame.age,
            dropped=dropped,
        )

    def detect(self) -> None:
        """In the thread: detect in the newest frame, then catch up with those that came meanwhile."""
        with self._lock:
            frame, self._newest = self._newest, None
            if frame is None or self._error is not None:
                return
            frame, self._anew = dataclasses.replace(frame, resumed=self._anew or frame.resumed), False
            mover, scene, self._working = self._mover.fork(), self._scene, True
            self._since.clear()
        try:
            result = self._detect(frame, mover.boxes() if mover.following else None)
            mover.key(result.detections)
            self._catch_up(mover, scene, result)
        except BaseException as error:  # raised where frames are shown
            self._error = error
        self._answered.set()

    def _catch_up(self, mover: BoxMover, scene: int, result: StreamResult) -> None:
        """Move an answer on through the frames that came meanwhile; of a scene that is over it hardly counts."""
        while True:
            with self._lock:
                if scene != self._scene or not self._since:
                    self._working = False
                    if scene == self._scene:
                        self._mover = mover
                    if scene == self._scene or self._last is None:
                        self._last, self._fresh = result, True
                    return
                view = self._since.popleft()
            mover.follow(view)
