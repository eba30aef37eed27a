"""Boxes (x0, y0, x1, y1) as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]


def areas(boxes: Boxes) -> Boxes:
    """Areas of boxes `(n, 4)`, `(n,)`."""
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), np.float32)


def overlaps(a: Boxes, b: Boxes, share: bool = False) -> Boxes:
    """Overlap of boxes `(n, 4)` and `(m, 4)`, `(n, m)`: IoU, or the share of each of `a` that lies in `b`."""
    sides = np.maximum(np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]), 0)
    both = sides[..., 0] * sides[..., 1]
    whole = areas(a)[:, None] if share else areas(a)[:, None] + areas(b) - both
    return np.asarray(both / np.maximum(whole, 1e-9), np.float32)
