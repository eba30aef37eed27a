"""Pseudo-labels: what a large detector, seen from several views of a picture, is sure of, and where it is not.

Any ONNX detector with a fixed input size will do, as long as its output is YOLOX's or boxes, scores and labels.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eventful_det.data.boxes import overlaps
from eventful_det.data.coco_video import Annotation
from eventful_det.data.video.transforms import Image, resize
from eventful_det.errors import UserError

Array = NDArray[np.float32]
_STRIDES = (8, 16, 32)  # of YOLOX's grids
_PADDING = 114  # grey of letterboxes
_SAME, _RIVAL = 0.7, 0.6  # overlap of two classes that are one object; share of the better's score that casts doubt


@dataclass(frozen=True)
class TeacherInput:
    """How a picture becomes the teacher's input.

    Attributes:
        bgr: channels in the order blue, green, red.
        scale: what grey levels 0 to 255 are multiplied by, before the mean is subtracted.
        mean, std: per channel, in the teacher's order and after `scale`.
        letterbox: keep the aspect ratio, the picture at the top left; otherwise it is stretched.
    """

    bgr: bool = True
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    letterbox: bool = True


@dataclass(frozen=True)
class Views:
    """The parts of a picture that the teacher looks at, and what of its answers is kept.

    Attributes:
        tiles: tiles per side, besides the whole picture; 1 = none. Small objects need them.
        tile_share: side of a tile as a share of that of the picture; more than 1 / tiles makes tiles overlap.
        flip: look at the mirrored picture, too.
        keep: mean score over the views of one scale from which an object is a label.
        doubt: mean score from which it is a region to be ignored in training; below, it is background.
        floor: score of one view below which an answer counts as none.
        nms: overlap (IoU) from which two answers are one object.
    """

    tiles: int = 2
    tile_share: float = 0.6
    flip: bool = True
    keep: float = 0.4
    doubt: float = 0.15
    floor: float = 0.05
    nms: float = 0.55

    def __post_init__(self) -> None:
        if self.tiles < 1 or not 0 < self.tile_share <= 1 or self.tiles * self.tile_share < 1 < self.tiles:
            raise UserError(f"views: {self.tiles} tiles of {self.tile_share} of a side do not cover the picture")
        if not 0 < self.floor <= self.doubt <= self.keep <= 1:
            raise UserError("views: expected 0 < floor <= doubt <= keep <= 1")

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """The parts x1, y1, x2, y2 in pixels; the whole picture first."""
        places = [(0, 0, width, height)]
        if self.tiles > 1:
            h, w = round(height * self.tile_share), round(width * self.tile_share)
            tops = np.linspace(0, height - h, self.tiles).round().astype(int)
            lefts = np.linspace(0, width - w, self.tiles).round().astype(int)
            places += [(int(x), int(y), int(x) + w, int(y) + h) for y in tops for x in lefts]
        return places


@dataclass
class Answers:
    """Objects that a teacher sees: boxes `(n, 4)` xyxy in pixels, scores `(n,)`, labels `(n,)` of its own classes."""

    boxes: Array
    scores: Array
    labels: NDArray[np.int64]

    def where(self, keep: NDArray[np.bool_ | np.int64]) -> Answers:
        """Those that a mask or indices pick."""
        return Answers(self.boxes[keep], self.scores[keep], self.labels[keep])


class Teacher:
    """An ONNX detector.

    Args:
        path: of the model; one input `(1, 3, h, w)`. Outputs: YOLOX's `(1, n, 5 + K)`, not decoded, or boxes
            `(1, n, 4)` xyxy in pixels of the input with scores and labels `(1, n)`, or scores `(1, n, K)` alone.
        prepare: how its input is made.
        floor: scores below are left out.
        threads: of ONNX Runtime.

    Raises:
        UserError: ONNX Runtime is not installed, or the file is no such model.
    """

    def __init__(
        self, path: str | os.PathLike[str], prepare: TeacherInput | None = None, floor: float = 0.05, threads: int = 1
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError("a teacher needs ONNX Runtime: pip install 'eventful_det[teacher]'") from None
        if not Path(path).is_file():
            raise UserError(f"no teacher {path}: expected an ONNX detector")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of error for every cause, none of them public
            raise UserError(f"{path} is no ONNX model that can be run: {str(error).splitlines()[0]}") from None
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or not all(isinstance(n, int) for n in shape[2:]):
            raise UserError(f"{path}: expected one input (1, 3, height, width) of fixed size, found {shape}")
        self.path, self.prepare, self.floor = Path(path), prepare or TeacherInput(), floor
        self._input, self.size = inputs[0].name, (int(shape[2]), int(shape[3]))

    def __call__(self, image: Image) -> Answers:
        """What it sees in an image `(h, w, 3)` RGB, in pixels of the image; not yet suppressed."""
        (height, width), (h, w), how = self.size, image.shape[:2], self.prepare
        fit = min(height / h, width / w)
        inner = (max(1, round(h * fit)), max(1, round(w * fit))) if how.letterbox else self.size
        canvas = np.full((height, width, 3), _PADDING, np.uint8)
        canvas[: inner[0], : inner[1]] = resize(image, *inner)
        x: Array = (canvas[..., ::-1] if how.bgr else canvas).astype(np.float32) * np.float32(how.scale)
        mean, std = (np.array(values, np.float32) for values in (how.mean, how.std))
        x = np.asarray((x - mean) / std, np.float32)
        outputs = self._session.run(None, {self._input: np.ascontiguousarray(x.transpose(2, 0, 1)[None], np.float32)})
        answers = self._read([np.asarray(value) for value in outputs])
        answers.boxes = answers.boxes * np.array([w / inner[1], h / inner[0]] * 2, np.float32)
        answers.boxes = np.clip(answers.boxes, 0, np.array([w, h] * 2, np.float32)).astype(np.float32)
        solid = (answers.boxes[:, 2] - answers.boxes[:, 0] > 1) & (answers.boxes[:, 3] - answers.boxes[:, 1] > 1)
        return answers.where(solid)

    def _read(self, outputs: list[NDArray[Any]]) -> Answers:
        """Outputs of either layout to answers in pixels of the input."""
        cells = [(self.size[0] // s, self.size[1] // s) for s in _STRIDES]
        if len(outputs) == 1 and outputs[0].ndim == 3 and outputs[0].shape[1] == sum(h * w for h, w in cells):
            return _read_yolox(outputs[0][0].astype(np.float32), cells, self.floor)
        found = {_kind(value): value for value in outputs}
        if {"boxes", "scores"} <= set(found) and (found["scores"].ndim == 3 or "labels" in found):
            return _read_generic(found, self.floor)
        shapes = ", ".join(str(value.shape) for value in outputs)
        raise UserError(
            f"{self.path}: the outputs {shapes} are neither YOLOX's nor boxes (1, n, 4), scores and labels (1, n)"
        )


def _kind(value: NDArray[Any]) -> str:
    """What an output of the generic layout is, by its shape and type."""
    if value.ndim == 3 and value.shape[-1] == 4:
        return "boxes"
    return "labels" if value.ndim == 2 and np.issubdtype(value.dtype, np.integer) else "scores"


def _read_yolox(output: Array, cells: Sequence[tuple[int, int]], floor: float) -> Answers:
    """`(n, 5 + K)`: centre offsets and log sizes in cells, objectness, class probabilities."""
    label = output[:, 5:].argmax(axis=1)
    score = output[:, 4] * output[np.arange(len(output)), 5 + label]
    keep = score >= floor
    grids = [np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=-1).reshape(-1, 2) for h, w in cells]
    grid = np.concatenate(grids)[keep]  # (n, 2) x, y
    stride = np.concatenate([np.full((len(g), 1), s) for g, s in zip(grids, _STRIDES, strict=True)])[keep]
    centre = (output[keep, :2] + grid) * stride
    half = np.exp(output[keep, 2:4]) * stride / 2
    return Answers(np.concatenate([centre - half, centre + half], axis=1, dtype=np.float32), score[keep], label[keep])


def _read_generic(found: Mapping[str, NDArray[Any]], floor: float) -> Answers:
    """Boxes `(1, n, 4)`, and scores with labels `(1, n)` or scores of every class `(1, n, K)`."""
    scores = found["scores"][0].astype(np.float32)
    labels = scores.argmax(axis=-1) if scores.ndim == 2 else found["labels"][0]
    scores = scores.max(axis=-1) if scores.ndim == 2 else scores
    keep = scores >= floor
    return Answers(found["boxes"][0].astype(np.float32)[keep], scores[keep], labels[keep].astype(np.int64))


def look(teacher: Teacher, image: Image, views: Views, names: NDArray[np.int64]) -> Answers:
    """What a teacher sees in a picture from all views, each object once, with the mean score of the views.

    The score of an object is the mean over the views of one scale that hold it whole; a view that does not see it
    counts as 0. The scale with the highest mean counts, since a small object is seen in tiles alone.

    Args:
        teacher: the detector.
        image: `(h, w, 3)` RGB.
        views: what to look at.
        names: our label for each class of the teacher `(K,)`; -1 = none of ours, left out.

    Returns:
        Objects with our labels, best first, those of a mean score below `views.doubt` left out.
    """
    height, width = image.shape[:2]
    places = views.boxes(height, width)
    parts: list[Answers] = []
    where: list[int] = []  # the place of each view
    for i, (x1, y1, x2, y2) in enumerate(places):
        crop = np.ascontiguousarray(image[y1:y2, x1:x2])
        for mirrored in (False, True) if views.flip and i == 0 else (False,):
            answers = teacher(np.ascontiguousarray(crop[:, ::-1]) if mirrored else crop)
            if mirrored:
                answers.boxes[:, [0, 2]] = (x2 - x1) - answers.boxes[:, [2, 0]]
            answers.labels = names[answers.labels]
            answers = answers.where(answers.labels >= 0)
            if i:  # what the edge of a tile cuts is seen whole elsewhere
                answers = answers.where(~_cut(answers.boxes, (x1, y1, x2, y2), (height, width)))
            answers.boxes = answers.boxes + np.array([x1, y1, x1, y1], np.float32)
            parts.append(answers)
            where.append(i)
    everything = Answers(
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.scores for p in parts]),
        np.concatenate([p.labels for p in parts]),
    )
    view = np.concatenate([np.full(len(p.scores), n) for n, p in enumerate(parts)])
    return _agree(everything, view, where, places, views)


def _cut(boxes: Array, place: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Which boxes, in pixels of a tile, touch an edge of it that is not one of the picture."""
    x1, y1, x2, y2 = place
    near = 2.0
    return np.asarray(
        ((boxes[:, 0] < near) & (x1 > 0))
        | ((boxes[:, 1] < near) & (y1 > 0))
        | ((boxes[:, 2] > x2 - x1 - near) & (x2 < size[1]))
        | ((boxes[:, 3] > y2 - y1 - near) & (y2 < size[0]))
    )


def _agree(
    found: Answers, view: NDArray[Any], where: list[int], places: list[tuple[int, int, int, int]], views: Views
) -> Answers:
    """Join the answers of all views: boxes are means weighted by score, scores means over the views of a scale."""
    order = np.argsort(-found.scores, kind="stable")
    found, view = found.where(order), view[order]
    free = np.ones(len(order), bool)
    kept: list[tuple[Array, float, int]] = []
    for i in range(len(order)):
        if not free[i]:
            continue
        near = (
            free
            & (found.labels == found.labels[i])
            & (overlaps(found.boxes, found.boxes[i : i + 1])[:, 0] >= views.nms)
        )
        free &= ~near
        best = np.zeros(len(where), np.float32)  # of each view
        np.maximum.at(best, view[near], found.scores[near])
        held = overlaps(found.boxes[i : i + 1], np.array(places, np.float32), share=True)[0] > 0.98
        scales = [[v for v, p in enumerate(where) if held[p] and (p > 0) == tiled] for tiled in (False, True)]
        score = max(float(best[scale].mean()) for scale in scales if scale)
        if score >= views.doubt:
            box = np.average(found.boxes[near], axis=0, weights=found.scores[near] ** 2)
            kept.append((np.asarray(box, np.float32), score, int(found.labels[i])))
    kept.sort(key=lambda entry: -entry[1])
    return Answers(
        np.array([box for box, _, _ in kept], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in kept], np.float32),
        np.array([label for _, _, label in kept], np.int64),
    )


def annotate(
    found: Answers, views: Views, real: Sequence[Annotation], ids: Sequence[int], searched: Collection[int]
) -> list[Annotation]:
    """Labels of a picture: the real boxes, what the teacher is sure of, and regions to ignore where it is not.

    Of two classes on one object the surer counts; if the other is nearly as sure, neither does.

    Args:
        found: what `look` returned, best first; label `len(ids) + k` is one of class k that never is sure.
        views: its thresholds.
        real: boxes that people drew.
        ids: category id of each label.
        searched: category ids of which every object has a real box; the teacher has no say in them.
    """
    drawn = np.array([a.box for a in real], np.float32).reshape(-1, 4)
    chosen: list[Annotation] = []
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        category, sure = ids[label % len(ids)], bool(score >= views.keep and label < len(ids))
        x1, y1, x2, y2 = (round(float(v), 1) for v in box)
        here = np.array([a.box for a in chosen], np.float32).reshape(-1, 4)
        same = overlaps(box[None], here)[0] > _SAME
        for other in (chosen[i] for i in np.flatnonzero(same)):
            other.iscrowd |= other.category_id != category and score > _RIVAL * other.score
        if category in searched or x2 - x1 < 1 or y2 - y1 < 1 or same.any():
            continue
        if len(drawn) and overlaps(box[None], drawn).max() >= 0.5:
            continue
        rounded = round(float(score), 3)
        chosen.append(Annotation(category, (x1, y1, x2, y2), generated=True, iscrowd=not sure, score=rounded))
    return [*real, *chosen]
