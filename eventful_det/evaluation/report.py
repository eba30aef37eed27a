"""A sweep on paper: CSV, JSON, a Markdown table, and a plot of average precision against cost."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eventful_det.evaluation.sweep import Row

# Okabe and Ito's colours, told apart by colour-blind readers and in grey print; markers tell the same again.
_STYLES = (
    ("#0072B2", "o"),
    ("#56B4E9", "D"),
    ("#D55E00", "s"),
    ("#999999", "v"),
    ("#009E73", "^"),
    ("#CC79A7", "P"),
    ("#E69F00", "X"),
    ("#000000", "h"),
)
_CLOSE = 0.02  # "as good as dense" is drawn as a band of two points
_PANELS = (
    ("gmacs_backbone", "backbone GMACs per frame"),
    ("gmacs_total", "detector GMACs per frame"),
    ("ms_mean", "milliseconds per frame"),
)
_COLUMNS = (
    ("method", "method", str),
    ("ap50", "AP50", lambda v: _number(100 * v, 1)),
    ("ap", "AP", lambda v: _number(100 * v, 1)),
    ("agreement50", "agreement", lambda v: _number(100 * v, 1)),
    ("gmacs_backbone", "GMACs backbone", lambda v: _number(v, 2)),
    ("relative_backbone", "of dense", lambda v: _number(100 * v, 0, "%")),
    ("gmacs_total", "GMACs total", lambda v: _number(v, 2)),
    ("relative_total", "of dense", lambda v: _number(100 * v, 0, "%")),
    ("ms_mean", "ms mean", lambda v: _number(v, 1)),
    ("ms_median", "ms median", lambda v: _number(v, 1)),
    ("ms_p95", "ms p95", lambda v: _number(v, 1)),
    ("relative_time", "time of dense", lambda v: _number(100 * v, 0, "%")),
    ("state_bytes", "state MB", lambda v: _number(v / 1e6, 1)),
)


def jsonable(value: Any) -> Any:
    """Dataclasses as dictionaries, `nan` as None, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The main columns as text, the first line being their titles; precisions in percent."""
    lines = [[show(getattr(row, key)) for key, _, show in _COLUMNS] for row in rows]
    return [[title for _, title, _ in _COLUMNS], *lines]


def markdown(rows: Sequence[Row]) -> str:
    """The main columns as a Markdown table."""
    header, *lines = table(rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All columns; empty where a number is not defined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(jsonable(row) for row in rows)


def plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """AP50 against GMACs of the backbone, GMACs of the detector, and time; a PNG."""
    figure = Figure(figsize=(13.5, 5.2), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    dense = [row for row in rows if row.curve == "dense"]
    curves = list(dict.fromkeys(row.curve for row in rows if row.curve != "dense"))
    for axes, (key, label) in zip(panels, _PANELS, strict=True):
        _frame(axes, label, dense)
        for curve, (colour, marker) in zip(curves, _STYLES * len(curves), strict=False):
            _draw_curve(axes, [row for row in rows if row.curve == curve], key, colour, marker)
        for row in dense:
            axes.plot(getattr(row, key), 100 * row.ap50, "*", color="black", markersize=15, zorder=5)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("AP50 (%)", fontsize=11)
    handles = [Line2D([], [], color="black", marker="*", linestyle="", markersize=13, label="dense")] * bool(dense)
    handles += [
        Line2D([], [], color=colour, marker=marker, linewidth=1.8, markersize=6.5, label=curve.replace("_", " "))
        for curve, (colour, marker) in zip(curves, _STYLES * len(curves), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=11)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path)


def _frame(axes: Axes, label: str, dense: Sequence[Row]) -> None:
    axes.set_xlabel(label, fontsize=11)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for row in dense[:1]:
        best = 100 * row.ap50
        axes.axhspan(best - 100 * _CLOSE, best, color="#f1efe2", zorder=0)
        axes.axhline(best, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _draw_curve(axes: Axes, rows: Sequence[Row], key: str, colour: str, marker: str) -> None:
    ordered = sorted(rows, key=lambda row: float(getattr(row, key)))
    x, y = [getattr(row, key) for row in ordered], [100 * row.ap50 for row in ordered]
    axes.plot(x, y, color=colour, marker=marker, linewidth=1.8, markersize=6.5, markeredgecolor="white", zorder=4)


def _number(value: float, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "-"
