"""Training augmentation: pictures and their boxes, scaled, cropped, flipped and spoilt as video frames are.

Images are `(h, w, 3)` uint8 RGB arrays, boxes `(n, 4)` float32 xyxy in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.video.transforms import Image, resize
from eventful_det.errors import UserError
from eventful_det.options import NonNegative, Range, Share, convert_fields

_Side = Annotated[int, Range(32, 8192)]
_Scale = Annotated[float, Range(0, 16, above=True)]
Boxes = NDArray[np.float32]
_SPLIT = (0.35, 0.65)  # where a mosaic is divided, as a share of each side
_BLUR = (3, 9)  # shortest and longest motion blur in pixels
_NOISE = (2.0, 12.0)  # standard deviation of sensor noise in grey levels
_JPEG = (25, 80)  # quality


@dataclass(frozen=True)
class Augmentation:
    """Large-scale jitter to a given size, flip, colour, and the flaws of video frames.

    Attributes:
        sizes: (height, width) in pixels that pictures are brought to; a batch has one of them.
        scale: smallest and largest scale relative to the largest that fits into the result.
        aspect: pictures are stretched by up to this factor in either direction; 1 = never.
        flip: probability of a horizontal flip.
        rotate: every second picture is turned by up to this many degrees; 0 = none. Its boxes become those of the
            turned ellipses inscribed in them, which fit objects closer than those of the turned corners.
        turn: probability of a quarter turn, to either side, as of cameras that look down; 0 = none.
        colour: strength of brightness, contrast and saturation jitter; 0 = none.
        hue: largest turn of the colour circle, 0.5 = to the opposite colours; 0 = none.
        degrade: probability of each of motion blur, noise and JPEG compression.
        min_visible: boxes of which a crop leaves less than this share are dropped.
        min_side: boxes that become smaller than a square of this side in pixels are dropped.
        mosaic: probability of a sample made of four pictures (Bochkovskiy et al. 2020, YOLOv4).
    """

    sizes: tuple[tuple[_Side, _Side], ...] = ((256, 384),)
    scale: tuple[_Scale, _Scale] = (0.6, 1.6)
    aspect: Annotated[float, Range(1, 100)] = 1.0
    flip: Share = 0.5
    rotate: Annotated[float, Range(0, 180)] = 0.0
    turn: Share = 0.0
    colour: Share = 0.3
    hue: Annotated[float, Range(0, 0.5)] = 0.0
    degrade: Share = 0.0
    min_visible: Share = 0.3
    min_side: NonNegative = 1.0
    mosaic: Share = 0.0

    def __post_init__(self) -> None:
        convert_fields(self, "augment")
        if not self.sizes or self.scale[0] > self.scale[1]:
            raise UserError("augment: sizes must name one, and scale be [smallest, largest]")

    def __call__(
        self, image: Image, boxes: Boxes, size: Sequence[int], rng: np.random.Generator
    ) -> tuple[Image, Boxes, NDArray[np.bool_]]:
        """Augment one picture.

        Args:
            image: of any size.
            boxes: of its objects.
            size: (height, width) of the result in pixels.
            rng: all randomness comes from it.

        Returns:
            The picture `(height, width, 3)`, the boxes `(n, 4)` and which of them are kept `(n,)`.
        """
        height, width = size
        if self.turn and rng.random() < self.turn:
            image, boxes = _quarter_turned(image, boxes, clockwise=bool(rng.random() < 0.5))
        if self.rotate and rng.random() < 0.5:
            image, boxes = _rotated(image, boxes, float(rng.uniform(-self.rotate, self.rotate)))
        image, boxes = self._jitter_scale(image, boxes, height, width, rng)
        whole = areas(boxes)
        boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
        keep = (areas(boxes) > self.min_visible * whole) & (areas(boxes) > self.min_side**2)
        if rng.random() < self.flip:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return self._degrade(self._jitter_colour(image, rng), rng), boxes, keep

    def cells(self, size: Sequence[int], rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
        """Where the pictures of a sample lie, each (top, left, bottom, right): one, or four around a point."""
        height, width = size
        if rng.random() >= self.mosaic:
            return [(0, 0, height, width)]
        y, x = (round(side * rng.uniform(*_SPLIT)) for side in size)
        return [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]

    def _jitter_scale(
        self, image: Image, boxes: Boxes, height: int, width: int, rng: np.random.Generator
    ) -> tuple[Image, Boxes]:
        """Scale and stretch, then crop or pad to the fixed size at a random place."""
        fit = min(height / image.shape[0], width / image.shape[1])
        scale = fit * float(np.exp(rng.uniform(*np.log(self.scale))))
        stretch = self.aspect ** (rng.uniform(-0.5, 0.5) if self.aspect > 1 else 0.0)
        h, w = max(1, round(image.shape[0] * scale / stretch)), max(1, round(image.shape[1] * scale * stretch))
        top = round(rng.uniform(min(0, height - h), max(0, height - h)))
        left = round(rng.uniform(min(0, width - w), max(0, width - w)))
        boxes = boxes * np.array([w / image.shape[1], h / image.shape[0]] * 2, np.float32)
        canvas = np.full((height, width, 3), 128, np.uint8)
        y, x = max(0, top), max(0, left)
        part = resize(image, h, w)[y - top : height - top, x - left : width - left]
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        return canvas, boxes + np.array([left, top, left, top], np.float32)

    def _jitter_colour(self, image: Image, rng: np.random.Generator) -> Image:
        if self.hue:
            image = _turn_hue(image, float(rng.uniform(-self.hue, self.hue)))
        if not self.colour:
            return image
        brightness, contrast, saturation = 1 + rng.uniform(-self.colour, self.colour, 3)
        picture = image.astype(np.float32)
        grey = picture.mean(axis=2, keepdims=True)
        picture = grey + (picture - grey) * np.float32(saturation)
        picture = (picture - picture.mean()) * np.float32(contrast) + picture.mean() * np.float32(brightness)
        return np.asarray(np.clip(picture + np.float32(0.5), 0, 255), dtype=np.uint8)

    def _degrade(self, image: Image, rng: np.random.Generator) -> Image:
        if not self.degrade:
            return image
        blur, noise, compress = rng.random(3) < self.degrade
        if blur:
            image = _motion_blur(image, int(rng.integers(*_BLUR, endpoint=True)), float(rng.uniform(0, np.pi)))
        if noise:
            image = _add_noise(image, float(rng.uniform(*_NOISE)), rng)
        return _compress(image, int(rng.integers(*_JPEG))) if compress else image


def _rotated(image: Image, boxes: Boxes, degrees: float) -> tuple[Image, Boxes]:
    """A picture turned about its middle, grey where it has no content, and the boxes of the turned ellipses."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(128, 128, 128))
    middle = (boxes[:, :2] + boxes[:, 2:] - 1) / 2 @ matrix[:, :2].T + matrix[:, 2] + 0.5
    half = np.sqrt(((boxes[:, 2:] - boxes[:, :2]) / 2) ** 2 @ (matrix[:, :2] ** 2).T)
    return np.asarray(turned, np.uint8), np.concatenate([middle - half, middle + half], axis=1).astype(np.float32)


def _quarter_turned(image: Image, boxes: Boxes, clockwise: bool) -> tuple[Image, Boxes]:
    """A picture on its side, whole, so that height and width change places."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = boxes.T
    corners = [height - y2, x1, height - y1, x2] if clockwise else [y1, width - x2, y2, width - x1]
    turned = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE if clockwise else cv2.ROTATE_90_COUNTERCLOCKWISE)
    return np.asarray(turned, np.uint8), np.stack(corners, axis=1).astype(np.float32)


def _turn_hue(image: Image, turn: float) -> Image:
    """Colours turned around the circle; 1 is the whole of it."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps around, as the circle does
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8)


def _motion_blur(image: Image, length: int, angle: float) -> Image:
    """Smear along a line of `length` pixels at `angle` radians."""
    kernel = np.zeros((length, length), np.float32)
    centre = (length - 1) / 2
    reach = centre * np.array([np.cos(angle), np.sin(angle)])
    ends = [tuple(int(round(centre + sign * r)) for r in reach) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    return np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum()), np.uint8)


def _add_noise(image: Image, sigma: float, rng: np.random.Generator) -> Image:
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(sigma)
    return np.asarray(np.clip(image + noise + np.float32(0.5), 0, 255), np.uint8)


def _compress(image: Image, quality: int) -> Image:
    """There and back through JPEG."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    spoilt = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return np.asarray(cv2.cvtColor(spoilt, cv2.COLOR_BGR2RGB), np.uint8)


def areas(boxes: Boxes) -> NDArray[np.float32]:
    """Areas of boxes `(n, 4)`, `(n,)`."""
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), dtype=np.float32)
