"""Words on pictures. Sizes are those of capital letters with their line, about, in pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.errors import printable
from eventful_det.gating.policy import Focus, RandomK, Threshold, TopFraction, TopK, select_all

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

INK, FAINT, LINE, PAPER = (236, 239, 244), (148, 156, 168), (58, 64, 74), (20, 23, 28)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def write(canvas: Image, text: str, x: int, y: int, size: int, colour: Colour = INK, right: bool = False) -> int:
    """Write with the baseline at `y`, from or (`right`) up to `x`; returns where the text ends or (`right`) begins."""
    width = width_of(text, size)
    x = x - width if right else x
    cv2.putText(canvas, printable(text), (x, y), _FONT, size / 32, colour, max(1, round(size / 20)), cv2.LINE_AA)
    return x if right else x + width


def width_of(text: str, size: int) -> int:
    """Pixels that a text is wide."""
    return int(cv2.getTextSize(printable(text), _FONT, size / 32, max(1, round(size / 20)))[0][0])


def shorten(text: str, width: int, size: int) -> str:
    """The text, or its end behind dots where it is wider than `width`; the ends of names and paths tell most."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(f"...{text}", size) > width:
        text = text[1:]
    return f"...{text}"


def pill(canvas: Image, text: str, right: int, y: int, size: int, colour: Colour) -> int:
    """A text on a coloured ground that ends at `right`, with the baseline at `y`; returns where the ground begins."""
    pad = round(0.6 * size)
    left = right - width_of(text, size) - 2 * pad
    cv2.rectangle(canvas, (left, y - round(1.15 * size)), (right - 1, y + round(0.45 * size)), colour, -1)
    write(canvas, text, left + pad, y, size, ink_on(colour))
    return left


def ink_on(ground: Colour) -> Colour:
    """Ink that can be read on a ground."""
    return INK if np.dot(ground, (0.299, 0.587, 0.114)) < 120 else PAPER


def budget_text(budget: object) -> str:
    """A budget or policy in a few words."""
    match budget:
        case None:
            return "dense"
        case TopK(k=tokens) | RandomK(k=int(tokens)) | int(tokens):
            return f"{tokens} tokens"
        case TopFraction(fraction=share) | RandomK(fraction=float(share)) | float(share):
            return f"{share:.0%} of tokens"
        case Threshold(threshold=threshold, cap=cap, floor=floor):
            return f"threshold {threshold:g}, {_between(floor, cap)}"
        case Focus(threshold=threshold, cap=cap, floor=floor):
            return f"focus, threshold {threshold:g}, {_between(floor, cap)}"
        case _:
            return "all tokens" if budget is select_all else str(budget)


def _between(floor: float, cap: float) -> str:
    return f"{floor:.0%} to {cap:.0%}" if floor else f"at most {cap:.0%}"
