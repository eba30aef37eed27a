"""What a frame cost, and those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import cv2

from eventful_det.models.cost import PARTS, FrameCost
from eventful_det.viz.text import FAINT, INK, LINE, Colour, Image, pill, write

PART_COLOURS: dict[str, Colour] = {
    "backbone": (45, 196, 178),
    "pyramid": (86, 146, 246),
    "rpn": (172, 120, 246),
    "roi": (246, 172, 66),
}
_TIME: Colour = (120, 176, 222)
_FLUSH, _HELD = (240, 92, 84), (112, 120, 132)


def draw_cost(
    canvas: Image, cost: FrameCost, held: bool = False, *, dense_seconds: float | None = None, unit: float = 1.0
) -> None:
    """Fill a panel with the numbers of one frame: MACs by part, tokens, time.

    Args:
        canvas: at least 400 x 134 times `unit` pixels.
        cost: of the frame.
        held: the detector did not run.
        dense_seconds: that the dense detector takes for such a frame, if it is known.
        unit: pixels for what is one pixel in a panel of usual size.
    """

    def s(pixels: float) -> int:
        return round(pixels * unit)

    dense, right = max(cost.dense_total, 1), canvas.shape[1]
    _quantity(canvas, f"{cost.total / 1e9:.2f}", "GMACs", cost.total / dense, s(28), unit)
    if held or cost.flush:
        pill(canvas, "HELD" if held else "FLUSH", right, s(23), s(16), _HELD if held else _FLUSH)
    cv2.rectangle(canvas, (0, s(46)), (right - 1, s(62)), LINE, -1)
    _stack(canvas, cost.macs, (s(46), s(62)), right / dense)
    x = 0
    for part in PARTS:
        cv2.rectangle(canvas, (x, s(77)), (x + s(9), s(86)), PART_COLOURS[part], -1)
        x = write(canvas, part, x + s(15), s(87), s(14), FAINT) + s(6)
        x = write(canvas, f"{cost.macs[part] / 1e9:.2f}", x, s(87), s(14)) + s(18)
    if cost.latency:
        share = cost.latency / dense_seconds if dense_seconds else None
        _quantity(canvas, f"{cost.latency * 1e3:.0f}", "ms", share, s(126), unit)
    x = write(canvas, f"of {cost.tokens} tokens", right, s(126), s(16), FAINT, right=True)
    write(canvas, f"{cost.recomputed}", x - s(6), s(126), s(22), right=True)


def draw_history(canvas: Image, history: Sequence[FrameCost], length: int = 100, unit: float = 1.0) -> None:
    """Fill a panel with a strip chart: MACs of the last `length` frames by part, relative to dense."""
    shown = list(history)[-length:]
    mean = sum(c.total for c in shown) / max(sum(c.dense_total for c in shown), 1)
    chart = _Chart(canvas, length, 1.0, unit)
    chart.name(f"GMACs of {length} frames", f"mean {mean:.0%}" if shown else "")
    chart.grid(1.0, "{:.0%}".format)
    for place, cost in enumerate(shown, start=length - len(shown)):
        dense, floor = max(cost.dense_total, 1), 0.0
        for part in PARTS:
            ceiling = floor + cost.macs[part] / dense
            chart.bar(place, floor, ceiling, PART_COLOURS[part])
            floor = ceiling
        chart.mark(place, cost)
    chart.line(1.0)


def draw_latency(
    canvas: Image,
    history: Sequence[FrameCost],
    length: int = 100,
    *,
    dense_seconds: float | None = None,
    unit: float = 1.0,
) -> None:
    """Fill a panel with a strip chart: milliseconds of the last `length` frames; the white line is dense, if known."""
    shown = list(history)[-length:]
    run = sorted(cost.latency for cost in shown if cost.latency)
    usual = run[round(0.95 * (len(run) - 1))] if run else 1e-3
    top = max(usual, dense_seconds or 0.0)
    chart = _Chart(canvas, length, top, unit)
    chart.name("milliseconds", f"mean {1e3 * sum(run) / len(run):.0f}" if run else "")
    chart.grid(dense_seconds or top, lambda value: f"{1e3 * value:.0f}")
    for place, cost in enumerate(shown, start=length - len(shown)):
        chart.bar(place, 0.0, min(cost.latency, 1.1 * top), _TIME)
        chart.mark(place, cost)
    if dense_seconds:
        chart.line(dense_seconds)


class _Chart:
    """Bars over time. There is a little room above `top` for frames that cost more."""

    def __init__(self, canvas: Image, length: int, top: float, unit: float) -> None:
        self.canvas, self.unit = canvas, unit
        self.left, self.bottom = round(44 * unit), canvas.shape[0] - round(10 * unit)
        self.step = (canvas.shape[1] - self.left) / length
        self.height = (self.bottom - round(30 * unit)) / top

    def name(self, title: str, note: str) -> None:
        """Write above the chart."""
        size, y = round(14 * self.unit), round(13 * self.unit)
        write(self.canvas, title, self.left, y, size, FAINT)
        write(self.canvas, note, self.canvas.shape[1], y, size, right=True)

    def grid(self, whole: float, label: Callable[[float], str]) -> None:
        """Lines with labels at nothing, half and all of a value."""
        for value in (0.0, 0.5 * whole, whole):
            self.line(value, LINE)
            x, y = self.left - round(8 * self.unit), self._row(value) + round(5 * self.unit)
            write(self.canvas, label(value), x, y, round(13 * self.unit), FAINT, right=True)

    def line(self, value: float, colour: Colour = INK) -> None:
        """A line from left to right."""
        cv2.line(self.canvas, (self.left, self._row(value)), (self.canvas.shape[1] - 1, self._row(value)), colour, 1)

    def bar(self, place: int, floor: float, ceiling: float, colour: Colour) -> None:
        """A piece of a bar."""
        above, below = self._row(ceiling), self._row(floor)
        if above < below:
            left, right = self._columns(place)
            cv2.rectangle(self.canvas, (left, above), (right, below - 1), colour, -1)

    def mark(self, place: int, cost: FrameCost) -> None:
        """Below the bar, whether the frame was a flush or held."""
        if cost.flush or not cost.total:
            left, right = self._columns(place)
            top, bottom = self.bottom + round(3 * self.unit), self.bottom + round(7 * self.unit)
            cv2.rectangle(self.canvas, (left, top), (right, bottom), _FLUSH if cost.flush else _HELD, -1)

    def _row(self, value: float) -> int:
        return round(self.bottom - value * self.height)

    def _columns(self, place: int) -> tuple[int, int]:
        left, right = round(self.left + place * self.step), round(self.left + (place + 1) * self.step) - 1
        return left, right - (self.step >= 4)


def _quantity(canvas: Image, value: str, name: str, share: float | None, y: int, unit: float) -> None:
    """A number, what it counts, and its share of dense."""
    large, small = round(30 * unit), round(16 * unit)
    x = write(canvas, value, 0, y, large) + round(7 * unit)
    x = write(canvas, name, x, y, small, FAINT) + round(20 * unit)
    if share is not None:
        x = write(canvas, f"{share:.0%}", x, y, large) + round(7 * unit)
        write(canvas, "of dense", x, y, small, FAINT)


def _stack(canvas: Image, macs: Mapping[str, int], rows: tuple[int, int], scale: float) -> None:
    """Horizontal bars of the parts, one after the other."""
    x = 0.0
    for part in PARTS:
        end = x + macs[part] * scale
        if round(end) > round(x):
            cv2.rectangle(canvas, (round(x), rows[0]), (round(end) - 1, rows[1]), PART_COLOURS[part], -1)
        x = end
