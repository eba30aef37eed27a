"""What average precision does not see on video: objects that are lost, and boxes that flicker."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torchvision.ops import box_iou

from eventful_det.data.coco_video import CocoVideo, Frame
from eventful_det.evaluation.detection import Entry

SURE = 0.5  # a detection of at least this score is shown to people
_OVERLAP = 0.5


def found_share(data: CocoVideo, results: Iterable[Entry]) -> float:
    """Share of the labelled objects, crowds excluded, that a sure detection of their class covers.

    It asks for no exhaustive labels: objects without a box cost nothing.

    Returns:
        A share in [0, 1]; `nan` without objects.
    """
    sure = _sure_boxes(results)
    found = []
    for frame in data.frames:
        for item in frame.annotations:
            if not item.iscrowd:
                boxes = sure[frame.image_id].get(item.category_id, [])
                found.append(bool(_overlaps([list(item.box)], boxes).any()))
    return sum(found) / len(found) if found else math.nan


def false_alarms(data: CocoVideo, results: Iterable[Entry]) -> float:
    """Sure detections per 100 labelled frames on which nothing is: no object, and no region to ignore.

    Returns:
        `nan` where no labelled frame is empty.
    """
    sure = _sure_boxes(results)
    empty = [frame.image_id for frame in data.frames if frame.labelled and not frame.annotations]
    boxes = sum(len(of_class) for image in empty for of_class in sure[image].values())
    return 100 * boxes / len(empty) if empty else math.nan


def flicker(data: CocoVideo, results: Iterable[Entry]) -> float:
    """How often sure boxes come and go without reason: blinks per sure detection.

    A blink is a box that has no like in the frame before nor in the one after it, or a box of the frame before that
    has its like in the frame after but none in between. "Like" means of the same class, overlapping by half. Where
    frames were left out (gaps in `frame_id`) nothing is compared.

    Returns:
        0 = as steady as can be; `nan` where there is nothing to compare.
    """
    sure = _sure_boxes(results)
    blinks = boxes = 0
    for video in data.videos:
        for before, now, after in _triples(video.frames):
            for category in sure[before.image_id].keys() | sure[now.image_id].keys():
                a, b, c = (sure[frame.image_id].get(category, []) for frame in (before, now, after))
                boxes += len(b)
                alone = ~_overlaps(b, a).any(1) & ~_overlaps(b, c).any(1)
                lost = _overlaps(a, c).any(1) & ~_overlaps(a, b).any(1)
                blinks += int(alone.sum()) + int(lost.sum())
    return blinks / boxes if boxes else math.nan


def likeness(one: Iterable[Entry], other: Iterable[Entry]) -> float:
    """Share of the sure boxes of two runs that have their like in the other run.

    "Like" means on the same frame, of the same class, overlapping by half. All boxes count alike, so it is steadier
    on short clips than an average precision, in which a class of a single box weighs as much as one of hundreds.

    Returns:
        A share in [0, 1]; `nan` without sure boxes.
    """
    first, second = _sure_boxes(one), _sure_boxes(other)
    alike = boxes = 0
    for image in first.keys() | second.keys():
        for category in first[image].keys() | second[image].keys():
            a, b = first[image].get(category, []), second[image].get(category, [])
            overlaps = _overlaps(a, b)
            alike += int(overlaps.any(1).sum()) + int(overlaps.any(0).sum())
            boxes += len(a) + len(b)
    return alike / boxes if boxes else math.nan


def _triples(frames: Sequence[Frame]) -> Iterator[tuple[Frame, Frame, Frame]]:
    """Three frames in a row."""
    for (a, b), (_, c) in pairwise(pairwise(frames)):
        if c.frame_id - a.frame_id == 2:
            yield a, b, c


def _sure_boxes(results: Iterable[Entry]) -> dict[int, dict[int, list[list[float]]]]:
    """Boxes xyxy of sure detections by image and category."""
    boxes: dict[int, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in results:
        if entry["score"] >= SURE:
            x, y, w, h = entry["bbox"]
            boxes[entry["image_id"]][entry["category_id"]].append([x, y, x + w, y + h])
    return boxes


def _overlaps(a: list[list[float]], b: list[list[float]]) -> Tensor:
    """Which boxes of `a` and `b` overlap by half, `(len(a), len(b))`."""
    return box_iou(torch.tensor(a).reshape(-1, 4), torch.tensor(b).reshape(-1, 4)) >= _OVERLAP
