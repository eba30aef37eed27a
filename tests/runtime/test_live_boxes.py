"""Live streams: every frame gets boxes at once, however slow the detector is."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_box_motion import scene

from eventful_det.data.source import VideoFrame
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.runtime.live import Detect, DetectorThread, LiveBoxes
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.session import StreamResult

Image = NDArray[np.uint8]


def answer(x: float, image: Image) -> StreamResult:
    box = torch.tensor([[x, 80.0, x + 60, 140.0]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([0]))
    cost = FrameCost({"backbone": 5}, {"backbone": 9}, 1, 4, False)
    return StreamResult(
        detections=found,
        names=("square",),
        frame_index=0,
        timestamp=None,
        cost=cost,
        work=torch.ones(2, 2),
        token_size=(8, 8),
        image=image,
    )


class Slow:
    """A detector that answers when it may; it knows where the square is by counting the frames."""

    def __init__(self, images: list[Image]) -> None:
        self.images, self.taken, self.resumed = images, list[int](), list[bool]()
        self.may, self.waiting = threading.Semaphore(1), 0

    def __call__(self, frame: VideoFrame, expected: Detections | None) -> StreamResult:
        self.waiting += 1
        self.resumed.append(frame.resumed)
        self.may.acquire()
        index = next(i for i, image in enumerate(self.images) if image is frame.image)
        self.taken.append(index)
        return answer(100 + 3 * index, frame.image)


def show(live: LiveBoxes, image: Image, resumed: bool = False) -> StreamResult:
    result = live.show(VideoFrame(image, resumed=resumed))
    assert result is not None
    return result


def until_answered(live: LiveBoxes) -> None:
    deadline = time.monotonic() + 10
    while live._working and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not live._working


def until_taken(detect: Slow, count: int) -> None:
    deadline = time.monotonic() + 10
    while detect.waiting < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert detect.waiting == count


def test_frames_do_not_wait_and_answers_are_moved_on() -> None:
    images = [scene(100 + 3 * i, 80, 60) for i in range(12)]
    detect, thread = Slow(images), DetectorThread()
    live = LiveBoxes(detect, thread)
    results = [show(live, images[0]), show(live, images[1])]
    until_taken(detect, 2)
    results += [show(live, image) for image in images[2:8]]
    assert [result.held for result in results] == [False] + [True] * 7, "the detector is busy with the second frame"
    assert [result.cost.total for result in results] == [5] + [0] * 7
    detect.may.release()
    until_taken(detect, 3)
    late = show(live, images[8])
    assert not late.held and detect.taken[:2] == [0, 1], "an answer for the second frame, seven frames later"
    assert float(late.detections.boxes[0, 0]) == pytest.approx(124, abs=6), "is moved from 103 to the ninth"
    assert late.image is images[8] and late.frame_index == 8
    detect.may.release(9)
    thread.close()
    assert detect.taken[2] == 7, "the newest frame that was shown when the detector became idle"


def test_another_scene_forgets_the_boxes_and_the_answer_of_the_last_one() -> None:
    images = [scene(100, 80, 60)] * 3 + [np.full((240, 400, 3), 200, np.uint8)] * 3
    detect, thread = Slow(images), DetectorThread()
    live = LiveBoxes(detect, thread)
    show(live, images[0])
    show(live, images[1])
    until_taken(detect, 2)
    cut = show(live, images[3], resumed=True)
    assert len(cut.detections) == 0 and cut.held
    detect.may.release()
    until_taken(detect, 3)
    assert len(show(live, images[4]).detections) == 0, "the answer was for the scene before"
    detect.may.release(9)
    thread.close()
    assert detect.resumed == [False, False, True] + [False] * (len(detect.resumed) - 3)


def test_streams_of_a_detector_take_turns() -> None:
    images = [scene(100 + 3 * i, 80, 60) for i in range(12)]
    order: list[str] = []
    may, thread = threading.Semaphore(0), DetectorThread()

    def detector(name: str) -> Detect:
        def detect(frame: VideoFrame, expected: Detections | None) -> StreamResult:
            may.acquire()
            order.append(name)
            return answer(100, frame.image)

        return detect

    streams = [LiveBoxes(detector(name), thread) for name in "abc"]
    for image in images:
        for stream in streams:
            assert stream.show(VideoFrame(image), wait=False) is None, "nothing is known yet"
    for _ in range(3):
        may.release()
    for stream in streams:
        assert stream._answered.wait(10)
    assert order == ["a", "b", "c"]
    may.release(9)
    thread.close()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities are those of processes")
def test_the_detector_steps_back_for_those_who_show_frames() -> None:
    priorities: list[int] = []

    def detect(frame: VideoFrame, expected: Detections | None) -> StreamResult:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return answer(100, frame.image)

    before, thread = sys.getswitchinterval(), DetectorThread()
    show(LiveBoxes(detect, thread), scene(100, 80, 60))
    thread.close()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert own < priorities[0] or own == 19, "and nobody else does"
    assert sys.getswitchinterval() == before, "that belongs to the whole process"


def test_what_the_detector_raises_is_raised_where_frames_are_shown() -> None:
    def broken(frame: VideoFrame, expected: Detections | None) -> StreamResult:
        raise UserError("the network is gone")

    live = LiveBoxes(broken, DetectorThread())
    with pytest.raises(UserError, match="the network is gone"):
        live.show(VideoFrame(scene(100, 80, 60)))


def test_boxes_of_a_live_stream_are_young(tiny_detector: Detector) -> None:
    """A detector that takes 60 ms, a camera of 50 frames/s: half of the boxes are shown within 10 ms."""
    images = [frame.image for frame in render_video(SceneOptions(width=288, height=192, frames=60), index=1)]
    step = tiny_detector.step

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.06)
        return step(*args, **options)  # type: ignore[arg-type]

    tiny_detector.step = slow  # type: ignore[assignment, method-assign]
    shown: list[float] = []

    def camera() -> object:
        for image in images:
            time.sleep(0.02)
            shown.append(time.perf_counter())
            yield image

    ages, held = [], []
    for result in tiny_detector.stream(camera(), live=True):  # type: ignore[arg-type]
        ages.append(time.perf_counter() - shown[-1])
        held.append(result.held)
    assert len(ages) == 60 and 5 < held.count(False) < 40
    assert np.percentile(ages[1:], 50) < 0.01, "the first frame alone waits"
    with pytest.raises(UserError, match="leave hold"):
        tiny_detector.stream(images, live=True, hold=2)


def test_files_shorter_than_the_first_answer_are_answered_once(tiny_detector: Detector) -> None:
    """Each on its last frame; what the detector raises is told instead."""
    step, may = tiny_detector.step, threading.Event()

    def slow(*args: object, **options: object) -> object:
        may.wait(20)
        return step(*args, **options)  # type: ignore[arg-type]

    def failing(*args: object, **options: object) -> object:
        raise RuntimeError("broken")

    tiny_detector.step = slow  # type: ignore[assignment, method-assign]
    images = [np.full((96, 96, 3), i, np.uint8) for i in range(3)]
    with StreamPool(tiny_detector, live=True) as pool:
        names = [pool.add(images, live=False) for _ in range(2)]
        assert not any(pool.step() for _ in range(4)), "three frames and the end wait for nobody"
        may.set()
        shown = [result for round in pool for result in round]
        assert sorted(result.stream for result in shown) == sorted(names)
        assert all(not result.held and np.array_equal(result.image, images[-1]) for result in shown)

        tiny_detector.step = failing  # type: ignore[assignment, method-assign]
        failed = pool.add(images, live=False)
        assert not list(pool) and "RuntimeError: broken" in str(pool.metrics().streams[failed].error)


def test_streams_of_a_live_pool_do_not_wait_for_the_detector(tiny_detector: Detector) -> None:
    """Two cameras of 25 frames/s, a detector that takes 300 ms and more: frames are shown meanwhile."""
    options = SceneOptions(width=144, height=96, frames=20, cut_fraction=0)
    step, enough = tiny_detector.step, threading.Event()

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.3)
        return step(*args, **options)  # type: ignore[arg-type]

    tiny_detector.step = slow  # type: ignore[assignment, method-assign]

    def camera(index: int) -> Iterator[Image]:
        images = [frame.image for frame in render_video(options, index=index)]
        for i in range(1000):
            if enough.wait(0.04):
                return
            yield images[i % 20]

    results: dict[str, list[StreamResult]] = {"0": [], "1": []}
    with StreamPool(tiny_detector, live=True) as pool:
        for name in results:
            pool.add(camera(int(name)), name=name, live=True)
        for round in pool:
            for result in round:
                results[result.stream].append(result)
            if all([result.held for result in shown].count(False) >= 3 for shown in results.values()):
                enough.set()
        metrics = pool.metrics().streams
    for name, shown in results.items():
        held = [result.held for result in shown]
        assert held.count(False) >= 3 and held.count(True) > 4 and not held[0], "the first answer is waited for"
        age = metrics[name].age_p95
        assert age is not None and age < 0.3, "no frame waits for the detector"
        assert [result.frame_index for result in shown] == list(range(len(shown)))
    with pytest.raises(UserError, match="leave hold out"):
        StreamPool(tiny_detector, live=True, hold=2)
