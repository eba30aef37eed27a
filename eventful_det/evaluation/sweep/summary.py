"""The outcome of a sweep as numbers: one row for each method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eventful_det.data.coco_video import CocoVideo
from eventful_det.detectors.protocol import S, VideoDetector
from eventful_det.evaluation.consistency import false_alarms, flicker, found_share, likeness
from eventful_det.evaluation.detection import DetectionScores, agreement, labelled_frames
from eventful_det.evaluation.efficiency import TOTAL, Spread
from eventful_det.evaluation.ilsvrc import VidScores
from eventful_det.evaluation.sweep import run_methods
from eventful_det.evaluation.sweep.runs import DENSE, Method, MethodRun
from eventful_det.files import JsonObject

_NO_TIME = Spread(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row(DetectionScores, VidScores):
    """A method in the table of a sweep, its scores included. Precisions lie in [0, 1]; `nan` = not defined.

    "Relative" is relative to the dense method of the same sweep. Times come from one run on one machine, in which
    the methods took turns video by video; `relative_time` is the median over videos of the ratio of their times,
    and the number to trust on a machine that does other things as well. Decoding and resizing are not timed.

    Attributes:
        agreement50: AP50 against the dense detections.
        likeness: share of sure detections with their like in the dense run or in this one, `consistency.likeness`.
        found: share of the labelled objects that a sure detection covers.
        false_alarms: sure detections per 100 empty frames, `consistency.false_alarms`.
        flicker: blinks per sure detection, see `consistency.flicker`.
        gmacs_*: 1e9 multiply-adds per frame, mean over all frames; "steady" leaves flushes out.
        ms_mean, ms_median, ms_p95: latency in milliseconds, until the detections of a frame are there; when several
            streams share a step, that of the step. Of held frames 0.
        ms_flush: median latency of the flushes.
        ms_backbone: milliseconds that a frame costs in the backbone, its share of the step.
        fps: frames per second of all streams together, one step after the other.
        p95_to_median: of the MACs of a frame, flushes included: 1 = every frame costs alike; `nan` where the median
            frame costs nothing.
        recomputed: share of the tokens that were recomputed.
        state_bytes: remembered per stream; peak_bytes: largest memory while the method ran.
        frames: that were run; `images` of them were scored.
        skipped: frames that could not be read; they are in no other number.
    """

    method: str
    curve: str
    setting: float | None
    agreement50: float
    likeness: float
    found: float
    false_alarms: float
    flicker: float
    gmacs_backbone: float
    gmacs_heads: float
    gmacs_total: float
    gmacs_backbone_steady: float
    gmacs_total_steady: float
    relative_backbone: float
    relative_total: float
    p95_to_median: float
    ms_mean: float
    ms_median: float
    ms_p95: float
    ms_backbone: float
    ms_flush: float
    fps: float
    relative_time: float
    recomputed: float
    flushes: int
    state_bytes: int
    peak_bytes: int
    videos: int
    frames: int
    skipped: int


def evaluate_detector(
    detector: VideoDetector[S], data: CocoVideo, on_frame: Callable[[Method], None] | None = None
) -> JsonObject:
    """Run and score a dense detector.

    Args:
        detector: what to evaluate, in evaluation mode.
        data: what to evaluate on; see `first` for a part of it.
        on_frame: see `complete`.

    Returns:
        The fields of `Row`; undefined numbers are `nan`.

    Raises:
        UserError: no frame is labelled.
    """
    labelled_frames(data)
    (run,) = run_methods(detector, data, [Method(DENSE)], on_frame=on_frame)
    return vars(row_of(run))


def rows_of(runs: Sequence[MethodRun]) -> list[Row]:
    """The table of a sweep, in the order of its methods."""
    dense = next((run for run in runs if run.method.is_dense), None)
    return [row_of(run, dense) for run in runs]


def row_of(run: MethodRun, dense: MethodRun | None = None) -> Row:
    """A method in the table of a sweep.

    Args:
        run: of the method.
        dense: the run to compare with; without it MACs are compared with dense frames of the same size.
    """
    cost = run.efficiency
    reference = cost.gmacs_dense if dense is None else dense.efficiency.gmacs
    latency = cost.latency or _NO_TIME
    flush = cost.latency_flush or _NO_TIME
    return Row(
        **vars(run.scores()),
        **vars(run.vid_scores()),
        method=run.method.name,
        curve=run.method.curve,
        setting=run.method.setting,
        agreement50=math.nan if dense is None else agreement(dense.results, run.results),
        likeness=math.nan if dense is None else likeness(dense.results, run.results),
        found=found_share(run.data, run.results),
        false_alarms=false_alarms(run.data, run.results),
        flicker=flicker(run.data, run.results),
        gmacs_backbone=cost.gmacs["backbone"],
        gmacs_heads=cost.gmacs[TOTAL] - cost.gmacs["backbone"],
        gmacs_total=cost.gmacs[TOTAL],
        gmacs_backbone_steady=cost.gmacs_steady.get("backbone", math.nan),
        gmacs_total_steady=cost.gmacs_steady.get(TOTAL, math.nan),
        relative_backbone=cost.gmacs["backbone"] / reference["backbone"],
        relative_total=cost.gmacs[TOTAL] / reference[TOTAL],
        p95_to_median=_p95_to_median([frame.total for video in run.videos for frame in video.costs]),
        ms_mean=latency.mean,
        ms_median=latency.median,
        ms_p95=latency.p95,
        ms_backbone=cost.ms["backbone"].mean if cost.ms else math.nan,
        ms_flush=flush.median,
        fps=cost.frames_per_second,
        relative_time=math.nan if dense is None else _relative_time(run, dense),
        recomputed=cost.recomputed / cost.tokens,
        flushes=cost.flushes,
        state_bytes=max(video.state_bytes for video in run.videos),
        peak_bytes=max(video.peak_bytes for video in run.videos),
        videos=len(run.videos),
        frames=cost.frames,
        skipped=len(run.skipped),
    )


def _p95_to_median(macs: Sequence[int]) -> float:
    median, p95 = np.percentile(macs, [50, 95])
    return float(p95 / median) if median else math.nan


def _relative_time(run: MethodRun, dense: MethodRun) -> float:
    pairs = zip(run.videos, dense.videos, strict=True)
    ratios = [a.seconds / b.seconds for a, b in pairs if b.seconds and a.session == b.session]
    return float(np.median(ratios)) if ratios else math.nan
