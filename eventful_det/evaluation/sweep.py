"""One detector, many ways to run it, on the same videos: what average precision is kept at which cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import category_ids
from eventful_det.evaluation.runs import Method, MethodRun, VideoRun
from eventful_det.evaluation.store import MemoryStore, Store
from eventful_det.evaluation.streaming import run_videos

if TYPE_CHECKING:
    from eventful_det.models.detector import Detector

_WARM_UP = 2  # frames run before anything is timed: one flush, one update
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
    detector: Detector, data: CocoVideo, methods: Sequence[Method], *, store: Store | None = None, **options: Any
) -> list[MethodRun]:
    """Run a detector over whole videos in several ways, and hold all results in memory.

    Args:
        detector: the weights; its own rule does not matter.
        data: what to run on.
        methods: the ways.
        store: what it holds is not run again; what is run is kept in it.
        options: as in `complete`.

    Raises:
        UserError: not one frame can be read, or the detector knows other classes.
    """
    store = MemoryStore() if store is None else store
    complete(detector, data, methods, store, **options)
    return [collect(store, method, data) for method in methods]


def run_method(detector: Detector, data: CocoVideo, method: Method, **options: Any) -> MethodRun:
    """Run a detector over whole videos in one way; options as in `run_methods`."""
    return run_methods(detector, data, [method], **options)[0]


def complete(
    detector: Detector,
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
        detector: the weights; its own rule does not matter.
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
    options: dict[str, Any] = {"streams": streams, "workers": workers, "scene_cuts": scene_cuts}
    training = detector.training
    detector.eval()
    try:
        missing = [_missing(data, method, store) for method in methods]
        for method, videos in zip(methods, missing, strict=True):
            if videos:
                list(run_videos(detector, first(data, streams, _WARM_UP), method, **options))
        for turn in _turns(data, streams):
            for method, videos in zip(methods, missing, strict=True):
                if on_frame is not None:
                    for _ in range(sum(len(video.frames) for video in turn if video.id not in videos)):
                        on_frame(method)
                due = CocoVideo(data.categories, [v for v in turn if v.id in videos], data.image_root)
                for run in run_videos(detector, due, method, on_frame=on_frame, **options):
                    store.save(method, run)
    finally:
        detector.train(training)


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
