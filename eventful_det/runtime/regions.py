"""Polygons on a frame, of points (x, y) relative to its width and height: which tokens and which boxes lie in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.gating.windows import Grid

Point = tuple[float, float]
Polygon = tuple[Point, ...]

_FINE = 16  # parts of a token's side that are told apart


@functools.lru_cache(maxsize=256)
def ignored_tokens(polygons: tuple[Polygon, ...], grid: Grid, token: Point) -> Tensor:
    """Tokens that lie in one or more polygons whole, or beyond the frame.

    Args:
        polygons: may overlap.
        grid: tokens of the frame (H, W).
        token: height and width of a token, relative to those of the frame.

    Returns:
        `(H * W,)` booleans.
    """
    height, width = (side * _FINE for side in grid)
    scale = np.array([_FINE / token[1], _FINE / token[0]])
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(canvas, [np.rint(np.array(polygon) * scale).astype(np.int32)], 1)
    canvas[round(scale[1]) :], canvas[:, round(scale[0]) :] = 1, 1
    whole = canvas.reshape(grid[0], _FINE, grid[1], _FINE).all(axis=(1, 3))  # (H, 16, W, 16) -> (H, W)
    return torch.from_numpy(whole.reshape(-1))


def within(points: NDArray[np.float64], polygons: Iterable[Polygon]) -> NDArray[np.bool_]:
    """Which points `(n, 2)`, relative as the polygons are, lie in one of them or on its border, `(n,)`."""
    contours = [np.array(polygon, np.float32) for polygon in polygons]
    return np.array(
        [any(cv2.pointPolygonTest(c, (float(x), float(y)), False) >= 0 for c in contours) for x, y in points], bool
    )
