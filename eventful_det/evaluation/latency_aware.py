"""Latency-aware average precision (streaming AP; Li, Wang, Ramanan, ECCV 2020): what is known when a frame arrives.

Frames arrive at the pace of a clock. The detector takes the newest whenever it is idle, and its answer counts from the
moment it is there, by the seconds that it was measured to take. At every arrival the boxes known at that moment are
compared with the labels of the frame that arrives. Boxes stand still between answers, or move with their objects, as
they do in a live stream (`eventful_det.runtime.live`): then they have been moved to the frame before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eventful_det.data.coco_video import CocoVideo
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.source import VideoFrame
from eventful_det.data.video.transforms import Image
from eventful_det.detectors.protocol import S, VideoDetector
from eventful_det.detectors.results import Detections
from eventful_det.evaluation.detection import Entry, category_ids, coco_results, evaluate
from eventful_det.evaluation.sweep.runs import Method
from eventful_det.outputs import markdown_table
from eventful_det.runtime.control import Stepper
from eventful_det.runtime.motion.boxes import BoxMover
from eventful_det.runtime.session import KeyFrame, StreamSession

_TICK = 1e-9  # seconds that rounding may take

Look = Callable[[Image], tuple[Detections, float]]
"""Detects in the next frame that it is given, and tells how many seconds that took."""


@dataclass(frozen=True)
class LatencyRow:
    """A way to watch, at a frame rate.

    Attributes:
        method: the detector; moved: boxes move between its answers.
        fps: frames that arrive per second.
        sap, sap50: average precision of what is known when frames arrive, over all overlaps and at 0.5.
        ms: median milliseconds of an answer.
        answered: share of the frames that the detector took.
    """

    method: str
    moved: bool
    fps: float
    sap: float
    sap50: float
    ms: float
    answered: float


def watch(images: Sequence[Image], fps: float, look: Look, move: bool) -> tuple[list[Detections | None], list[float]]:
    """Let a detector watch a video at the pace of its clock.

    Args:
        images: the frames.
        fps: how many of them arrive per second.
        look: the detector.
        move: move boxes between its answers.

    Returns:
        What is known when each frame arrives, None before the first answer; the seconds of each answer.
    """
    known: list[Detections | None] = []
    seconds: list[float] = []
    mover = BoxMover()
    waiting: tuple[float, int, Detections, BoxMover] | None = None  # when it will be there, frame, answer, boxes then
    current: Detections | None = None
    taken, free = -1, 0.0
    for i in range(len(images)):
        now = i / fps
        if i and move:
            mover.move(images[i - 1])
        while True:
            if waiting is not None and waiting[0] <= now + _TICK:
                free, frame, current, then = waiting
                waiting = None
                if move:  # through the frames that came meanwhile
                    then.key(current)
                    for image in images[frame + 1 : i]:
                        then.move(image)
                    mover = then
            if waiting is not None or taken >= i - 1:
                break
            taken = i - 1
            found, took = look(images[taken])
            seconds.append(took)
            waiting = max(free, taken / fps) + took, taken, found, mover.fork()
        known.append(mover.boxes() if move and mover.following else current)
    return known, seconds


def detector_look(detector: VideoDetector[S], method: Method) -> Look:
    """A detector and the way it runs, for one video."""
    session = StreamSession(detector, detector.input_transform.scaled(method.scale))
    stepper = Stepper(detector, rule=method.rule, budget=method.budget, options=None, timing=True)

    def look(image: Image) -> tuple[Detections, float]:
        began = time.perf_counter()
        key = session.begin(VideoFrame(image))
        assert isinstance(key, KeyFrame)
        (result,) = stepper.step([(session, key)])
        return result.detections.to("cpu"), time.perf_counter() - began

    return look


def latency_aware(
    data: CocoVideo, names: Sequence[str], method: str, fps: float, new_look: Callable[[], Look], move: bool
) -> LatencyRow:
    """Latency-aware average precision on whole videos, whose frames are held in memory one video at a time.

    Args:
        data: the videos.
        names: class names of the detections.
        method: for people.
        fps: frames that arrive per second.
        new_look: makes the detector, for every video anew.
        move: move boxes between answers.
    """
    categories = category_ids(data, names)
    results: list[Entry] = []
    seconds: list[float] = []
    frames = 0
    with FrameReader(data) as reader:
        for video in data.videos:
            images = [reader.read(video, frame) for frame in video.frames]
            known, took = watch(images, fps, new_look(), move)
            by_image = {f.image_id: d for f, d in zip(video.frames, known, strict=True) if d is not None}
            results += coco_results(by_image, categories)
            seconds += took
            frames += len(images)
    scores = evaluate(data, results)
    ms = 1e3 * statistics.median(seconds)
    return LatencyRow(method, move, fps, scores.ap, scores.ap50, ms, len(seconds) / frames)


def markdown(rows: Sequence[LatencyRow]) -> str:
    """The rows as a Markdown table; precisions in percent."""
    lines = []
    for row in rows:
        name = f"{row.method}, moved" if row.moved else row.method
        precisions = (f"{100 * value:.1f}" for value in (row.sap50, row.sap))
        lines.append([name, f"{row.fps:g}", *precisions, f"{row.ms:.1f}", f"{100 * row.answered:.0f}"])
    return markdown_table([("method", "frames/s", "sAP50", "sAP", "ms", "answered %"), *lines])
