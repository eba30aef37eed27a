"""Boxes of many frames as arrays: which of them meet, and by how much they overlap in inclusive pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Boxes:
    """Boxes on the frames of a data set.

    Attributes:
        frame: index among the labelled frames, (n,).
        category: category id, (n,).
        box: x1, y1, x2, y2, (n, 4).
    """

    frame: Ints
    category: Ints
    box: Floats

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, Sequence[float]]]) -> Boxes:
        """From (frame, category, box) rows."""
        frame, category = (np.array([row[k] for row in rows], dtype=np.int64) for k in range(2))
        return cls(frame, category, np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.frame)

    def chosen(self, which: Bools | Ints) -> Boxes:
        """Some of them."""
        return Boxes(self.frame[which], self.category[which], self.box[which])


def pairs(a: Boxes, b: Boxes, same_class: bool) -> tuple[Ints, Ints]:
    """All pairs on the same frame, and of the same class if asked, as indices into `a` and `b`."""
    frames, categories = np.concatenate([a.frame, b.frame]), np.concatenate([a.category, b.category])
    known, label = np.unique(categories if same_class else 0 * categories, return_inverse=True)
    keys, others = np.split(frames * len(known) + label, [len(a)])
    order = np.argsort(others, kind="stable")
    first, last = (np.searchsorted(others[order], keys, side) for side in ("left", "right"))
    count = last - first
    start = np.repeat(first - np.cumsum(count) + count, count)
    return np.repeat(np.arange(len(a)), count), order[start + np.arange(count.sum())]


def pixel_overlap(a: Floats, b: Floats) -> Floats:
    """Intersection over union of pairs of boxes, as ILSVRC counts it: x1 to x2 are x2 - x1 + 1 pixels.

    Args:
        a, b: x1, y1, x2, y2. Shapes (n, 4).

    Returns:
        Shape (n,).
    """
    shared = pixel_shared(a, b)
    return shared / (pixel_area(a) + pixel_area(b) - shared)


def pixel_shared(a: Floats, b: Floats) -> Floats:
    """Area that pairs of boxes share. Shapes (n, 4), (n, 4) to (n,)."""
    return pixel_area(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1))


def pixel_area(box: Floats) -> Floats:
    """Area of boxes, 0 of those that are inside out. Shapes (n, 4) to (n,)."""
    size = np.maximum(box[:, 2:] - box[:, :2] + 1, 0)
    return size[:, 0] * size[:, 1]
