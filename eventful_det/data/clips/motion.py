"""Moving pictures out of stills: a camera that pans and zooms, and objects that fly through.

Images are `(h, w, 3)` uint8 RGB arrays, boxes `(n, 4)` float32 xyxy in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.boxes import Boxes
from eventful_det.data.video.transforms import Image


@dataclass(frozen=True)
class Camera:
    """Where a camera looks in a picture: the view has its top left corner at (left, top) and is enlarged by `scale`."""

    left: float
    top: float
    scale: float

    def picture(self, canvas: Image, height: int, width: int) -> Image:
        """The view as a picture of the given size."""
        if self.scale == 1 and self.left.is_integer() and self.top.is_integer():
            top, left = int(self.top), int(self.left)
            return np.ascontiguousarray(canvas[top : top + height, left : left + width])
        half = 0.5 / self.scale - 0.5  # centres of pixels, not their corners, fall on each other
        matrix = np.array([[1 / self.scale, 0, self.left + half], [0, 1 / self.scale, self.top + half]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        view = cv2.warpAffine(canvas, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(view, np.uint8)

    def boxes(self, boxes: Boxes) -> Boxes:
        """Boxes of the picture as they lie in the view; not clipped."""
        return np.asarray((boxes - np.array([self.left, self.top] * 2)) * self.scale, np.float32)


def camera_path(
    length: int, canvas: tuple[int, int], view: tuple[int, int], pan: float, zoom: float, rng: np.random.Generator
) -> list[Camera]:
    """A camera that drifts and zooms evenly over a canvas and never looks beyond it.

    Args:
        length: number of frames.
        canvas: (height, width) in pixels.
        view: (height, width) of the frames, no larger.
        pan: largest way per frame along each axis, as a share of the view.
        zoom: largest relative growth per frame; with neither, the camera stands still on whole pixels.
        rng: all randomness comes from it.
    """
    steps = np.arange(length) - (length - 1) / 2
    scale = np.exp(rng.uniform(-zoom, zoom) * steps)
    way = rng.uniform(-pan, pan, 2)
    sides, room = np.array(view), np.array(canvas)
    scale = np.maximum(scale, (sides / room).max())
    middle = rng.uniform(sides / 2, room - sides / 2) + steps[:, None] * way * sides
    spans = sides / scale[:, None]
    corners = np.clip(middle - spans / 2, 0, room - spans)
    if not pan and not zoom:
        corners = corners.round()
    return [Camera(float(x), float(y), float(s)) for (y, x), s in zip(corners, scale, strict=True)]


@dataclass(frozen=True)
class Sprite:
    """A cut-out object that moves along a line.

    Attributes:
        image: `(h, w, 3)`.
        start: (x, y) of its top left corner on the first frame, in pixels.
        way: (x, y) pixels per frame.
    """

    image: Image
    start: tuple[float, float]
    way: tuple[float, float]

    def box(self, t: int) -> NDArray[np.float32]:
        """Its box on frame t, `(4,)`; on whole pixels."""
        x, y = (round(start + way * t) for start, way in zip(self.start, self.way, strict=True))
        return np.array([x, y, x + self.image.shape[1], y + self.image.shape[0]], np.float32)

    def paste(self, canvas: Image, t: int) -> None:
        """Draw it as it is on frame t, with soft elliptical edges, as far as it lies on the canvas."""
        x1, y1, x2, y2 = self.box(t).astype(int)
        height, width = canvas.shape[:2]
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if left >= right or top >= bottom:
            return
        inside = (slice(top - y1, bottom - y1), slice(left - x1, right - x1))
        alpha = _soft_ellipse(y2 - y1, x2 - x1)[inside][..., None]
        behind = canvas[top:bottom, left:right]
        canvas[top:bottom, left:right] = behind + (self.image[inside].astype(np.float32) - behind) * alpha


def _soft_ellipse(height: int, width: int) -> NDArray[np.float32]:
    """1 in the middle of a rectangle, falling to 0 towards its corners."""
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    return np.asarray(np.clip((1.15 - np.abs(y) ** 4 - np.abs(x) ** 4) * 4, 0, 1), np.float32)
