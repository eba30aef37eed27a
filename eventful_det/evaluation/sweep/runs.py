"""Records of an evaluation: a way to run a detector, and what it did on a video and on a data set."""

from __future__ import annotations

import dataclasses
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eventful_det.data.coco_video import CocoVideo, Video
from eventful_det.detectors.protocol import AnyRule
from eventful_det.detectors.results import FrameCost
from eventful_det.evaluation.detection import DetectionScores, Entry, detections_of, evaluate
from eventful_det.evaluation.efficiency import Efficiency, summarise
from eventful_det.evaluation.flushes import frames_since_flush
from eventful_det.evaluation.ilsvrc import VidScores, vid_scores
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import Budget, Selector
from eventful_det.runtime.motion.key_frames import Hold
from eventful_det.runtime.rescoring import Objects, Rescoring, rescore

DENSE = "dense"  # the curve that all others are compared with
Move = Literal["flow", "kalman", "none"]
"""How boxes move between key frames."""
SESSION = uuid.uuid4().hex  # of this process; times are compared only within one


@dataclass(frozen=True)
class Method:
    """A way to run a detector over video.

    Attributes:
        curve: methods of the same curve differ in `setting` only.
        setting: the budget or the like that the curve varies; None where there is nothing to vary.
        rule: how a frame's tokens are recomputed.
        budget: as for a stream, which every video has for itself.
        hold: run on every n-th frame only, or as `KeyFrames` say, and move its boxes in between; None = the default.
        move: by the image, at constant velocity, or not at all.
        scale: of the network's input, relative to the model's own.
        square: frames are padded to a square, as the official code of Eventful Transformers does.
    """

    curve: str
    setting: float | None = None
    rule: AnyRule = Dense()
    budget: Budget | Selector = None
    hold: Hold = 1
    move: Move = "flow"
    scale: float = 1.0
    square: bool = False

    @property
    def name(self) -> str:
        """For people."""
        curve = self.curve.replace("_", " ")
        return curve if self.setting is None else f"{curve} {self.setting:g}"

    @property
    def is_dense(self) -> bool:
        """Whether this is the plain detector: what all others are compared with."""
        return self.rule == Dense() and self.hold in (None, 1) and self.scale == 1 and not self.square


@dataclass(frozen=True)
class VideoRun:
    """What a method did on one video.

    Attributes:
        video: the frames that were run, and their labels.
        results: detections on all of them as a COCO results list.
        costs: frame by frame; times are a frame's share of the step that it had in common with other streams.
        latencies: seconds of that step, frame by frame; 0 where the detector did not run.
        state_bytes: remembered of the stream between frames.
        peak_bytes: largest memory while it ran (process or GPU).
        skipped: why a frame could not be read, by image id; such frames were neither run nor are they scored.
        session: the process that ran it; times of different ones cannot be compared.
    """

    video: Video
    results: list[Entry]
    costs: list[FrameCost]
    latencies: list[float]
    state_bytes: int
    peak_bytes: int
    skipped: dict[int, str] = field(default_factory=dict)
    session: str = SESSION

    @property
    def seconds(self) -> float:
        """Time of all frames."""
        return sum(cost.latency for cost in self.costs)


@dataclass(frozen=True)
class MethodRun:
    """What a method did on a data set.

    Attributes:
        method: the way.
        data: the frames that were run, and their labels.
        videos: one by one, as in `data`.
    """

    method: Method
    data: CocoVideo
    videos: list[VideoRun]

    @classmethod
    def of(cls, method: Method, data: CocoVideo, videos: Sequence[VideoRun]) -> MethodRun:
        """The run of all videos of a data set."""
        return cls(method, CocoVideo(data.categories, [run.video for run in videos], data.image_root), list(videos))

    @property
    def results(self) -> list[Entry]:
        """All detections as a COCO results list."""
        return [entry for run in self.videos for entry in run.results]

    @property
    def skipped(self) -> dict[int, str]:
        """Why a frame could not be read, by image id."""
        return {image: reason for run in self.videos for image, reason in run.skipped.items()}

    @property
    def efficiency(self) -> Efficiency:
        """Of all frames of all videos."""
        costs = [cost for run in self.videos for cost in run.costs]
        return summarise(costs, [seconds for run in self.videos for seconds in run.latencies])

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

    def rescored(self) -> MethodRun:
        """The same run with the scores that `eventful_det.runtime.rescoring` gives, video by video."""
        return dataclasses.replace(self, videos=[_rescored(run) for run in self.videos])


def _rescored(run: VideoRun) -> VideoRun:
    by_image: dict[int, list[Entry]] = defaultdict(list)
    for entry in run.results:
        by_image[entry["image_id"]].append(entry)
    results: list[Entry] = []
    objects: Objects | None = None
    for frame, cost in zip(run.video.frames, run.costs, strict=True):
        entries = by_image[frame.image_id]
        scores, objects = rescore(detections_of(entries), None if cost.flush else objects, Rescoring())
        results += [entry | {"score": score} for entry, score in zip(entries, scores.tolist(), strict=True)]
    return dataclasses.replace(run, results=results)
