"""Words on pictures. Sizes are those of capital letters with their line, about, in pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.errors import printable
from eventful_det.gating.selector import DEFAULT, Budget, Focus, LargestError, Policy, RandomOrder, Selector

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


def budget_text(budget: Budget | Selector) -> str:
    """A budget or selector in a few words."""
    if budget is None or budget == DEFAULT:
        return f"default, up to {budget_text(DEFAULT.budget)}"
    if isinstance(budget, Selector):
        limit = "" if budget.budget is None else f", {budget_text(budget.budget)}"
        return f"{_policy_text(budget.policy)}{limit}"
    if isinstance(budget, float):
        return f"{budget:.0%} of tokens"
    return f"{budget} tokens" if isinstance(budget, int) else str(budget)


def _policy_text(policy: Policy) -> str:
    match policy:
        case Focus(threshold=threshold):
            return f"focus, threshold {threshold:g}"
        case LargestError(threshold=None):
            return "largest errors"
        case LargestError(threshold=threshold):
            return f"threshold {threshold:g}"
        case RandomOrder():
            return "random"
        case _:
            return getattr(policy, "__name__", type(policy).__name__)
