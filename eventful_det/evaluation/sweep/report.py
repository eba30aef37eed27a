"""A sweep on paper: CSV, JSON, a Markdown table, and a plot of average precision against cost."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eventful_det.evaluation.sweep.runs import DENSE
from eventful_det.evaluation.sweep.summary import Row
from eventful_det.files import JsonObject
from eventful_det.outputs import as_json, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers and in grey print; markers tell the same again.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#999999", "#009E73", "#CC79A7", "#E69F00", "#000000")
_MARKERS = "oDsv^p<hX"  # one more than there are colours, so that no two of many curves look alike
_CLOSE = 0.02  # "as good as dense" is drawn as a band of two points
_DEPTH = 0.3  # how far below dense the picture reaches at most
_PANELS = ("backbone, GMACs per frame", "whole detector, GMACs per frame", "time per frame, ms")
_LINE: dict[str, Any] = {"linewidth": 1.8, "markersize": 7, "markeredgecolor": "white"}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The main columns as text, the most important first; precisions in percent. The first line holds the titles."""
    return [list(_cells(row)) for row in rows[:1]] + [list(_cells(row).values()) for row in rows]


def _cells(row: Row) -> dict[str, str]:
    return {
        "method": row.method,
        "AP50": percent(row.ap50, 1),
        "AP": percent(row.ap, 1),
        "slow": percent(row.ap50_slow, 1),
        "medium": percent(row.ap50_medium, 1),
        "fast": percent(row.ap50_fast, 1),
        "agree": percent(row.agreement50, 1),
        "alike": percent(row.likeness, 1),
        "found": percent(row.found, 1),
        "flicker": percent(row.flicker, 1),
        "GMACs backbone": f"{row.gmacs_backbone:.2f} ({percent(row.relative_backbone)}%)",
        "GMACs total": f"{row.gmacs_total:.2f} ({percent(row.relative_total)}%)",
        "p95 / median": f"{row.p95_to_median:.2f}" if math.isfinite(row.p95_to_median) else "-",
        "time %": percent(row.relative_time),
        "ms": f"{row.ms_mean:.1f}",
        "ms median": f"{row.ms_median:.1f}",
        "ms p95": f"{row.ms_p95:.1f}",
        "fps": f"{row.fps:.1f}",
        "state MB": f"{row.state_bytes / 1e6:.1f}",
        "peak MB": f"{row.peak_bytes / 1e6:.0f}",
    }


def markdown(rows: Sequence[Row]) -> str:
    """The main columns as a Markdown table; below it, how many frames are in no number."""
    text = markdown_table(table(rows))
    skipped = max(row.skipped for row in rows)
    return f"{text}\n{skipped} frames could not be read and are in no number.\n" if skipped else text


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All columns; empty where a number is not defined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = [f.name for f in dataclasses.fields(Row) if not f.name.endswith("_by_class")]
        writer = csv.DictWriter(file, ["method", *(name for name in names if name != "method")], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cast(list[JsonObject], as_json(rows)))


def plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """AP50 against MACs of the backbone, MACs of the detector, and time; PNG, PDF or SVG by the suffix of `path`.

    Without labels, agreement with the dense detector takes the place of AP50.
    Curves whose precision falls far below that of dense leave the picture at its lower edge.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.4), dpi=160, layout="constrained")
    curves = list(dict.fromkeys(row.curve for row in rows if row.curve != DENSE))
    styles = dict(zip(curves, zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), _dashes()), strict=False))
    dense = next((row for row in rows if row.curve == DENSE), None)
    labelled = any(math.isfinite(row.ap50) for row in rows)
    precision = attrgetter("ap50" if labelled else "agreement50")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for panel, axes in enumerate(panels):
        _frame(axes, _PANELS[panel])
        if dense is not None:
            _draw_dense(axes, 100 * precision(dense), _costs(dense, dense)[panel])
        for curve, (colour, marker, dash) in styles.items():
            points = sorted((row for row in rows if row.curve == curve), key=lambda row: row.gmacs_total)
            x, y = [_costs(row, dense)[panel] for row in points], [100 * precision(row) for row in points]
            alone = len(points) == 1  # is seen on top of curves that pass through it
            style = {"color": colour, "marker": marker, "linestyle": dash, "zorder": 4 + alone, **_LINE}
            axes.plot(x, y, label=curve.replace("_", " "), **style)
        axes.set_xlim(left=0)
    if dense is not None:
        panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 100 * (precision(dense) - _DEPTH)))
    panels[0].set_ylabel("AP50 (%)" if labelled else "agreement with dense, AP50 (%)", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=11)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    with rc_context({"pdf.fonttype": 42}):  # text that journals accept and editors can edit
        figure.savefig(path)


def _dashes() -> Iterator[str]:
    """Lines of curves: solid while their colours are new, dashed from the first that comes again."""
    return itertools.chain(["-"] * len(_COLOURS), itertools.repeat("--"))


def _costs(row: Row, dense: Row | None) -> tuple[float, float, float]:
    """What the panels show.

    Time is what a frame costs: the paired ratio to dense in milliseconds of dense, which suffers least from other load;
    where there is none, because another process ran dense, the plain measurement.
    """
    ms = 1e3 / row.fps
    if dense is not None and math.isfinite(row.relative_time):
        ms = row.relative_time * 1e3 / dense.fps
    return row.gmacs_backbone, row.gmacs_total, ms


def _frame(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=11)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_dense(axes: Axes, ap: float, cost: float) -> None:
    """A star, the band within two points of it, and costs in percent of it along the top."""
    axes.axhspan(ap - 100 * _CLOSE, ap, color="#f1efe2", zorder=0)
    axes.axhline(ap, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(cost, ap, "*", color="black", markersize=16, label=DENSE, zorder=5)
    share = axes.secondary_xaxis(
        "top", functions=(partial(operator.mul, 100 / cost), partial(operator.mul, cost / 100))
    )
    share.set_xlabel("% of dense", fontsize=9, color="#777777")
    share.tick_params(labelsize=9, colors="#777777", length=0)
    share.spines["top"].set_visible(False)


def percent(value: float, digits: int = 0) -> str:
    """A share in percent, as text; "-" where it is not defined."""
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else "-"
