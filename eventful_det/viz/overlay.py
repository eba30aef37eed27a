"""One picture that tells all about a frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from eventful_det.detectors.results import FrameCost
from eventful_det.runtime.session import StreamResult
from eventful_det.viz.frame import draw_detections, draw_work
from eventful_det.viz.panel import draw_cost, draw_history, draw_latency
from eventful_det.viz.text import FAINT, PAPER, Colour, Image, pill, shorten, width_of, write

WIDTH = 1584
_NARROW = 960  # pixels; below, everything is in one column
_FRESH, _OLD, _STALE = (64, 178, 112), (226, 158, 50), (226, 76, 70)


@dataclass(frozen=True)
class Caption:
    """What a result does not know.

    Attributes:
        budget: in force.
        dense_seconds: that the dense detector takes for such a frame.
    """

    budget: str = ""
    dense_seconds: float | None = None


@dataclass(frozen=True)
class _Layout:
    """How much room there is for what, in pixels."""

    columns: int
    column: int
    view: tuple[int, int]
    unit: float

    @staticmethod
    def of(height: int, width: int, total: int) -> _Layout:
        """For a frame of some size, in a picture of at most `total` pixels width."""
        columns = 2 if total >= _NARROW else 1
        margin = round(16 * _unit(total / columns))
        room = (total - margin) // columns - margin
        scale = min(room / width, room / height)
        view = max(1, round(height * scale)), max(1, round(width * scale))
        column = max(view[1], round(0.75 * room)) if columns == 2 else room
        return _Layout(columns, column, view, _unit(room))

    def px(self, pixels: float) -> int:
        """Pixels for what is so many in a column of 768."""
        return round(pixels * self.unit)

    @property
    def margin(self) -> int:
        return self.px(16)

    @property
    def header(self) -> int:
        """Height of the lines above the views."""
        return self.px(44 if self.columns == 2 else 62)

    @property
    def panel(self) -> int:
        """Height of what is below the views."""
        return self.px(140) if self.columns == 2 else self.px(140 + 16 + 2 * 104)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        views = self.view[0] if self.columns == 2 else 2 * self.view[0] + self.margin
        width = self.columns * (self.column + self.margin) + self.margin
        return self.header + views + self.panel + 2 * self.margin, width


def annotate(
    result: StreamResult,
    history: Sequence[FrameCost] = (),
    show: float = 0.5,
    *,
    caption: Caption = Caption(),  # noqa: B008 (immutable)
    width: int = WIDTH,
    picture: Image | None = None,
) -> Image:
    """One picture of a frame: its detections, its recomputed tokens, what it and the frames before it cost.

    Args:
        result: the frame.
        history: costs of the last frames, this one's last.
        show: detections of a lower score are not drawn.
        caption: what else is known.
        width: of the picture in pixels, at least 320; upright frames make it narrower.
        picture: of the frame's size, to be shown in place of the frame and its detections.

    Returns:
        `(h, w, 3)` uint8 RGB. Its size depends on `width` and on the aspect ratio of the frame alone.
    """
    layout = _Layout.of(result.image.shape[0], result.image.shape[1], max(width, 320))
    height, width = layout.size
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.tile(np.array(PAPER, np.uint8), (width, 1))  # row by row: thrice as fast as pixel by pixel
    if layout.columns == 2:
        _draw_wide_header(canvas, layout, result, caption)
    else:
        _draw_narrow_header(canvas, layout, result, caption)
    _draw_views(canvas, layout, result, show, picture)
    _draw_panel(canvas, layout, result, history, caption)
    return canvas


def _unit(column: float) -> float:
    """Text keeps a size that can be read in narrow columns."""
    return min(max(column / 768, 0.72), 2.0)


def _draw_views(canvas: Image, layout: _Layout, result: StreamResult, show: float, picture: Image | None) -> None:
    height, width = layout.view
    scale_y, scale_x = height / result.image.shape[0], width / result.image.shape[1]
    method = cv2.INTER_AREA if scale_x < 0.5 else cv2.INTER_LINEAR  # which is much faster, and as good down to a half
    view = np.asarray(cv2.resize(result.image, (width, height), interpolation=method), np.uint8)
    token = result.token_size[0] * scale_y, result.token_size[1] * scale_x
    if picture is None:
        found = draw_detections(view, result.detections.scaled(scale_x, scale_y), result.names, show)
    else:
        found = np.asarray(cv2.resize(picture, (width, height), interpolation=method), np.uint8)
    x, y = layout.margin + (layout.column - width) // 2, layout.header
    canvas[y : y + height, x : x + width] = found
    if layout.columns == 2:
        x += layout.column + layout.margin
    else:
        y += height + layout.margin
    canvas[y : y + height, x : x + width] = draw_work(view, result.work, token)


def _draw_panel(
    canvas: Image, layout: _Layout, result: StreamResult, history: Sequence[FrameCost], caption: Caption
) -> None:
    dense, unit = caption.dense_seconds, layout.unit
    panel = canvas[-layout.panel - layout.margin : -layout.margin, layout.margin : -layout.margin]
    numbers = panel[: layout.px(140), : layout.column]
    if layout.columns == 2:
        charts = panel[:, layout.column + layout.margin :]
        half = (layout.column - layout.margin) // 2
        first, second = charts[:, :half], charts[:, -half:]
    else:
        height = layout.px(104)
        first, second = panel[-2 * height : -height], panel[-height:]
    draw_cost(numbers, result.cost, result.held, dense_seconds=dense, unit=unit)
    draw_history(first, history, unit=unit)
    draw_latency(second, history, dense_seconds=dense, unit=unit)


def _draw_wide_header(canvas: Image, layout: _Layout, result: StreamResult, caption: Caption) -> None:
    size, y = layout.px(17), layout.px(28)
    edge = layout.margin + layout.column
    free = _draw_age(canvas, layout, result, edge, y)
    clock = _clock(result)
    name = shorten(_name(result), free - layout.margin - width_of(clock, size) - layout.px(40), size)
    x = write(canvas, name, layout.margin, y, size) + layout.px(14) * bool(name)
    write(canvas, clock, x, y, size, FAINT)
    write(canvas, "recomputed tokens", edge + layout.margin, y, size, FAINT)
    _draw_budget(canvas, layout, caption, canvas.shape[1] - layout.margin, y)


def _draw_narrow_header(canvas: Image, layout: _Layout, result: StreamResult, caption: Caption) -> None:
    size, edge = layout.px(17), canvas.shape[1] - layout.margin
    free = _draw_age(canvas, layout, result, edge, layout.px(24))
    name = shorten(_name(result), free - 2 * layout.margin, size)
    write(canvas, name, layout.margin, layout.px(24), size)
    write(canvas, _clock(result), layout.margin, layout.px(50), size, FAINT)
    _draw_budget(canvas, layout, caption, edge, layout.px(50))


def _name(result: StreamResult) -> str:
    """The name of the stream; of files without their folders."""
    return result.stream if "://" in result.stream else os.path.basename(result.stream)


def _clock(result: StreamResult) -> str:
    if result.timestamp is None:
        return f"frame {result.frame_index}"
    return f"frame {result.frame_index}   {result.timestamp:.2f} s"


def _draw_budget(canvas: Image, layout: _Layout, caption: Caption, right: int, y: int) -> None:
    if caption.budget:
        x = write(canvas, caption.budget, right, y, layout.px(17), right=True)
        write(canvas, "budget", x - layout.px(8), y, layout.px(17), FAINT, right=True)


def _draw_age(canvas: Image, layout: _Layout, result: StreamResult, right: int, y: int) -> int:
    """Of a live source, how old the frame is and how many were dropped; returns where the free room ends."""
    if result.frame_age is None:
        return right
    colour: Colour = _FRESH if result.frame_age < 0.5 else _OLD if result.frame_age < 2 else _STALE
    x = pill(canvas, f"LIVE  {result.frame_age:.2f} s old", right, y, layout.px(15), colour) - layout.px(12)
    if result.dropped:
        x = write(canvas, f"{result.dropped} dropped", x, y, layout.px(15), FAINT, right=True) - layout.px(12)
    return x
