"""Costs as rows of tables, and as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eventful_det.detectors.results import FrameCost
from eventful_det.viz.panel import part_colours


def cost_row(cost: FrameCost) -> dict[str, float]:
    """A frame's cost as one flat row for tables: GMACs and ms by part, tokens, flush."""
    return {
        **{f"gmacs_{part}": macs / 1e9 for part, macs in cost.macs.items()},
        "gmacs_total": cost.total / 1e9,
        **{f"dense_{part}": macs / 1e9 for part, macs in cost.dense.items()},
        "dense_total": cost.dense_total / 1e9,
        **{f"ms_{part}": cost.seconds.get(part, 0.0) * 1e3 for part in (*cost.dense, "other")},
        "ms_total": cost.latency * 1e3,
        "recomputed": cost.recomputed,
        "tokens": cost.tokens,
        "flush": int(cost.flush),
    }


def plot_cost(rows: Mapping[str, NDArray[np.float64]], path: str | os.PathLike[str]) -> None:
    """Plot a run: GMACs per frame by part against dense, and latency.

    Args:
        rows: the columns of `cost_row`, each `(frames,)`; and "held", 1 where the network did not run, if some were.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    frames = np.arange(len(rows["gmacs_total"]) + 1)
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    floor = np.zeros(len(frames))
    parts = [name.removeprefix("gmacs_") for name in rows if name.startswith("gmacs_") and name != "gmacs_total"]
    for part, ink in part_colours(parts).items():
        ceiling = floor + _steps(rows[f"gmacs_{part}"])
        colour = np.divide(ink, 255)
        top.fill_between(frames, floor, ceiling, step="post", label=part, color=colour, linewidth=0)
        floor = ceiling
    top.step(frames, _steps(rows["dense_total"]), where="post", color="black", label="dense", linewidth=1.2)
    share = rows["gmacs_total"].sum() / max(rows["dense_total"].sum(), 1e-9)
    top.set_title(f"mean {rows['gmacs_total'].mean():.2f} GMACs per frame, {share:.0%} of dense", loc="left")
    top.set_ylabel("GMACs")
    top.legend(ncols=len(parts) + 1, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    latency = rows["ms_total"]
    bottom.fill_between(frames, _steps(latency), step="post", color="0.6", linewidth=0)
    median = float(np.median(latency[rows.get("held", np.zeros(len(latency))) == 0]))
    bottom.axhline(median, color="tab:red", linewidth=1, label=f"median {median:.0f} ms where the network ran")
    bottom.set_ylim(0, max(1e-3, 1.1 * float(np.percentile(latency, 99))))
    bottom.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    bottom.set(xlabel="frame", ylabel="ms", xlim=(0, frames[-1]))
    top.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _steps(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(values, values[-1])
