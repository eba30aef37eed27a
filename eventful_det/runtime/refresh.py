"""When to recompute everything: scene cuts, found from the pixels before any token is spent."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 16  # thumbnail side in pixels: small enough that pans and moving objects hardly change it


@dataclass
class SceneCuts:
    """Tells whether a frame shows another scene than the frame before.

    Thumbnails of consecutive frames are compared by their correlation, which ignores changes of exposure.

    Attributes:
        threshold: below this correlation, -1 to 1, a frame is a cut.
        last: thumbnail of the last frame, zero mean and unit norm.
    """

    threshold: float = 0.6
    last: NDArray[np.float32] | None = None

    def __call__(self, image: NDArray[np.uint8]) -> bool:
        """Whether `image` `(h, w, 3)` begins a new scene; the first frame does not count as a cut."""
        small = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        small -= small.mean(axis=(0, 1))
        small /= max(float(np.linalg.norm(small)), 1e-6)
        before, self.last = self.last, small
        return before is not None and float((before * small).sum()) < self.threshold
