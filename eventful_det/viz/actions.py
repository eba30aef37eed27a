"""What is recognised in a stream: the likeliest classes, and a strip of their probabilities over the last steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
import torch

from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.recognition.session import RecognitionResult
from eventful_det.runtime.session import Result, StreamResult
from eventful_det.viz.frame import class_colour
from eventful_det.viz.overlay import WIDTH, Caption, annotate
from eventful_det.viz.text import INK, PAPER, Image, width_of, write

_SIDE = 480  # pixels that the shorter side of a picture has at least, so that text can be read
_TOP = 3  # classes that are named
_STEPS = 100  # in the strip


def annotate_action(
    result: RecognitionResult,
    history: Sequence[RecognitionResult],
    costs: Sequence[FrameCost] = (),
    *,
    caption: Caption = Caption(),  # noqa: B008 (immutable)
    width: int = WIDTH,
) -> Image:
    """One picture of a step: what it recognises, its recomputed tokens, what it and the steps before it cost.

    Args:
        result: the step.
        history: the last results, this one the last.
        costs: of the last steps, this one's last.
        caption, width: see `annotate`.

    Returns:
        `(h, w, 3)` uint8 RGB.
    """
    crop = central_crop(result)
    scale = max(1.0, _SIDE / min(crop.shape[:2]))
    size = round(scale * crop.shape[1]), round(scale * crop.shape[0])
    image = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    token = image.shape[0] / result.work.shape[0], image.shape[1] / result.work.shape[1]
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    common = {field.name: getattr(result, field.name) for field in dataclasses.fields(Result)}
    frame = StreamResult(**{**common, "image": image, "token_size": token}, detections=nothing, names=())
    return annotate(frame, costs, caption=caption, width=width, picture=draw_probabilities(image, history))


def central_crop(result: RecognitionResult) -> Image:
    """The part of a frame that the recogniser looks at: in the middle, as wide and high as its tokens."""
    height, width = result.image.shape[:2]
    rows, cols = result.work.shape
    scale = min(height / rows, width / cols)
    high, wide = max(1, round(rows * scale)), max(1, round(cols * scale))
    top, left = (height - high) // 2, (width - wide) // 2
    return result.image[top : top + high, left : left + wide]


def draw_probabilities(image: Image, history: Sequence[RecognitionResult]) -> Image:
    """A copy of an image with the likeliest classes of the last result, and the strip of all results' below.

    In the strip each step is a column; the likeliest classes of the first head fill it from below.
    """
    canvas, last = image.copy(), history[-1]
    height, width = canvas.shape[:2]
    size, strip = max(14, round(height / 26)), height // 8
    head, names = next(iter(last.names.items()))
    canvas[-strip:] = canvas[-strip:] // 4
    for column, result in enumerate(history[-_STEPS:]):
        left, right = (round((column + i) * width / _STEPS) for i in (0, 1))
        floor = float(height)
        scores, labels = result.probabilities[head].topk(min(_TOP, len(names)))
        for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
            ceiling = floor - score * strip
            canvas[round(ceiling) : round(floor), left:right] = class_colour(label)
            floor = ceiling
    y = round(1.4 * size)
    for head, names in last.names.items():
        for name, score in last.top(_TOP, head):
            text = f"{name} {score:.2f}"
            colour = class_colour(names.index(name))
            cv2.rectangle(canvas, (0, y - size), (width_of(text, size) + 2 * size, y + size // 3), PAPER, -1)
            cv2.rectangle(canvas, (0, y - size), (size // 2, y + size // 3), colour, -1)
            write(canvas, text, size, y, size, INK)
            y += round(1.5 * size)
    return canvas
