"""One detector, many ways to run it, on the same videos: what average precision is kept at which cost.

Several videos may share the steps of the detector. What comes out of a video does not depend on which others do. Time
does: the clock runs from when the frames of a step are at hand, decoded and resized, until all its detections are
there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Generic

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.source import VideoFrame
from eventful_det.data.streams import VideoStreams
from eventful_det.detectors.protocol import S, VideoDetector, exactly
from eventful_det.detectors.results import FrameCost
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import Entry, category_ids, coco_results
from eventful_det.evaluation.efficiency import peak_memory, reset_peak_memory
from eventful_det.evaluation.kalman import KalmanMover
from eventful_det.evaluation.sweep.runs import Method, MethodRun, Move, VideoRun
from eventful_det.evaluation.sweep.store import MemoryStore, Store
from eventful_det.gating.selector import Gmacs, Latency, Selector
from eventful_det.runtime.budget import selector_for
from eventful_det.runtime.control import Stepper
from eventful_det.runtime.motion.boxes import BoxMover
from eventful_det.runtime.motion.key_frames import hold_for
from eventful_det.runtime.session import KeyFrame, StreamResult, StreamSession

_WARM_UP = 2  # frames run before anything is timed: one flush, one update
MOVERS: dict[Move, Callable[[], BoxMover] | None] = {"flow": BoxMover, "kalman": KalmanMover, "none": None}
_TURN = 4  # videos per stream that a method runs before it is the turn of the next


def first(data: CocoVideo, videos: int | None = None, frames: int | None = None) -> CocoVideo:
    """The first so many videos of a data set that have frames, and the first so many frames of each; None = all.

    Raises:
        UserError: a number is not positive.
    """
    for what, count in (("videos", videos), ("frames", frames)):
        if count is not None and count < 1:
            raise UserError(f"the number of {what} must be at least 1, got {count}")
    filled = [video for video in data.videos if video.frames]
    kept = [dataclasses.replace(video, frames=video.frames[:frames]) for video in filled[:videos]]
    return CocoVideo(data.categories, kept, data.image_root)


def run_methods(
    detector: VideoDetector[S],
    data: CocoVideo,
    methods: Sequence[Method],
    *,
    store: Store | None = None,
    streams: int = 1,
    workers: int = 0,
    scene_cuts: bool = True,
    on_frame: Callable[[Method], None] | None = None,
) -> list[MethodRun]:
    """Run a detector over whole videos in several ways, and hold all results in memory; see `complete`.

    Raises:
        UserError: not one frame can be read, or the detector knows other classes.
    """
    store = MemoryStore() if store is None else store
    complete(detector, data, methods, store, streams=streams, workers=workers, scene_cuts=scene_cuts, on_frame=on_frame)
    return [collect(store, method, data) for method in methods]


def complete(
    detector: VideoDetector[S],
    data: CocoVideo,
    methods: Sequence[Method],
    store: Store,
    *,
    streams: int = 1,
    workers: int = 0,
    scene_cuts: bool = True,
    on_frame: Callable[[Method], None] | None = None,
) -> None:
    """Run a detector over whole videos in several ways, as far as that has not been done.

    Every video begins a new stream. The methods take turns, video by video or, with more than one stream, every few
    videos, so that whatever else slows the machine down for a while slows all of them.

    Args:
        detector: in evaluation mode.
        data: what to run on.
        methods: the ways.
        store: keeps the results. What it holds is not run again, unless frames were skipped that can be read now.
        streams: videos that share a step of the detector; results do not depend on it, times do.
        workers: threads that read frames ahead; on a CPU they take time from the detector.
        scene_cuts: recompute everything when another scene begins.
        on_frame: called after every frame of every method, those done before included.

    Raises:
        UserError: the detector knows other classes, or a number is out of its range.
    """
    category_ids(data, detector.names)
    if streams < 1:
        raise UserError(f"streams must be at least 1, got {streams}")

    def run(part: CocoVideo, method: Method, on_frame: Callable[[Method], None] | None) -> Iterator[VideoRun]:
        return run_videos(
            detector, part, method, streams=streams, workers=workers, scene_cuts=scene_cuts, on_frame=on_frame
        )

    missing = [_missing(data, method, store) for method in methods]
    for method, videos in zip(methods, missing, strict=True):
        if videos:
            list(run(first(data, streams, _WARM_UP), method, None))
    for turn in _turns(data, streams):
        for method, videos in zip(methods, missing, strict=True):
            if on_frame is not None:
                for _ in range(sum(len(video.frames) for video in turn if video.id not in videos)):
                    on_frame(method)
            due = CocoVideo(data.categories, [v for v in turn if v.id in videos], data.image_root)
            for done in run(due, method, on_frame):
                store.save(method, done)


def run_videos(
    detector: VideoDetector[S],
    data: CocoVideo,
    method: Method,
    *,
    streams: int = 1,
    workers: int = 0,
    scene_cuts: bool = True,
    on_frame: Callable[[Method], None] | None = None,
) -> Iterator[VideoRun]:
    """Run a detector over whole videos in one way; arguments as for `complete`.

    Yields:
        The run of each video, as soon as its last frame is done.

    Raises:
        UserError: the detector knows other classes than the data set, or a number is out of its range.
    """
    reset_peak_memory(detector.device)
    categories = category_ids(data, detector.names)
    transform = detector.input_transform.scaled(method.scale)
    if method.square:
        transform = transform.squared()
    selector = selector_for(method.budget)
    hold = hold_for(method.hold, method.rule)
    paid = hold is None and not isinstance(method.budget, Selector)  # frames are held as the budget demands
    if streams > 1 and ((paid and method.budget is not None) or isinstance(selector.budget, (Gmacs, Latency))):
        raise UserError(f"a budget of {selector.budget} is one of a step, which videos would share; set streams=1")
    stepper = Stepper(
        detector,
        rule=exactly(method.rule),
        budget=method.budget if paid else selector,
        options=None,
        timing=True,
    )
    running: dict[int, _Running[S]] = {}
    sides = (transform.short_side, transform.long_side)
    with closing(iter(VideoStreams(data, streams, size=sides, workers=workers))) as batches:
        for batch in batches:
            due: list[tuple[_Running[S], Frame, KeyFrame]] = []
            for item in batch:
                if item.is_first:
                    session = StreamSession(
                        detector, transform, scene_cuts=scene_cuts, hold=hold, mover=MOVERS[method.move]
                    )
                    running[item.slot] = _Running(item.video, session, categories)
                run = running[item.slot]
                if item.image is None:
                    run.skipped[item.frame.image_id] = item.fault
                    continue
                begun = run.session.begin(VideoFrame(item.image), resized=item.resized)
                if isinstance(begun, KeyFrame):
                    due.append((run, item.frame, begun))
                else:
                    run.add(item.frame, begun, begun.cost, begun.cost.latency)
            if due:
                began = time.perf_counter()
                results = stepper.step([(run.session, key) for run, _, key in due])
                results = [dataclasses.replace(one, detections=one.detections.to("cpu")) for one in results]
                latency = time.perf_counter() - began + sum(sum(key.seconds.values()) for _, _, key in due)
                for (run, frame, _), result, cost in zip(due, results, _shared(results, latency), strict=True):
                    run.add(frame, result, cost, latency)
            for item in batch:
                if on_frame is not None:
                    on_frame(method)
                if item.is_last:
                    yield running.pop(item.slot).finish()


class _Running(Generic[S]):
    """A video on its way. Numbers, not tensors, outlive a frame: they would fragment the heap."""

    def __init__(self, video: Video, session: StreamSession[S], categories: Sequence[int]) -> None:
        self.video, self.session, self.categories = video, session, categories
        self.frames: list[Frame] = []
        self.results: list[Entry] = []
        self.costs: list[FrameCost] = []
        self.latencies: list[float] = []
        self.skipped: dict[int, str] = {}

    def add(self, frame: Frame, result: StreamResult, cost: FrameCost, latency: float = 0.0) -> None:
        """Record a frame."""
        self.frames.append(frame)
        self.results += coco_results({frame.image_id: result.detections}, self.categories)
        self.costs.append(cost)
        self.latencies.append(latency)

    def finish(self) -> VideoRun:
        """What was done, after the last frame."""
        return VideoRun(
            video=dataclasses.replace(self.video, frames=self.frames),
            results=self.results,
            costs=self.costs,
            latencies=self.latencies,
            state_bytes=self.session.state.nbytes,
            peak_bytes=peak_memory(self.session.detector.device),
            skipped=self.skipped,
        )


def _shared(results: Sequence[StreamResult], seconds: float) -> list[FrameCost]:
    """The costs of frames that shared a step: their times add up to that of the step."""
    measured = sum(result.cost.latency for result in results)
    scale = seconds / measured if measured else 0.0
    return [
        dataclasses.replace(result.cost, seconds={part: scale * s for part, s in result.cost.seconds.items()})
        for result in results
    ]


def collect(store: Store, method: Method, data: CocoVideo) -> MethodRun:
    """What a method did on all videos of a data set, after `complete`.

    Raises:
        UserError: not one frame could be read.
    """
    kept = [store.load(method, video) for video in data.videos if video.frames]
    runs = [run for run in kept if run is not None]
    if len(runs) < len(kept):
        raise ValueError(f"{method.name} was run on {len(runs)} of {len(kept)} videos; call `complete` first")
    if not any(run.costs for run in runs):
        reasons = [reason for run in runs for reason in run.skipped.values()]
        raise UserError(f"no frame can be read; the first: {reasons[0]}" if reasons else "the data set has no frame")
    return MethodRun.of(method, data, runs)


def _turns(data: CocoVideo, streams: int) -> Iterator[list[Video]]:
    """Videos that a method runs before it is the turn of the next: like lengths together, so that streams stay busy."""
    videos, size = data.videos, 1
    if streams > 1:
        videos, size = sorted(videos, key=lambda video: -len(video.frames)), _TURN * streams
    for start in range(0, len(videos), size):
        yield list(videos[start : start + size])


def _missing(data: CocoVideo, method: Method, store: Store) -> set[int]:
    """Ids of the videos that a method has still to run."""
    with FrameReader(data) as reader:
        return {v.id for v in data.videos if v.frames and not _is_done(v, store.load(method, v), reader)}


def _is_done(video: Video, run: VideoRun | None, reader: FrameReader) -> bool:
    """Whether a video was run, and none of the frames that were skipped then can be read now."""
    if run is None:
        return False
    skipped = dataclasses.replace(video, frames=[f for f in video.frames if f.image_id in run.skipped])
    return not any(_can_read(reader, skipped, frame) for frame in skipped.frames)


def _can_read(reader: FrameReader, video: Video, frame: Frame) -> bool:
    try:
        reader.read(video, frame)
    except UserError:
        return False
    return True
