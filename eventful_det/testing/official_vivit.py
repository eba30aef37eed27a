"""What the official code counts for action recognition, in closed form: a step, a window, the head, a whole clip.

Its figures leave out the tubelet embedding. On a clip, views that share tubelets are our addition.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple

from eventful_det.gating.macs import Ablation, ViTShape, paper_sizes
from eventful_det.gating.windows import Grid
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.views import shared_tubelets
from eventful_det.testing.official import OfficialCounts, official_counts, official_dense


def model_step(shape: ViTShape, grid: Grid, k: int | None = None, ablation: Ablation = "full") -> OfficialCounts:
    """A step of a sub-model in which every gate lets `k` tokens through; None = dense, or a flush."""
    position = OfficialCounts(add=shape.dim)  # of the class token
    if k is None:
        return official_dense(shape, grid) + position
    return official_counts(shape, grid, paper_sizes(shape, grid, k), ablation) + position


def spatial_step(config: RecogniserConfig, k: int | None = None, ablation: Ablation = "full") -> OfficialCounts:
    """A step of the spatial model; see `model_step`."""
    shape = _shape(config.dim, config.depth, config.heads, config.mlp)
    return model_step(shape, config.grid, k, ablation)


def temporal_window(config: RecogniserConfig) -> OfficialCounts:
    """The temporal model on the outputs of one view."""
    shape = _shape(config.dim, config.temporal_depth, config.temporal_heads, config.temporal_mlp)
    return model_step(shape, (1, config.steps))


def head(config: RecogniserConfig) -> OfficialCounts:
    """The first head on one view."""
    classes = len(next(iter(config.classes.values())))
    return OfficialCounts(linear=config.dim * classes, bias=classes)


def clip_counts(config: RecogniserConfig, k: int | None = None, ablation: Ablation = "full") -> OfficialCounts:
    """A clip with all its views, each computed by itself."""
    views = config.spatial_views * config.temporal_views
    spatial = times(spatial_step(config), views) + times(spatial_step(config, k, ablation), views * (config.steps - 1))
    return spatial + times(temporal_window(config) + head(config), views)


def shared_counts(config: RecogniserConfig, lengths: Iterable[int], k: int | None = None) -> float:
    """Operations per clip where temporal views share tubelets, on average over clips of some lengths in frames.

    Each crop of a clip is one stream over its distinct tubelets, flushed at the first and behind each gap.
    """
    views = config.spatial_views * config.temporal_views
    flush, step = spatial_step(config).total, spatial_step(config, k).total
    window = views * (temporal_window(config) + head(config)).total
    totals = []
    for length in lengths:
        starts, _ = shared_tubelets(length, config)
        unit = config.tubelet[0] * config.stride
        flushes = 1 + sum(b - a != unit for a, b in zip(starts, starts[1:], strict=False))
        totals.append(config.spatial_views * (flushes * flush + (len(starts) - flushes) * step) + window)
    return sum(totals) / len(totals)


def times(counts: OfficialCounts, number: int) -> OfficialCounts:
    """Those of so many like it."""
    return OfficialCounts(*(number * value for value in astuple(counts)))


def _shape(dim: int, depth: int, heads: int, mlp: int) -> ViTShape:
    return ViTShape(depth, dim, heads, linear=4 * dim**2 + 2 * dim * mlp, channels=0, prefix=1)
