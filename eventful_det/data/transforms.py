"""From pictures of any size to network inputs: resizing for inference, augmentation for training.

Images are `(h, w, 3)` uint8 RGB arrays, boxes `(n, 4)` float32 xyxy in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]
Boxes = NDArray[np.float32]


def fit_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """The size of a frame whose short side is scaled to `short_side`, unless its long side would exceed `long_side`.

    The aspect ratio is kept to within rounding; never less than one pixel.
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: Image, height: int, width: int) -> Image:
    """Resize by area when shrinking, bilinearly when growing."""
    if image.shape[:2] == (height, width):
        return image
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), dtype=np.uint8)


def to_tensor(image: Image) -> Tensor:
    """`(h, w, 3)` uint8 to `(3, h, w)` float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation: large-scale jitter to a fixed size, flip, colour.

    Attributes:
        height, width: size of the result in pixels.
        scale: smallest and largest scale relative to the largest that fits into the result.
        flip: probability of a horizontal flip.
        colour: strength of brightness, contrast and saturation jitter; 0 = none.
        min_visible: boxes of which a crop leaves less than this share are dropped.
    """

    height: int = 256
    width: int = 384
    scale: tuple[float, float] = (0.6, 1.6)
    flip: float = 0.5
    colour: float = 0.3
    min_visible: float = 0.3

    def __call__(self, image: Image, boxes: Boxes, rng: np.random.Generator) -> tuple[Image, Boxes, NDArray[np.bool_]]:
        """Augment one picture.

        Returns:
            The picture `(height, width, 3)`, the boxes `(n, 4)` and which of them are kept `(n,)`.
        """
        image, boxes = self._jitter_scale(image, boxes, rng)
        whole = _areas(boxes)
        boxes = np.clip(boxes, 0, [self.width, self.height, self.width, self.height]).astype(np.float32)
        keep = (_areas(boxes) > self.min_visible * whole) & (_areas(boxes) > 1)
        if rng.random() < self.flip:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        return self._jitter_colour(image, rng), boxes, keep

    def _jitter_scale(self, image: Image, boxes: Boxes, rng: np.random.Generator) -> tuple[Image, Boxes]:
        """Scale, then crop or pad to the fixed size at a random place."""
        fit = min(self.height / image.shape[0], self.width / image.shape[1])
        scale = fit * float(np.exp(rng.uniform(*np.log(self.scale))))
        height, width = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
        top = round(rng.uniform(min(0, self.height - height), max(0, self.height - height)))
        left = round(rng.uniform(min(0, self.width - width), max(0, self.width - width)))
        boxes = boxes * np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
        canvas = np.full((self.height, self.width, 3), 128, np.uint8)
        y, x = max(0, top), max(0, left)
        part = resize(image, height, width)[y - top : self.height - top, x - left : self.width - left]
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        return canvas, boxes + np.array([left, top, left, top], np.float32)

    def _jitter_colour(self, image: Image, rng: np.random.Generator) -> Image:
        if not self.colour:
            return image
        brightness, contrast, saturation = 1 + rng.uniform(-self.colour, self.colour, 3)
        picture = image.astype(np.float32)
        grey = picture.mean(axis=2, keepdims=True)
        picture = grey + (picture - grey) * np.float32(saturation)
        picture = (picture - picture.mean()) * np.float32(contrast) + picture.mean() * np.float32(brightness)
        return np.asarray(np.clip(picture + np.float32(0.5), 0, 255), dtype=np.uint8)


def _areas(boxes: Boxes) -> NDArray[np.float32]:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), dtype=np.float32)
