"""Live streams: every frame gets boxes at once, however slow the detector is."""

from __future__ import annotations

import threading
import time

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
from eventful_det.runtime.live import LiveBoxes
from eventful_det.runtime.session import StreamResult

Image = NDArray[np.uint8]


def answer(x: float, image: Image) -> StreamResult:
    box = torch.tensor([[x, 80.0, x + 60, 140.0]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([0]))
    cost = FrameCost({"backbone": 5}, {"backbone": 9}, 1, 4, False)
    return StreamResult(found, ("square",), 0, None, cost, torch.ones(2, 2), (8, 8), image)


class Slow:
    """A detector that answers when it may; it knows where the square is by counting the frames."""

    def __init__(self, images: list[Image]) -> None:
        self.images, self.taken = images, list[int]()
        self.may = threading.Semaphore(1)

    def __call__(self, frame: VideoFrame, expected: Detections | None) -> StreamResult:
        self.may.acquire()
        index = next(i for i, image in enumerate(self.images) if image is frame.image)
        self.taken.append(index)
        return answer(100 + 3 * index, frame.image)


def test_frames_do_not_wait_and_answers_are_moved_on() -> None:
    images = [scene(100 + 3 * i, 80, 60) for i in range(12)]
    detect = Slow(images)
    live = LiveBoxes(detect)
    results = [live.show(VideoFrame(image)) for image in images[:8]]
    assert [result.held for result in results] == [False] + [True] * 7, "the detector is busy with the second frame"
    assert [result.cost.total for result in results] == [5] + [0] * 7
    detect.may.release()
    assert live._working is not None
    live._working.result(5)
    late = live.show(VideoFrame(images[8]))
    assert not late.held and detect.taken == [0, 1], "an answer for the second frame, seven frames later"
    assert float(late.detections.boxes[0, 0]) == pytest.approx(124, abs=12), "is moved from 103 to the ninth"
    assert late.image is images[8] and late.frame_index == 8
    detect.may.release()
    live.close()


def test_another_scene_forgets_the_boxes_and_the_answer_of_the_last_one() -> None:
    images = [scene(100, 80, 60)] * 3 + [np.full((240, 400, 3), 200, np.uint8)] * 3
    detect = Slow(images)
    live = LiveBoxes(detect)
    for image in images[:3]:
        live.show(VideoFrame(image))
    cut = live.show(VideoFrame(images[3], resumed=True))
    assert len(cut.detections) == 0 and cut.held
    detect.may.release()
    assert live._working is not None
    live._working.result(5)
    assert len(live.show(VideoFrame(images[4])).detections) == 0, "the answer was for the scene before"
    detect.may.release(2)
    live.close()


def test_what_the_detector_raises_is_raised_where_frames_are_shown() -> None:
    def broken(frame: VideoFrame, expected: Detections | None) -> StreamResult:
        raise UserError("the network is gone")

    live = LiveBoxes(broken)
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
