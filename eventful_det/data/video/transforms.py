"""From pictures of any size to network inputs. Images are `(h, w, 3)` uint8 RGB arrays."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]


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


def fit(image: Image, short_side: int, long_side: int) -> Image:
    """Resize to what `fit_size` says."""
    return resize(image, *fit_size(image.shape[0], image.shape[1], short_side, long_side))


def to_tensor(image: Image) -> Tensor:
    """`(h, w, 3)` uint8 to `(3, h, w)` float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)
