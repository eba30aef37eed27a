"""How the synthetic categories look: outlines, textures and the sprites made of them.

Shape alone decides the category; colour, texture and orientation say nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32 | np.float64]

SUPERSAMPLING = 4


def _polar(radius: float, start: float, stop: float, n: int = 64) -> Array:
    """(n, 2) points of a circular arc; angles in turns."""
    angle = np.linspace(start, stop, n) * 2 * math.pi
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star(points: int, inner: float) -> Array:
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.asarray(radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))


def _cross(arm: float) -> Array:
    quarter = np.array([(-arm, -1.0), (arm, -1.0), (arm, -arm)])
    turn = np.array([(0.0, 1.0), (-1.0, 0.0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _crescent() -> Array:
    outer = _polar(1.0, 0.13, 0.87)
    centre = 0.45  # of the inner circle, which passes through both tips
    dx, dy = outer[-1, 0] - centre, outer[-1, 1]
    turn = math.atan2(dy, dx) / (2 * math.pi)
    inner = _polar(math.hypot(dx, dy), turn, -1.0 - turn)
    return np.concatenate([outer, inner + (centre, 0.0)])


def _heart() -> Array:
    t = np.linspace(0, 2 * math.pi, 96)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


OUTLINES: dict[str, list[Array]] = {
    "disc": [_polar(1.0, 0, 1)],
    "square": [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)],
    "triangle": [_polar(1.0, -0.25, 0.75, 4)[:3]],
    "star": [_star(5, 0.42)],
    "cross": [_cross(0.32)],
    "ring": [_polar(1.0, 0, 1), _polar(0.55, 0, 1)],
    "crescent": [_crescent()],
    "heart": [_heart()],
    "arrow": [np.array([(1, 0), (0.1, -0.9), (0.1, -0.35), (-1, -0.35), (-1, 0.35), (0.1, 0.35), (0.1, 0.9)])],
    "hourglass": [np.array([(-0.85, -1), (0.85, -1), (0.16, 0), (0.85, 1), (-0.85, 1), (-0.16, 0)])],
}
"""Closed contours per category in [-1, 1] (x right, y down); a second contour is a hole."""


def shape_mask(category: str, size: int, shrink: float = 1.0) -> Array:
    """Anti-aliased coverage (size, size) in [0, 1] of a shape that spans ``shrink`` of the square."""
    canvas = np.zeros((size * SUPERSAMPLING,) * 2, np.uint8)
    contours = OUTLINES[category]
    points = np.concatenate(contours)
    middle, half = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0).max() / 2
    scale = canvas.shape[0] / 2
    polygons = [np.round(((c - middle) / half * shrink + 1) * scale - 0.5).astype(np.int32) for c in contours]
    cv2.fillPoly(canvas, polygons, 255)  # even-odd, so an inner contour is a hole
    mask = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(mask, np.float32) / 255


def noise(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 3) -> Array:
    """Smooth value noise (height, width) in about [0, 1]; ``cell`` is the size in pixels of its coarsest grain."""
    total = np.zeros((height, width), np.float32)
    weight = 0.0
    for octave in range(octaves):
        step = max(cell / 2**octave, 1.0)
        grid = rng.random((max(2, round(height / step) + 1), max(2, round(width / step) + 1)), dtype=np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
        weight += 1 / 2**octave
    return total / np.float32(weight)


def _turned(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """Pixel coordinates (height, width) of a randomly turned grid."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * c + y * s, y * c - x * s


def _soft_square(phase: Array, sharpness: float = 3.0) -> Array:
    return np.clip(0.5 + 0.5 * sharpness * np.sin(phase), 0, 1).astype(np.float32)


def stripes(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """Slightly wavy stripes (height, width) in [0, 1]; ``period`` in pixels."""
    u, _ = _turned(rng, height, width)
    return _soft_square((u + period * 0.5 * noise(rng, height, width, 3 * period, 1)) * (2 * math.pi / period))


def checker(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """A turned checkerboard (height, width) in [0, 1]."""
    u, v = (_soft_square(a * (2 * math.pi / period)) for a in _turned(rng, height, width))
    return u + v - 2 * u * v


def dots(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """Round dots on a turned lattice (height, width) in [0, 1]."""
    u, v = (np.cos(a * (2 * math.pi / period)) for a in _turned(rng, height, width))
    return np.asarray(np.clip((u + v - 0.4) * 2, 0, 1))


def gradient(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """A linear ramp (height, width) in [0, 1]; ``period`` is unused."""
    u, _ = _turned(rng, height, width)
    return np.asarray((u - u.min()) / max(float(np.ptp(u)), 1.0))


def blotches(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """Soft-edged noise (height, width) in [0, 1]."""
    return np.asarray(np.clip((noise(rng, height, width, 2 * period) - 0.5) * 5 + 0.5, 0, 1))


TEXTURES: tuple[Callable[[np.random.Generator, int, int, float], Array], ...] = (
    stripes,
    checker,
    dots,
    gradient,
    blotches,
)


def colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    """One random RGB colour (3,) in 0..255."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255, np.float32)


def mix(a: Array, b: Array, t: Array) -> Array:
    """Blend colours (3,) or images by a map (height, width): a where t is 0, b where it is 1."""
    return a + (b - a) * t[..., None]


def sprite(rng: np.random.Generator, category: str, size: int, against: Array) -> Array:
    """A textured object.

    Args:
        rng: decides colours and texture, not the shape.
        category: a key of ``OUTLINES``.
        size: side of the square sprite in pixels.
        against: mean RGB (3,) of what lies behind; the rim is chosen to stand out from it.

    Returns:
        Pre-multiplied RGBA (size, size, 4), float32: colour 0..255 times alpha, alpha 0..1.
    """
    first, second = colour(rng, (0.55, 1.0), (0.55, 1.0)), colour(rng, (0.15, 0.9), (0.35, 1.0))
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, size, size, size * rng.uniform(0.16, 0.34))
    rgb = mix(first, second, texture * np.float32(rng.uniform(0.35, 0.8)))
    u, _ = _turned(rng, size, size)
    rgb *= (1 + 0.18 * (u - u.mean()) / size)[..., None]  # light from one side
    rim = np.full(3, 28 if against.mean() > 118 else 238, np.float32)
    alpha = shape_mask(category, size, shrink=1 - 4 / size)  # a clear margin keeps the edges smooth when warped
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * max(1, round(size * 0.022)) + 1,) * 2)
    inside = np.asarray(cv2.erode(alpha, brush), np.float32)
    rgb = mix(mix(rgb, rim, np.full_like(alpha, rng.uniform(0.6, 0.95))), rgb, inside)
    return np.dstack([np.clip(rgb, 0, 255) * alpha[..., None], alpha]).astype(np.float32)
