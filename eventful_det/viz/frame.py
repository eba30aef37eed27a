"""What was found in a frame, and which of its tokens were recomputed."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

from eventful_det.detectors.results import Detections
from eventful_det.viz.text import Colour, Image, ink_on, width_of, write


def class_colour(label: int) -> Colour:
    """The colour of a class; the same in every frame and program, far from those of the next classes."""
    red, green, blue = colorsys.hsv_to_rgb((0.08 + label * 0.618034) % 1.0, 0.72, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image, detections: Detections, names: Sequence[str], show: float = 0.5) -> Image:
    """A copy of an image with the detections whose score is at least `show`; line and text suit its size."""
    canvas = image.copy()
    unit = max(0.8, min(image.shape[:2]) / 360)
    tracks = [-1] * len(detections) if detections.tracks is None else detections.tracks.tolist()
    found = (detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), tracks)
    shown = [([round(v) for v in box], *rest) for box, *rest in zip(*found, strict=True) if rest[0] >= show]
    for (x1, y1, x2, y2), _, label, _ in reversed(shown):  # the best on top
        cv2.rectangle(canvas, (x1, y1), (x2, y2), class_colour(label), round(2 * unit), cv2.LINE_AA)
    for (x1, y1, _, _), score, label, track in reversed(shown):
        name = names[label] if track < 0 else f"{names[label]} #{track}"
        _draw_label(canvas, f"{name} {score:.2f}", x1, y1, round(14 * unit), class_colour(label))
    return canvas


def draw_work(image: Image, work: Tensor, token_size: tuple[float, float]) -> Image:
    """A copy of an image in which the tokens that were recomputed shine and the others are dim and grey.

    Args:
        image: a frame.
        work: `(H, W)` share of its work that each token had done, 0 to 1.
        token_size: height and width of a token in pixels of the image.
    """
    height, width = image.shape[:2]
    rows = np.minimum(np.arange(height) / token_size[0], work.shape[0] - 1).astype(np.intp)
    cols = np.minimum(np.arange(width) / token_size[1], work.shape[1] - 1).astype(np.intp)
    share = np.ascontiguousarray(work.cpu().numpy().astype(np.float32)[rows][:, cols])
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2, cv2.COLOR_GRAY2RGB)
    bright = cv2.LUT(image, _GLOW)
    above, beside = np.diff(rows, prepend=0) > 0, np.diff(cols, prepend=0) > 0
    bright[above] = (0.8 * bright[above]).astype(np.uint8)  # lines between the tokens
    bright[:, beside] = (0.8 * bright[:, beside]).astype(np.uint8)
    return np.asarray(cv2.blendLinear(bright, grey, share, 1 - share), np.uint8)


_GLOW = np.stack([np.arange(256) * 0.8 + tint for tint in (44, 40, 8)], axis=-1).astype(np.uint8)[None]


def _draw_label(canvas: Image, text: str, x: int, y: int, size: int, colour: Colour) -> None:
    """Text on a coloured ground on top of a box's upper left corner, moved into the picture where it would leave it."""
    width, height, pad = width_of(text, size), round(1.4 * size), round(0.35 * size)
    x = max(0, min(x, canvas.shape[1] - width - 2 * pad))
    y = max(0, y - height)
    cv2.rectangle(canvas, (x, y), (x + width + 2 * pad, y + height), colour, -1)
    write(canvas, text, x + pad, y + round(1.05 * size), size, ink_on(colour))
