"""Average precision as COCO defines it, computed by pycocotools, or by faster-coco-eval where it is installed.

All precisions lie in [0, 1], or are `nan` where no object was there to be found.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame
from eventful_det.detectors.results import Detections
from eventful_det.errors import UserError
from eventful_det.files import JsonObject

try:
    from faster_coco_eval import COCO  # the same numbers in half the time
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

Entry = JsonObject
_AREAS = [[0.0, 1e10]]  # objects of every size; COCO's small / medium / large are not reported
_OVERLAPS = np.linspace(0.5, 0.95, 10)
_AGREED_SCORE = 0.5
ENOUGH = 10  # boxes of a class from which its average precision says something


@dataclass(frozen=True)
class DetectionScores:
    """How well objects were found; means are over the classes that occur.

    Attributes:
        ap: average precision, averaged over the overlaps 0.5, 0.55, ..., 0.95.
        ap50, ap75: average precision at an overlap of 0.5 and 0.75.
        ap50_by_class: AP50 of each class; `nan` for a class that does not occur.
        objects_by_class: objects of each class, crowds excluded.
        images: frames that were scored.
        objects: objects on them, crowds excluded.
        detections: detections on them.
    """

    ap: float
    ap50: float
    ap75: float
    ap50_by_class: dict[str, float]
    objects_by_class: dict[str, int]
    images: int
    objects: int
    detections: int

    def ap50_of_common(self, objects: int) -> float:
        """AP50 averaged over the classes with at least so many objects: rare ones are noise."""
        common = [ap for name, ap in self.ap50_by_class.items() if self.objects_by_class[name] >= objects]
        return sum(common) / len(common) if common else math.nan


def coco_results(detections: Mapping[int, Detections], categories: Sequence[int]) -> list[Entry]:
    """Detections as a COCO results list, ready for JSON.

    Args:
        detections: by image id; boxes in pixels of the frame.
        categories: category id of each label.

    Returns:
        Entries of image_id, category_id, bbox (x, y, width, height in pixels) and score.
    """
    entries: list[Entry] = []
    for image, found in detections.items():
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        for (x1, y1, x2, y2), score, label in rows:
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            entries.append({"image_id": image, "category_id": categories[label], "bbox": box, "score": round(score, 6)})
    return entries


def detections_of(entries: Sequence[Entry]) -> Detections:
    """The entries of one frame as detections, in their order; labels are category ids."""
    x, y, w, h = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4).unbind(1)
    scores = torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)
    labels = torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64)
    return Detections(torch.stack([x, y, x + w, y + h], 1), scores, labels)


def category_ids(data: CocoVideo, names: Sequence[str]) -> list[int]:
    """The category id of each label of a detector, by name.

    Raises:
        UserError: the data set and the detector know different classes.
    """
    ids = {name: category for category, name in data.categories}
    if set(ids) != set(names):
        sides = {"data set": sorted(set(ids) - set(names)), "weights": sorted(set(names) - set(ids))}
        lists = [
            f"known to the {side} only: {', '.join(only[:5])}{', ...' * (len(only) > 5)}"
            for side, only in sides.items()
            if only
        ]
        raise UserError(
            f"the classes of the weights and of the data set differ ({'; '.join(lists)}); "
            "give weights that were trained for this data set's classes, or score what both know (common_classes=true)"
        )
    return [ids[name] for name in names]


def labelled_frames(data: CocoVideo) -> list[Frame]:
    """The frames that can be scored.

    Raises:
        UserError: there is none.
    """
    frames = [frame for frame in data.frames if frame.labelled]
    if not frames:
        raise UserError("no labelled frame to score; give a data set with labels, or more videos or frames of it")
    return frames


def evaluate(data: CocoVideo, results: Iterable[Entry]) -> DetectionScores:
    """Score detections against a data set.

    Args:
        data: the truth. Frames that are not labelled are not scored; on a frame of which only some classes are
            exhaustively labelled, boxes of the others are neither right nor wrong.
        results: COCO results; a frame without an entry has no detections.

    Returns:
        The scores; `nan` where no frame is labelled.
    """
    images = {frame.image_id: frame for frame in data.frames if frame.labelled}
    truth = [_truth(annotation, frame) for frame in images.values() for annotation in frame.annotations]
    scored = (
        [e for e in entries if is_exhaustive(images.get(e["image_id"]), e["category_id"])]
        for entries in (truth, results)
    )
    return _score(len(images), data.categories, *scored)


def agreement(dense: Iterable[Entry], ours: Iterable[Entry]) -> float:
    """How well `ours` repeats what the dense detector found, without labels.

    Args:
        dense: COCO results of the dense detector; those of score 0.5 and more are taken for the truth.
        ours: COCO results to judge.

    Returns:
        AP50 of `ours`, averaged over the classes of which the truth holds `ENOUGH` boxes, or over all where none has so
        many: one box that blinks must not weigh as much as a thousand that do not. `nan` when dense found nothing.
    """
    truth = [entry | {"area": _area(entry), "iscrowd": 0} for entry in dense if entry["score"] >= _AGREED_SCORE]
    judged = list(ours)
    images = {entry["image_id"] for entry in (*truth, *judged)}
    categories = sorted({entry["category_id"] for entry in truth})
    scores = _score(len(images), [(c, str(c)) for c in categories], truth, judged)
    common = scores.ap50_of_common(ENOUGH)
    return scores.ap50 if math.isnan(common) else common


def is_exhaustive(frame: Frame | None, category: int) -> bool:
    """Whether all objects of the category have a box on this frame, so that boxes of it can be judged."""
    return frame is not None and (frame.exhaustive is None or category in frame.exhaustive)


def _truth(annotation: Annotation, frame: Frame) -> Entry:
    x1, y1, x2, y2 = annotation.box
    entry = {"image_id": frame.image_id, "category_id": annotation.category_id, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    return entry | {"area": annotation.area, "iscrowd": int(annotation.iscrowd)}


def _area(entry: Entry) -> float:
    return float(entry["bbox"][2] * entry["bbox"][3])


def _score(
    images: int, categories: Sequence[tuple[int, str]], truth: Sequence[Entry], found: Sequence[Entry]
) -> DetectionScores:
    precision = np.full((len(_OVERLAPS), 101, len(categories)), -1.0)  # (overlaps, recalls, categories)
    sides = [_by_category(entries) for entries in (truth, found)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for k, (category, _) in enumerate(categories):
            if category in sides[0]:
                precision[..., k] = _precision(*(side.get(category, []) for side in sides))
    objects = Counter(entry["category_id"] for entry in truth if not entry["iscrowd"])
    ap50, ap75 = (precision[np.isclose(_OVERLAPS, overlap)] for overlap in (0.5, 0.75))
    return DetectionScores(
        ap=_mean(precision),
        ap50=_mean(ap50),
        ap75=_mean(ap75),
        ap50_by_class={name: _mean(ap50[..., k]) for k, (_, name) in enumerate(categories)},
        objects_by_class={name: objects[category] for category, name in categories},
        images=images,
        objects=objects.total(),
        detections=len(found),
    )


def _by_category(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    grouped: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        grouped[entry["category_id"]].append(entry)
    return grouped


def _precision(truth: list[Entry], found: list[Entry]) -> NDArray[np.float64]:
    """Precision of one category by overlap and recall, (10, 101); -1 where only crowds are to be found.

    One category at a time and only the images that have something of it: pycocotools visits every pair of image and
    category, and nearly all are empty.
    """
    boxes = [entry | {"area": _area(entry), "iscrowd": 0} for entry in found]
    judge = COCOeval(*(_coco(entries, truth + found) for entries in (truth, boxes)), iouType="bbox")
    judge.params.areaRng, judge.params.areaRngLbl = _AREAS, ["all"]
    judge.params.iouThrs = _OVERLAPS
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"][:, :, 0, 0, -1]


def _coco(entries: list[Entry], seen: list[Entry]) -> COCO:
    """A COCO index in memory, of the images and categories of `seen`.

    Ids count from 1: pycocotools takes the id 0 for "not matched".
    """
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in sorted({entry["image_id"] for entry in seen})],
        "categories": [{"id": category} for category in {entry["category_id"] for entry in seen}],
        "annotations": [entry | {"id": n} for n, entry in enumerate(entries, start=1)],
    }
    coco.createIndex()
    return coco


def _mean(precision: NDArray[np.float64]) -> float:
    """Mean over what is defined; pycocotools writes -1 for classes that do not occur."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else math.nan
