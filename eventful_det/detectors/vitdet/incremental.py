"""Pyramid and proposals that recompute only what a changed token can reach, exact given the token map.

Everything before a 3x3 convolution is computed token by token. The 3x3 convolutions run at a list of cells of all
levels together: those within one cell of a change. Where that is most of a level, the level is computed as a whole; a
frame on which everything changed is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from eventful_det.detectors.vitdet.cells import Layout, cells_run, convolve, layout_of
from eventful_det.detectors.vitdet.macs import level_sizes
from eventful_det.detectors.vitdet.pooling import pool_regions
from eventful_det.detectors.vitdet.roi_heads import RegionOutput, RoIHeads, level_of
from eventful_det.detectors.vitdet.rpn import ProposalGenerator
from eventful_det.detectors.vitdet.vitdet import SCALES, ConvNorm, ViTDetBackbone
from eventful_det.gating.state import TensorTree
from eventful_det.gating.windows import Grid

_STAGES = 4  # p2 to p5 are computed from the token map; p6 is every other cell of p5
TOKEN = 16  # pixels along a side of a token


@dataclass
class HeadsState(TensorTree):
    """What the heads remember of a stream: maps of the levels p2 to p6, and the last proposals.

    Maps are `(cells, C)`, see `cells.Layout`; of the predictions there are none on borders.

    Attributes:
        grid: token grid (H, W).
        inner: before the 3x3 convolutions of the pyramid; p2 to p5 alone.
        feature: the levels.
        hidden: the same after each convolution of the proposal head but the last.
        logits: `(cells * A,)` objectness.
        deltas: `(cells * A, 4)`.
        regions: None before the first frame.
    """

    grid: Grid
    inner: Tensor
    feature: Tensor
    hidden: list[Tensor]
    logits: Tensor
    deltas: Tensor
    regions: RegionOutput | None = None

    @property
    def layout(self) -> Layout:
        """Where the cells lie."""
        return layout_of(tuple(level_sizes(self.grid)), self.feature.device)

    @property
    def levels(self) -> list[Tensor]:
        """The levels p2 to p6, each `(1, C, h, w)`; views of `feature`."""
        return [self.layout.view(i, self.feature)[..., 1:-1, 1:-1] for i in range(len(self.layout.sizes))]


def init_heads(backbone: ViTDetBackbone, generator: ProposalGenerator, tokens: Tensor) -> HeadsState:
    """The state of a stream with token maps like `(H, W, D)`; its first frame has to change every token."""
    grid, head = (tokens.shape[0], tokens.shape[1]), generator.rpn_head
    layout = layout_of(tuple(level_sizes(grid)), tokens.device)
    cells, channels = layout.starts[-1], cast(nn.Conv2d, backbone.simfp_5[-1]).out_channels
    anchors = sum(layout.lengths) * head.objectness_logits.out_channels
    return HeadsState(
        grid=grid,
        inner=tokens.new_zeros(layout.starts[_STAGES], channels),
        feature=tokens.new_zeros(cells, channels),
        hidden=[tokens.new_zeros(cells, channels) for _ in head.convs[:-1]],
        logits=tokens.new_zeros(anchors),
        deltas=tokens.new_zeros(anchors, 4),
    )


@dataclass(frozen=True)
class PyramidUpdate:
    """What of a pyramid was recomputed.

    Attributes:
        cells: `(n,)` of p2 to p6 whose values may have changed, in order.
        sources, convolved: the entries `sources` and `pyramid` of `HeadSizes`.
    """

    cells: Tensor
    sources: tuple[int, ...]
    convolved: tuple[int, ...]


@dataclass(frozen=True)
class ProposalsUpdate:
    """At how many cells the proposal head ran: the entries `rpn` and `predicted` of `HeadSizes`."""

    convolved: tuple[int, ...]
    predicted: int


def refresh_pyramid(backbone: ViTDetBackbone, tokens: Tensor, changed: Tensor, state: HeadsState) -> PyramidUpdate:
    """Recompute the cells of p2 to p6 that changed tokens reach.

    Args:
        backbone: holds the pyramid.
        tokens: `(H, W, D)` the full token map.
        changed: `(r,)` flat indices of the changed tokens.
        state: updated in place.
    """
    layout = state.layout
    y, x = changed // state.grid[1], changed % state.grid[1]
    fine, coarse = (y, x, tokens.flatten(0, 1).index_select(0, changed)), _halve(tokens, y, x)
    sources = [fine, fine, fine, coarse]
    places = zip(backbone.stages, sources, strict=True)
    written = [_refresh_inner(stage, level, source, state) for level, (stage, source) in enumerate(places)]
    reached = layout.union(layout.neighbours(torch.cat(written)))
    counts = layout.per_level(reached)
    for level, (stage, cells) in enumerate(zip(backbone.stages, reached.split(counts), strict=False)):
        _refresh_level(cast(ConvNorm, stage[-1]), level, cells, state)
    top = _refresh_top(reached.split(counts)[_STAGES - 1], state)
    return PyramidUpdate(
        cells=torch.cat([reached, top]),
        sources=tuple(len(rows) for rows, _, _ in sources),
        convolved=tuple(map(cells_run, counts[:_STAGES], layout.lengths)),
    )


def refresh_proposals(generator: ProposalGenerator, state: HeadsState, cells: Tensor) -> ProposalsUpdate:
    """Recompute objectness and deltas where changed cells `(n,)` reach, updating the state."""
    layout, head, convolved = state.layout, generator.rpn_head, []
    neighbours = layout.neighbours(cells)
    for conv, source, target in zip(head.convs, [state.feature, *state.hidden], [*state.hidden, None], strict=True):
        cells = layout.union(neighbours)
        neighbours, counts = layout.neighbours(cells), layout.per_level(cells)
        rows = convolve(cast(nn.Conv2d, conv), source, layout, cells, neighbours, counts).relu_()  # (n, C)
        convolved.append(sum(map(cells_run, counts, layout.lengths)))
        if target is not None:
            target.index_copy_(0, cells, rows)
    places = layout.place.index_select(0, cells)
    for layer, values in ((head.objectness_logits, state.logits), (head.anchor_deltas, state.deltas)):
        update = F.linear(rows, layer.weight.flatten(1), layer.bias)  # (n, A) or (n, 4 A)
        values.view(-1, update.shape[1]).index_copy_(0, places, update)
    return ProposalsUpdate(tuple(convolved), len(cells))


def refresh_regions(
    heads: RoIHeads, proposals: Tensor, changed: Tensor, state: HeadsState, size: tuple[int, int]
) -> tuple[RegionOutput, int]:
    """Judge the proposals `(n, 4)`; only new or touched ones are computed.

    A proposal that is bit-identical to one of the last frame, and whose regions saw no changed cell, keeps its result.

    Args:
        heads: the region heads.
        proposals: of this frame.
        changed: `(r,)` flat indices of the changed tokens.
        state: levels are read, regions are replaced.
        size: (height, width) of the frame in pixels.

    Returns:
        What the heads say of them, and the number of proposals that were computed.
    """
    before = state.regions
    known = torch.full((len(proposals),), -1, dtype=torch.long, device=proposals.device)
    if before is not None and len(before.read) and len(proposals):
        same = (proposals[:, None] == before.proposals[None]).all(dim=-1)  # (n, those before)
        found, place = same.max(dim=1)
        read, canonical = before.read, heads.config.canonical_box
        dirty = touched(read.flatten(0, 1), canonical, changed, state.grid).view(read.shape[:2]).any(dim=1)
        known = torch.where(found & ~dirty[place], place, -1)
    fresh = (known < 0).nonzero().squeeze(1)

    def pool(boxes: list[Tensor]) -> Tensor:
        return pool_regions(state.feature, state.layout, torch.cat(boxes), heads.config.canonical_box)

    output = heads.score(pool, [proposals[fresh]], [size])
    if before is not None and len(fresh) < len(proposals):
        kept = before.map(lambda values: values[known.clamp(min=0)])
        pairs = zip(kept.tensors(), output.tensors(), strict=True)
        output = RegionOutput(*(old.index_copy(0, fresh, new) for old, new in pairs))
    state.regions = output
    return output, len(fresh)


def touched(proposals: Tensor, canonical_box: float, changed: Tensor, grid: Grid) -> Tensor:
    """Whether the regions that proposals are read from may hold a cell that changed tokens reach.

    Args:
        proposals: `(n, 4)` xyxy in pixels.
        canonical_box: side in pixels of a box that is read from p4.
        changed: `(r,)` flat indices of the changed tokens.
        grid: token grid (H, W).

    Returns:
        `(n,)` booleans.
    """
    tokens = torch.zeros(grid, dtype=torch.long, device=changed.device)
    tokens.view(-1).index_fill_(0, changed, 1)
    sums = F.pad(tokens.cumsum(0).cumsum(1), (1, 0, 1, 0)).flatten()
    stride = 4 << level_of(proposals, canonical_box)[:, None]
    corners = proposals / stride - 0.5
    low, high = corners[:, :2].floor().long(), corners[:, 2:].ceil().long() + 1  # first and last cell that is read
    limit = torch.tensor([grid[1], grid[0]], device=changed.device)
    first = ((low - 1) * stride).div(TOKEN, rounding_mode="floor").clamp(min=0).minimum(limit)
    end = (((high + 2) * stride - 1).div(TOKEN, rounding_mode="floor") + 1).clamp(min=0).minimum(limit)
    (x1, y1), (x2, y2) = first.unbind(1), end.unbind(1)
    y1, y2 = y1 * (grid[1] + 1), y2 * (grid[1] + 1)
    return sums[y2 + x2] - sums[y1 + x2] - sums[y2 + x1] + sums[y1 + x1] > 0


def _refresh_inner(
    stage: nn.Sequential, level: int, sources: tuple[Tensor, Tensor, Tensor], state: HeadsState
) -> Tensor:
    """Recompute what the last convolution of a pyramid stage reads of changed source cells.

    Args:
        stage: of the pyramid.
        level: that it makes.
        sources: `(n,)` rows and columns of the changed cells of the map that the stage starts from, and their `(n, D)`
            values.
        state: updated in place.

    Returns:
        The cells of the level that were written.
    """
    y, x, values = sources
    values = values[:, None, None]  # (n, 1, 1, D)
    for layer in stage[:-1]:
        values = _pointwise(layer, values)  # (n, s, s, C)
    within = torch.arange(SCALES[level], device=y.device)
    rows, cols = (place[:, None] * SCALES[level] + within for place in (y, x))  # (n, s)
    cells = state.layout.numbers(level, rows[:, :, None], cols[:, None]).flatten()  # (n, s, s) to (n * s * s,)
    state.inner.index_copy_(0, cells, values.flatten(0, 2))
    return cells


def _refresh_level(last: ConvNorm, level: int, cells: Tensor, state: HeadsState) -> None:
    """Recompute a level at some cells `(n,)` of it, updating the state."""
    layout = state.layout
    counts = [len(cells) if i == level else 0 for i in range(len(layout.sizes))]
    rows = convolve(last, state.inner, layout, cells, layout.neighbours(cells), counts)
    state.feature.index_copy_(0, cells, _normalise(last.norm, rows))


def _refresh_top(cells: Tensor, state: HeadsState) -> Tensor:
    """Take p6 from recomputed cells `(n,)` of p5; returns its cells that changed."""
    y, x = state.layout.positions(_STAGES - 1, cells)
    even = (y % 2 + x % 2 == 0).nonzero().squeeze(1)
    top = state.layout.numbers(_STAGES, y[even] // 2, x[even] // 2)
    state.feature.index_copy_(0, top, state.feature.index_select(0, cells[even]))
    return top


def _halve(tokens: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the map `(H, W, D)` of 2x2 maxima changes with tokens at rows `y` and columns `x`: `sources` of p5."""
    height, width = tokens.shape[0] // 2, tokens.shape[1] // 2
    changed = torch.zeros(height + 1, width + 1, dtype=torch.bool, device=tokens.device)  # the last may be half a cell
    changed.view(-1).index_fill_(0, y // 2 * (width + 1) + x // 2, True)
    y, x = changed[:height, :width].nonzero().unbind(1)
    first = 2 * (y * tokens.shape[1] + x)
    four = [tokens.flatten(0, 1).index_select(0, first + more) for more in (0, 1, tokens.shape[1], tokens.shape[1] + 1)]
    return y, x, torch.stack(four).amax(dim=0)


def _pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer of a pyramid stage on separate patches of cells, `(n, s, s, C)`.

    A transposed convolution whose stride is its size turns every cell into 2x2 cells, so it is a matrix product.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        n, side, _, channels = x.shape
        x = x.reshape(-1, channels) @ layer.weight.flatten(1)  # (n * s * s, C' * 2 * 2)
        x = x.view(n, side, side, layer.out_channels, 2, 2).permute(0, 1, 4, 2, 5, 3)  # (n, s, 2, s, 2, C')
        return x.reshape(n, 2 * side, 2 * side, layer.out_channels) + cast(Tensor, layer.bias)
    if isinstance(layer, nn.Conv2d):  # with its norm: a ConvNorm, or detectron2's Conv2d
        return _normalise(cast(ConvNorm, layer).norm, F.linear(x, layer.weight.flatten(1)))
    if hasattr(layer, "normalized_shape"):
        return _normalise(cast(LayerNorm2d, layer), x)
    return x if isinstance(layer, nn.MaxPool2d) else cast(Tensor, layer(x))  # the maximum was taken before


def _normalise(norm: LayerNorm2d, x: Tensor) -> Tensor:
    """Layer norm over channels that come last."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
