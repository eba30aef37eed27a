"""One detector, many ways to run it, on the same videos: what average precision is kept at which cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eventful_det.data.coco_video import CocoVideo, Video
from eventful_det.data.pictures import read_image
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import (
    DetectionScores,
    Entry,
    category_ids,
    coco_results,
    evaluate,
)
from eventful_det.evaluation.efficiency import Efficiency, peak_memory, reset_peak_memory, summarise
from eventful_det.evaluation.flushes import frames_since_flush
from eventful_det.evaluation.ilsvrc import VidScores, vid_scores
from eventful_det.evaluation.store import SESSION, ResultStore

if TYPE_CHECKING:
    from eventful_det.gating.convert import Rule
    from eventful_det.models.cost import FrameCost
    from eventful_det.models.detector import Detector
    from eventful_det.models.regions import Detections

DENSE = "dense"  # the curve that all others are compared with
_WARM_UP = 2  # frames run before anything is timed: one flush, one update


@dataclass(frozen=True)
class Method:
    """A way to run a detector over video.

    Attributes:
        curve: methods of the same curve differ in `setting` only.
        setting: the budget or the like that the curve varies; None where there is nothing to vary.
        rule: how a frame's tokens are recomputed; None = dense.
        hold: run on every n-th frame only and hold its boxes in between.
        scale: of the network's input, relative to the model's own.
    """

    curve: str
    setting: float | None = None
    rule: Rule | None = None
    hold: int = 1
    scale: float = 1.0

    @property
    def name(self) -> str:
        """For people."""
        curve = self.curve.replace("_", " ")
        return curve if self.setting is None else f"{curve} {self.setting:g}"

    @property
    def is_dense(self) -> bool:
        """Whether this is the plain detector: what all others are compared with."""
        return self.rule is None and self.hold == 1 and self.scale == 1


@dataclass(frozen=True)
class VideoRun:
    """What a method did on one video.

    Attributes:
        video: its frames and their labels.
        results: detections on all its frames as a COCO results list.
        costs: frame by frame.
        state_bytes: remembered of the stream between frames.
        peak_bytes: largest memory while it ran (process or GPU).
        session: the process that ran it; times of different ones cannot be compared.
    """

    video: Video
    results: list[Entry]
    costs: list[FrameCost]
    state_bytes: int
    peak_bytes: int
    session: str = SESSION

    @property
    def seconds(self) -> float:
        """Time of all frames."""
        return sum(cost.latency for cost in self.costs)


@dataclass(frozen=True)
class MethodRun:
    """What a method did on a data set."""

    method: Method
    data: CocoVideo
    videos: list[VideoRun] = field(default_factory=list)

    @property
    def results(self) -> list[Entry]:
        """All detections as a COCO results list."""
        return [entry for run in self.videos for entry in run.results]

    @property
    def efficiency(self) -> Efficiency:
        """Of all frames of all videos."""
        return summarise([cost for run in self.videos for cost in run.costs])

    def scores(self, video: VideoRun | None = None) -> DetectionScores:
        """Average precision on all videos, or on one of them."""
        if video is None:
            return evaluate(self.data, self.results)
        alone = CocoVideo(self.data.categories, [video.video], self.data.image_root)
        return evaluate(alone, video.results)

    def vid_scores(self) -> VidScores:
        """Average precision as papers on ImageNet VID count it."""
        return vid_scores(self.data, self.results)

    def ages(self) -> dict[int, int]:
        """Frames since the last flush by image id."""
        ages: dict[int, int] = {}
        for run in self.videos:
            since = frames_since_flush(cost.flush for cost in run.costs)
            ages |= {frame.image_id: age for frame, age in zip(run.video.frames, since, strict=True)}
        return ages


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
    detector: Detector,
    data: CocoVideo,
    methods: Sequence[Method],
    *,
    scene_cuts: bool = True,
    on_frame: Callable[[Method], None] | None = None,
    store: ResultStore | None = None,
) -> list[MethodRun]:
    """Run a detector over whole videos in several ways.

    Every video begins a new stream. The methods take turns video by video, so that whatever else slows the machine
    down for a while slows all of them.

    Args:
        detector: the weights; its own rule does not matter.
        data: what to run on; images are read one at a time.
        methods: the ways.
        scene_cuts: recompute everything when another scene begins.
        on_frame: called after every frame of every method.
        store: what it holds is not run again; what is run is kept in it.

    Raises:
        UserError: an image cannot be read, or the detector knows other classes.
    """
    category_ids(data, detector.names)
    runs = [MethodRun(method, data) for method in methods]
    training = detector.training
    detector.eval()
    try:
        for method in methods:
            for video in first(data, 1, _WARM_UP).videos:
                if store is None or any(store.load(method, v) is None for v in data.videos):
                    _run_video(detector, data, video, method, scene_cuts, None)
        for video in data.videos:
            for run in runs:
                done = None if store is None else store.load(run.method, video)
                if done is None:
                    done = _run_video(detector, data, video, run.method, scene_cuts, on_frame)
                    if store is not None:
                        store.save(run.method, done)
                elif on_frame is not None:
                    for _ in video.frames:
                        on_frame(run.method)
                run.videos.append(done)
    finally:
        detector.train(training)
    return runs


def run_method(detector: Detector, data: CocoVideo, method: Method, **options: Any) -> MethodRun:
    """Run a detector over whole videos in one way; options as in `run_methods`."""
    return run_methods(detector, data, [method], **options)[0]


def _run_video(
    detector: Detector,
    data: CocoVideo,
    video: Video,
    method: Method,
    scene_cuts: bool,
    on_frame: Callable[[Method], None] | None,
) -> VideoRun:
    reset_peak_memory(detector.device)
    stream = detector.with_rule(method.rule).stream(
        (read_image(str(data.image_path(frame))) for frame in video.frames),
        short_side=round(method.scale * detector.config.short_side),
        long_side=round(method.scale * detector.config.long_side),
        scene_cuts=scene_cuts,
        hold=method.hold,
    )
    detections: dict[int, Detections] = {}
    costs: list[FrameCost] = []
    for frame, result in zip(video.frames, stream, strict=True):
        detections[frame.image_id] = result.detections.to("cpu")
        costs.append(result.cost)
        if on_frame is not None:
            on_frame(method)
    # Numbers, not tensors, outlive the video: small tensors kept among large short-lived ones fragment the heap.
    results = coco_results(detections, category_ids(data, detector.names))
    return VideoRun(video, results, costs, stream.state_bytes, peak_memory(detector.device))
