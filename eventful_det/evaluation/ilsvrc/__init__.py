"""Average precision as the field computes it on ImageNet VID, over all objects and over slow, medium and fast ones.

Two programs made the numbers in the literature; `Protocol` names what they differ in:

* `FGFA`: the ILSVRC 2015 development kit (``evaluation/eval_vid_detection.m``), and Flow-Guided Feature Aggregation
  (msracver/Flow-Guided-Feature-Aggregation, ``lib/dataset/imagenet_vid_eval.py`` and ``imagenet_vid_eval_motion.py``),
  which repeats it and adds the groups. An object is found at an overlap of min(0.5, wh / ((w + 10) (h + 10))).
* `MEGA`: Scalsol/mega.pytorch, ``mega_core/data/datasets/evaluation/vid/vid_eval.py``. 0.5 for every object.

Both count boxes in inclusive pixels, take the whole area under the precision-recall curve (monotone from the right)
and match greedily: detections in the order of their scores each take the free object of their class that they overlap
most, whatever its group. Both score a group so: a detection that took an object of another group is neither right nor
wrong. One that took none counts as wrong by a weight: 1 if the object it overlaps most is of the group, 0 if that is
of another group; if it overlaps neither, the share of *other* objects among those looked at; if there are none to look
at, the group's share of all objects. docs/metrics.md tells more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eventful_det.data.coco_video import CocoVideo
from eventful_det.evaluation.detection import Entry, is_exhaustive
from eventful_det.evaluation.ilsvrc.boxes import (
    Bools,
    Boxes,
    Floats,
    Ints,
    pairs,
    pixel_area,
    pixel_overlap,
    pixel_shared,
)
from eventful_det.evaluation.ilsvrc.motion import motion_groups, motion_ious

_OVERLAP = 0.5
_TOLERANCE = 10  # pixels


@dataclass(frozen=True)
class Protocol:
    """A way to score.

    Attributes:
        lenient: small objects are found at a smaller overlap than 0.5.
        same_class: a detection that found nothing is held against the objects of its own class on its frame; else
            against all objects of the frame.
    """

    lenient: bool
    same_class: bool


MEGA = Protocol(lenient=False, same_class=True)
FGFA = Protocol(lenient=True, same_class=False)


class GroupScore(NamedTuple):
    """Average precision over a group of objects, in [0, 1]; `nan` where there is none.

    Attributes:
        ap: mean over the classes that occur in the group.
        by_class: of each class.
        objects: how many there are.
    """

    ap: float
    by_class: dict[str, float]
    objects: int


@dataclass(frozen=True)
class VidScores:
    """The numbers that papers on ImageNet VID print. `nan` = not defined: no labels, or no track ids.

    Attributes:
        ap50_vid: all objects, at an overlap of 0.5 (`MEGA`).
        ap50_slow, ap50_medium, ap50_fast: the same by motion.
        ap_ilsvrc: all objects by the rule of the challenge (`FGFA`).
        objects_slow, objects_medium, objects_fast: how many there are.
    """

    ap50_vid: float
    ap50_slow: float
    ap50_medium: float
    ap50_fast: float
    ap_ilsvrc: float
    objects_slow: int
    objects_medium: int
    objects_fast: int


def vid_scores(data: CocoVideo, results: Iterable[Entry]) -> VidScores:
    """Score detections as papers on ImageNet VID do.

    Args:
        data: the truth; frames and classes that are not labelled are left out, as in `detection.evaluate`.
        results: COCO results; a frame without an entry has no detections.
    """
    results = list(results)
    mega = group_scores(data, results)
    slow, medium, fast = (mega[name] for name in ("slow", "medium", "fast"))
    return VidScores(
        ap50_vid=mega["all"].ap,
        ap50_slow=slow.ap,
        ap50_medium=medium.ap,
        ap50_fast=fast.ap,
        ap_ilsvrc=group_scores(data, results, FGFA)["all"].ap,
        objects_slow=slow.objects,
        objects_medium=medium.objects,
        objects_fast=fast.objects,
    )


def group_scores(
    data: CocoVideo, results: Iterable[Entry], protocol: Protocol = MEGA, motion: Mapping[int, float] | None = None
) -> dict[str, GroupScore]:
    """Average precision over the groups "all", "slow", "medium" and "fast".

    Args:
        data: the truth. Detections on a crowd (half of their area) are never wrong, and a crowd is no object.
        results: COCO results.
        protocol: whose rules.
        motion: motion IoU by annotation id; from the track ids if None.
    """
    objects, crowds, iou, empty = _truth(data, motion)
    found = _detections(data, results)
    i, j = pairs(found, objects, protocol.same_class)
    overlap = pixel_overlap(found.box[i], objects.box[j])
    taken = _match(found, objects, i, j, overlap, protocol.lenient)
    free = (taken < 0) & ~_in_crowd(found, crowds)
    # Both programs count a frame without objects as one object of motion IoU 0 when they take the group's share.
    counted = np.append(iou, np.zeros(empty))
    scores = {}
    for name, members in ({"all": np.ones_like(counted, dtype=bool)} | motion_groups(counted)).items():
        inside = members[: len(iou)]
        hits = np.append(inside, False)[taken]
        share = float(members.mean()) if members.size else 1.0
        wrong = np.where(free, _blame(len(found), i, overlap, inside[j], share), 0.0)
        by_class = {
            label: _average_precision(hits[mine], wrong[mine], int(inside[objects.category == category].sum()))
            for category, label in data.categories
            for mine in [found.category == category]
        }
        scores[name] = GroupScore(_mean(by_class.values()), by_class, int(inside.sum()))
    return scores


def _truth(data: CocoVideo, motion: Mapping[int, float] | None) -> tuple[Boxes, Boxes, Floats, int]:
    """Objects, crowds, the motion IoU of the objects, and the number of labelled frames without objects."""
    rows: list[tuple[int, int, Sequence[float]]] = []
    crowd: list[bool] = []
    iou: list[float] = []
    n = 0
    for video in data.videos:
        values = iter(motion_ious(video).tolist())
        for frame in video.frames:
            for a in frame.annotations:
                value = next(values)
                if frame.labelled and is_exhaustive(frame, a.category_id):
                    rows.append((n, a.category_id, a.box))
                    crowd.append(a.iscrowd)
                    iou.append(value if motion is None else motion.get(a.id, math.nan))
            n += frame.labelled
    boxes, crowds = Boxes.of(rows), np.array(crowd, dtype=bool)
    objects = boxes.chosen(~crowds)
    return objects, boxes.chosen(crowds), np.array(iou)[~crowds], n - len(np.unique(objects.frame))


def _detections(data: CocoVideo, results: Iterable[Entry]) -> Boxes:
    """Detections that can be judged, the surest first."""
    frames = {frame.image_id: (n, frame) for n, frame in enumerate(f for f in data.frames if f.labelled)}
    rows, scores = [], []
    for entry in results:
        n, frame = frames.get(entry["image_id"], (0, None))
        if is_exhaustive(frame, entry["category_id"]):
            x, y, w, h = entry["bbox"]
            rows.append((n, entry["category_id"], (x, y, x + w, y + h)))
            scores.append(entry["score"])
    return Boxes.of(rows).chosen(np.argsort(-np.array(scores), kind="stable"))


def _match(found: Boxes, objects: Boxes, i: Ints, j: Ints, overlap: Floats, lenient: bool) -> Ints:
    """The object that each detection takes, or -1. Shape (detections,)."""
    enough = np.full(len(objects), _OVERLAP)
    if lenient:
        size = objects.box[:, 2:] - objects.box[:, :2] + 1
        enough = np.minimum(enough, (size / (size + _TOLERANCE)).prod(axis=1))
    could = np.flatnonzero((found.category[i] == objects.category[j]) & (overlap >= enough[j]))
    order = could[np.lexsort((-overlap[could], i[could]))]
    taken, gone = [-1] * len(found), [False] * len(objects)
    for detection, item in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if taken[detection] < 0 and not gone[item]:
            taken[detection], gone[item] = item, True
    return np.array(taken, dtype=np.int64)


def _in_crowd(found: Boxes, crowds: Boxes) -> Bools:
    """Whether half of a detection lies on a crowd of its class. Shape (detections,)."""
    i, j = pairs(found, crowds, same_class=True)
    inside = np.zeros(len(found), dtype=bool)
    inside[i[pixel_shared(found.box[i], crowds.box[j]) >= _OVERLAP * pixel_area(found.box[i])]] = True
    return inside


def _blame(detections: int, i: Ints, overlap: Floats, inside: Bools, share: float) -> Floats:
    """By which weight a detection is wrong if it took no object (see the module). Shape (detections,).

    Args:
        detections: how many.
        i: the detection of each pair.
        overlap: of each pair.
        inside: whether the object of the pair is of the group.
        share: of the group among all objects.
    """
    best = np.full((2, detections), -1.0)
    np.maximum.at(best, (inside.astype(int), i), overlap)
    seen, others = (np.bincount(i[which], minlength=detections) for which in (inside | True, ~inside))
    tie = np.where(seen > 0, others / np.maximum(seen, 1), share)
    return np.select([best[1] > best[0], best[0] > best[1]], [1.0, 0.0], tie)


def _average_precision(hits: Bools, wrong: Floats, objects: int) -> float:
    """Area under the precision-recall curve.

    Args:
        hits: whether a detection found an object, the surest first, (n,).
        wrong: by which weight it is wrong, (n,).
        objects: to be found.
    """
    if not objects:
        return math.nan
    right = np.cumsum(hits)
    precision = right / np.maximum(right + np.cumsum(wrong), np.finfo(float).eps)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best_from_here[hits].sum() / objects)


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
