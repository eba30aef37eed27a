"""What noise, light and weather cost: tokens selected where nothing but they happens, and average precision under them.

Scenes are synthetic, with fixed cameras; what befalls them is in `eventful_det.data.synthetic.disturbances`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np

from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.synthetic import SceneOptions, SyntheticFrame, render_video
from eventful_det.data.synthetic.disturbances import disturb
from eventful_det.detectors.protocol import AnyRule, S, VideoDetector
from eventful_det.detectors.results import FrameCost
from eventful_det.evaluation.detection import Entry, category_ids, coco_results, evaluate
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import Selector
from eventful_det.outputs import markdown_table
from eventful_det.runtime.motion.key_frames import Hold
from eventful_det.runtime.session import StreamResult
from eventful_det.runtime.stream import Stream

UNDISTURBED = "none"
_HEADER = ("disturbance", "selected %", "most %", "flushes", "AP50 dense", "AP50", "GMACs %")


@dataclass(frozen=True)
class Row:
    """What one disturbance does.

    Attributes:
        name: of the disturbance.
        selected: mean share of the tokens selected on frames where nothing else happens, after the first; all of them
            are gated.
        most: the largest share of these, flushes left out.
        flushes: of the streams on these frames, by scene cuts.
        ap50_dense: of the dense detector where objects move.
        ap50: of the gated one, which holds frames as it does by default.
        macs: multiply-adds of the gated one as a share of the dense one's.
    """

    name: str
    selected: float
    most: float
    flushes: int
    ap50_dense: float
    ap50: float
    macs: float


def measure(
    detector: VideoDetector[S],
    name: str,
    *,
    rule: AnyRule,
    selector: Selector,
    videos: int,
    frames: int,
    seed: int = 0,
) -> Row:
    """Measure a disturbance.

    Args:
        detector: that knows the synthetic shapes.
        name: of the disturbance; `UNDISTURBED` = none.
        rule, selector: of the gated detector.
        videos: scenes, each once still and once with moving objects.
        frames: of each.
        seed: of the scenes.
    """
    options = SceneOptions(frames=frames, noise=0, exposure_drift=0, static_fraction=1, cut_fraction=0)
    categories = [(shape.id, shape.name) for shape in SYNTHETIC_SHAPES]
    truth: list[Video] = []
    found: dict[str, list[Entry]] = {"dense": [], "gated": []}
    still: list[FrameCost] = []
    moving: list[FrameCost] = []
    for index in range(videos):
        first = next(render_video(options, seed, index))
        same = _befall(repeat(first, frames), name, index)
        still += [frame.cost for frame in _run(detector, same, rule, selector, hold=1)][1:]
        scene = _befall(render_video(options, seed, index), name, index)
        video = _truth(index, scene)
        truth.append(video)
        ids = category_ids(CocoVideo(categories, truth, Path()), detector.names)
        for kind, how in (("dense", Dense()), ("gated", rule)):
            for frame, result in zip(video.frames, _run(detector, scene, how, selector), strict=True):
                found[kind] += coco_results({frame.image_id: result.detections}, ids)
                moving += [result.cost] if kind == "gated" else []
    data = CocoVideo(categories, truth, Path())
    shares = [cost.recomputed / cost.tokens for cost in still]
    return Row(
        name=name,
        selected=float(np.mean(shares)),
        most=max((share for share, cost in zip(shares, still, strict=True) if not cost.flush), default=0.0),
        flushes=sum(cost.flush for cost in still),
        ap50_dense=evaluate(data, found["dense"]).ap50,
        ap50=evaluate(data, found["gated"]).ap50,
        macs=sum(cost.total for cost in moving) / sum(cost.dense_total for cost in moving),
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; shares and precisions in percent."""
    lines = []
    for row in rows:
        shares = (f"{100 * value:.1f}" for value in (row.selected, row.most))
        scores = (f"{100 * value:.1f}" for value in (row.ap50_dense, row.ap50))
        lines.append((row.name.replace("_", " "), *shares, str(row.flushes), *scores, f"{100 * row.macs:.0f}"))
    return markdown_table([_HEADER, *lines])


def _befall(frames: Iterable[SyntheticFrame], name: str, seed: int) -> list[SyntheticFrame]:
    return list(frames if name == UNDISTURBED else disturb(frames, name, seed))


def _run(
    detector: VideoDetector[S], scene: Sequence[SyntheticFrame], rule: AnyRule, selector: Selector, hold: Hold = None
) -> list[StreamResult]:
    """What comes of each frame."""
    stream = Stream(detector, np.stack([frame.image for frame in scene]), rule=rule, budget=selector, hold=hold)
    return list(islice(stream, len(scene)))


def _truth(index: int, scene: Sequence[SyntheticFrame]) -> Video:
    frames = []
    for i, shown in enumerate(scene):
        height, width = shown.image.shape[:2]
        boxes = [Annotation(one.category, one.box, one.track_id, one.occluded) for one in shown.objects]
        frames.append(Frame(index * len(scene) + i + 1, f"{i}", width, height, i, boxes))
    return Video(index + 1, f"scene {index}", frames)
