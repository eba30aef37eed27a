"""A detector on many videos, several at a time: one call of `Detector.step` for the next frame of each of them.

What comes out of a video does not depend on which others share its steps. Time does: the clock runs from when the
frames of a step are at hand, decoded and resized, until all its detections are there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.streams import StreamFrame, VideoStreams
from eventful_det.data.transforms import Image, to_tensor
from eventful_det.evaluation.detection import Entry, category_ids, coco_results
from eventful_det.evaluation.efficiency import peak_memory, reset_peak_memory
from eventful_det.evaluation.runs import Method, VideoRun
from eventful_det.gating.rows import Rows
from eventful_det.models.cost import FrameCost
from eventful_det.runtime.scene_cuts import SceneCuts

if TYPE_CHECKING:
    from torch import Tensor

    from eventful_det.gating.convert import Rule
    from eventful_det.models.detector import Detector, StepResult
    from eventful_det.models.roi_heads import Detections


def run_videos(
    detector: Detector,
    data: CocoVideo,
    method: Method,
    *,
    streams: int = 1,
    workers: int = 0,
    scene_cuts: bool = True,
    on_frame: Callable[[Method], None] | None = None,
) -> Iterator[VideoRun]:
    """Run a detector over whole videos in one way.

    Args:
        detector: in evaluation mode; its own rule does not matter.
        data: what to run on.
        method: the way.
        streams: videos that share a step.
        workers: threads that read frames ahead; on a CPU they take time from the detector.
        scene_cuts: recompute everything of a stream when another scene begins in it.
        on_frame: called for every frame.

    Yields:
        The run of each video, as soon as its last frame is done.

    Raises:
        UserError: the detector knows other classes than the data set, or a number is out of its range.
    """
    reset_peak_memory(detector.device)
    sides = detector.config.short_side, detector.config.long_side
    size = (round(method.scale * sides[0]), round(method.scale * sides[1]))
    driver = _Driver(detector, data, method, streams, scene_cuts)
    with closing(iter(VideoStreams(data, streams, size=size, workers=workers))) as batches:
        for batch in batches:
            driver.advance(batch)
            for item in batch:
                if on_frame is not None:
                    on_frame(method)
                if item.is_last:
                    yield driver.finish(item.slot)


@dataclass
class _Stream:
    """A video on its way.

    Attributes:
        video: all its frames.
        cuts: tells where scenes begin; None = nobody asks.
        frames, results, costs, latencies, skipped: of the frames so far, as in `VideoRun`.
        shape: of the last frame.
        found: on the last frame, in its pixels.
    """

    video: Video
    cuts: SceneCuts | None
    frames: list[Frame] = field(default_factory=list)
    results: list[Entry] = field(default_factory=list)
    costs: list[FrameCost] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    found: Detections | None = None

    def may_hold(self, image: Image, hold: int) -> bool:
        """Whether the boxes of the last frame may stand for this one, unless a scene begins."""
        return self.shape == image.shape and len(self.frames) % hold > 0

    def add(
        self, frame: Frame, categories: Sequence[int], found: Detections, cost: FrameCost, latency: float = 0.0
    ) -> None:
        """Record a frame. Numbers, not tensors, outlive it: they would fragment the heap."""
        self.found = found
        self.frames.append(frame)
        self.results += coco_results({frame.image_id: found}, categories)
        self.costs.append(cost)
        self.latencies.append(latency)


class _Due(NamedTuple):
    """A frame that the detector has to run on; `cut` = everything is recomputed."""

    slot: int
    frame: Frame
    image: Image
    resized: Image
    cut: bool


class _Driver:
    """Steps a detector through batches of frames; each slot has a stream."""

    def __init__(self, detector: Detector, data: CocoVideo, method: Method, streams: int, scene_cuts: bool) -> None:
        self.detector = detector.with_rule(_exact(method.rule))
        self.categories = category_ids(data, detector.names)
        self.hold, self.square, self.scene_cuts = method.hold, method.square, scene_cuts
        self.state = self.detector.init_state(streams)
        self.streams: dict[int, _Stream] = {}

    def advance(self, batch: Sequence[StreamFrame]) -> None:
        """Process the next frame of every stream."""
        due: list[_Due] = []
        for item in batch:
            if item.is_first:
                self.state.reset([item.slot])
                self.streams[item.slot] = _Stream(item.video, SceneCuts() if self.scene_cuts else None)
            stream = self.streams[item.slot]
            if item.image is None or item.resized is None:
                stream.skipped[item.frame.image_id] = item.fault
                continue
            cut = stream.cuts is not None and stream.cuts(item.image)
            if stream.found is not None and stream.may_hold(item.image, self.hold) and not cut:
                stream.add(item.frame, self.categories, stream.found, stream.costs[-1].idle())
            else:
                due.append(_Due(item.slot, item.frame, item.image, item.resized, cut))
            stream.shape = item.image.shape
        if due:
            self._step(due)

    def finish(self, slot: int) -> VideoRun:
        """The run of the video that has just ended."""
        stream = self.streams.pop(slot)
        return VideoRun(
            video=dataclasses.replace(stream.video, frames=stream.frames),
            results=stream.results,
            costs=stream.costs,
            latencies=stream.latencies,
            state_bytes=self.state.select([slot]).nbytes,
            peak_bytes=peak_memory(self.detector.device),
            skipped=stream.skipped,
        )

    def _step(self, due: Sequence[_Due]) -> None:
        slots = [frame.slot for frame in due]
        state = self.state.select(slots)
        began = time.perf_counter()
        inputs = [self._network_input(frame.resized) for frame in due]
        results = self.detector.step(inputs, state, [frame.cut for frame in due])
        found = [result.detections.to("cpu") for result in results]
        latency = time.perf_counter() - began
        for slot, remembered in zip(slots, state.streams, strict=True):
            self.state.streams[slot] = remembered
        for frame, objects, cost in zip(due, found, _shared(results, latency), strict=True):
            objects = _unpadded(objects, frame.resized) if self.square else objects
            (height, width), (h, w) = frame.image.shape[:2], frame.resized.shape[:2]
            objects = objects.scaled(width / w, height / h)
            self.streams[frame.slot].add(frame.frame, self.categories, objects, cost, latency)

    def _network_input(self, image: Image) -> Tensor:
        frame = to_tensor(image).to(self.detector.device)
        if not self.square:
            return frame
        side = max(frame.shape)
        canvas = self.detector.get_buffer("pixel_mean").expand(3, side, side).clone()
        canvas[:, : frame.shape[1], : frame.shape[2]] = frame
        return canvas


def _unpadded(found: Detections, image: Image) -> Detections:
    """Detections cut off where the padding of a square begins; those that lie in it whole are dropped."""
    boxes = found.boxes.clamp(max=found.boxes.new_tensor([image.shape[1], image.shape[0]] * 2))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return dataclasses.replace(found, boxes=boxes[inside], scores=found.scores[inside], labels=found.labels[inside])


def _shared(results: Sequence[StepResult], seconds: float) -> list[FrameCost]:
    """The costs of frames that shared a step: their times add up to that of the step."""
    told = sum(result.cost.latency for result in results)
    scale = seconds / told if told else 0.0
    return [
        dataclasses.replace(result.cost, seconds={part: scale * s for part, s in result.cost.seconds.items()})
        for result in results
    ]


def _exact(rule: Rule | None) -> Rule | None:
    """The rule, with results that do not depend by a bit on how many videos share a step."""
    return dataclasses.replace(rule, exact=True) if isinstance(rule, Rows) else rule
