"""What a frame cost, and those before it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.detectors.results import FrameCost
from eventful_det.viz.text import FAINT, INK, LINE, Colour, Image, pill, write

_COLOURS: tuple[Colour, ...] = ((45, 196, 178), (86, 146, 246), (172, 120, 246), (246, 172, 66))
_TIME: Colour = (120, 176, 222)
_FLUSH, _HELD = (240, 92, 84), (112, 120, 132)


def part_colours(parts: Iterable[str]) -> dict[str, Colour]:
    """The colours of the parts of a detector, in their order."""
    return dict(zip(parts, itertools.cycle(_COLOURS)))


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
    for part, colour in part_colours(cost.dense).items():
        cv2.rectangle(canvas, (x, s(77)), (x + s(9), s(86)), colour, -1)
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
    dense = np.array([max(cost.dense_total, 1) for cost in shown])
    total = sum(cost.total for cost in shown)
    chart = _Chart(canvas, shown, length, 1.0, unit)
    chart.name(f"GMACs of {length} frames", f"mean {total / dense.sum():.0%}" if shown else "")
    chart.grid(1.0, "{:.0%}".format)
    floor = np.zeros(len(shown))
    for part, colour in part_colours(shown[-1].dense if shown else ()).items():
        ceiling = floor + np.array([cost.macs[part] for cost in shown]) / dense
        chart.bars(floor, ceiling, colour)
        floor = ceiling
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
    seconds = np.array([cost.latency for cost in shown])
    run = seconds[seconds > 0]
    usual = float(np.percentile(run, 95)) if run.size else 1e-3
    top = max(usual, dense_seconds or 0.0)
    chart = _Chart(canvas, shown, length, top, unit)
    chart.name("milliseconds", f"mean {1e3 * run.mean():.0f}" if run.size else "")
    chart.grid(dense_seconds or top, lambda value: f"{1e3 * value:.0f}")
    chart.bars(np.zeros(len(shown)), np.minimum(seconds, 1.1 * top), _TIME)
    if dense_seconds:
        chart.line(dense_seconds)


class _Chart:
    """Bars over time, and marks below those of flushes and held frames.

    Args:
        canvas: to fill.
        shown: the last frames, `length` at most.
        length: frames that there is room for.
        top: the value at the upper end, save a little room for frames above it.
        unit: see `draw_cost`.
    """

    def __init__(self, canvas: Image, shown: Sequence[FrameCost], length: int, top: float, unit: float) -> None:
        self.canvas, self.unit = canvas, unit
        self.left, self.bottom = round(44 * unit), canvas.shape[0] - round(10 * unit)
        self.height = (self.bottom - round(30 * unit)) / top
        step = (canvas.shape[1] - self.left) / length
        place = (np.arange(canvas.shape[1] - self.left) / step).astype(np.intp)
        drawn = place >= length - len(shown)
        if step >= 4:
            drawn &= np.diff(place, append=length) == 0  # a gap between the bars
        self._columns, self._frames = self.left + np.flatnonzero(drawn), place[drawn] - (length - len(shown))
        below = np.s_[self.bottom + round(3 * unit) : self.bottom + round(7 * unit)]
        for colour, chosen in ((_FLUSH, [c.flush for c in shown]), (_HELD, [not c.total for c in shown])):
            canvas[below, self._columns[np.array(chosen, bool)[self._frames]]] = colour

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

    def bars(self, floors: NDArray[np.float64], ceilings: NDArray[np.float64], colour: Colour) -> None:
        """A piece of the bar of each frame."""
        below, above = (np.rint(self.bottom - v * self.height).astype(int)[self._frames] for v in (floors, ceilings))
        rows = np.arange(self.bottom)[:, None]
        y, x = np.nonzero((above <= rows) & (rows < below))
        self.canvas[y, self._columns[x]] = colour

    def _row(self, value: float) -> int:
        return round(self.bottom - value * self.height)


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
    for part, colour in part_colours(macs).items():
        end = x + macs[part] * scale
        if round(end) > round(x):
            cv2.rectangle(canvas, (round(x), rows[0]), (round(end) - 1, rows[1]), colour, -1)
        x = end
