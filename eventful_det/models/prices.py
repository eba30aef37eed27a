"""What a gated frame will cost for every number of tokens that may be recomputed, before any is.

Tokens are taken in a given order. A cell of a map is reached as soon as one token of its neighbourhood is taken, so the
smallest rank around each cell, sorted, tells how many cells any beginning of the order reaches: the whole list of
prices comes from one pass over the maps.

Backbone, pyramid and proposal head are exact under the `Rows` rule with the patch gate. Of the region heads only a
bound is known in advance, since which proposals survive depends on the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Grid, anatomy_of
from eventful_det.gating.closed_form import ViTShape, WindowLoad, rows_counts
from eventful_det.gating.rows import Rows
from eventful_det.gating.rows_attention import most_tiles, queries_per_tile
from eventful_det.gating.windows import windows_of
from eventful_det.models.cost import roi_macs, stage_macs
from eventful_det.models.detector import Detector
from eventful_det.models.incremental import SCALES
from eventful_det.models.cells import SPARSE_MAC


@dataclass(frozen=True)
class PriceList:
    """Prices of the frames of a detector.

    Attributes:
        shape: of the backbone.
        sources: MACs of each pyramid stage p2 to p5 before its last convolution, per changed token (2x2 tokens, p5).
        last: MACs of the last convolution of each stage per cell.
        convs: MACs of each 3x3 convolution of the proposal head per cell.
        predict: MACs of its last layers per cell.
        regions: MACs of the region heads at most.
        static: windows take as many tiles as if tokens lay as scattered as can be, see `Rows`.
    """

    shape: ViTShape
    sources: tuple[int, ...]
    last: tuple[int, ...]
    convs: tuple[int, ...]
    predict: int
    regions: int
    static: bool

    @staticmethod
    def of(detector: Detector) -> PriceList:
        """The prices of a detector.

        Raises:
            UserError: it has no rule whose cost is known in advance.
        """
        if not isinstance(detector.rule, Rows) or detector.rule.gate != "patches":
            raise UserError("costs are known in advance under the rows rule with the patch gate only")
        backbone, head = detector.backbone, detector.proposal_generator.rpn_head
        stages = (backbone.simfp_2, backbone.simfp_3, backbone.simfp_4, backbone.simfp_5)
        grids = ((1, 1), (1, 1), (1, 1), (2, 2))
        static = detector.rule.static
        return PriceList(
            shape=ViTShape.of(anatomy_of(backbone.net)),
            sources=tuple(stage_macs(stage[:-1], grid) for stage, grid in zip(stages, grids, strict=True)),
            last=tuple(cast(nn.Conv2d, stage[-1]).weight.numel() for stage in stages),
            convs=tuple(cast(nn.Conv2d, conv).weight.numel() for conv in head.convs),
            predict=head.objectness_logits.weight.numel() + head.anchor_deltas.weight.numel(),
            regions=roi_macs(detector.roi_heads, detector.config.proposals),
            static=detector.device.type != "cpu" if static is None else static,
        )

    def prices(self, grid: Grid, order: Tensor, regions: int | None = None) -> Tensor:
        """Price a frame.

        Args:
            grid: token grid (H, W), N = H * W.
            order: `(n,)` flat indices of the tokens that may be recomputed, in the order in which they are taken.
            regions: MACs of the region heads whenever a token is recomputed; None = the most there can be.

        Returns:
            `(n + 1,)` MACs of the whole detector if the first 0, 1, ... n tokens are recomputed; they do not fall.
        """
        count, tokens = len(order), grid[0] * grid[1]
        rank = torch.full((tokens,), count, dtype=torch.int32, device=order.device)
        rank[order] = torch.arange(count, dtype=torch.int32, device=order.device)
        total = self._heads(rank.view(grid), count) + self._backbone(grid, order)
        total[1:] += self.regions if regions is None else regions
        return total

    def whole(self, grid: Grid) -> int:
        """MACs of the whole detector at most if all tokens are recomputed."""
        return _whole(self, grid)

    def _backbone(self, grid: Grid, order: Tensor) -> Tensor:
        """`(n + 1,)` MACs of the backbone."""
        nothing, one, token, tile = _backbone_terms(self.shape, grid)
        taken = torch.arange(len(order) + 1, device=order.device)
        total = one + token * (taken - 1)
        if self.shape.windowed:
            side = self.shape.window
            tiles = _most_tiles(grid, side, order.device)[taken] if self.static else _tiles(grid, side, order)
            total += tile * (tiles - 1)
        total[0] = nothing
        return total

    def _heads(self, rank: Tensor, count: int) -> Tensor:
        """`(n + 1,)` MACs of pyramid and proposal head, cell by cell, from the ranks `(H, W)` of the tokens."""
        halved = -F.max_pool2d(-rank[None].float(), 2)[0].int()
        total = torch.zeros(count + 1, dtype=torch.long, device=rank.device)
        starts = (rank, rank, rank, halved)
        for start, scale, source, last in zip(starts, SCALES, self.sources, self.last, strict=True):
            level = _around(start.repeat_interleave(scale, 0).repeat_interleave(scale, 1))
            total += source * _reached(start, count) + last * _convolved(level, count)
            total += self._proposals(level, count)
        return total + self._proposals(level[::2, ::2], count)

    def _proposals(self, rank: Tensor, count: int) -> Tensor:
        """`(n + 1,)` MACs of the proposal head on one level: each convolution reaches one cell further."""
        total = torch.zeros(count + 1, dtype=torch.long, device=rank.device)
        for weight in self.convs:
            rank = _around(rank)
            total += weight * _convolved(rank, count)
        return total + self.predict * _reached(rank, count)


@lru_cache(maxsize=64)
def _whole(price_list: PriceList, grid: Grid) -> int:
    return int(price_list.prices(grid, torch.arange(grid[0] * grid[1]))[-1])


@lru_cache(maxsize=64)
def _backbone_terms(shape: ViTShape, grid: Grid) -> tuple[int, int, int, int]:
    """MACs for no token, for one, for each more, and for each more tile of queries in windows."""
    tile = queries_per_tile(shape.window**2)

    def macs(selected: int, tiles: int) -> int:
        return rows_counts(shape, grid, selected, WindowLoad(tiles, tile)).macs

    one = macs(1, 1)
    return macs(0, 0), one, macs(2, 1) - one, macs(1, 2) - one


def _tiles(grid: Grid, side: int, order: Tensor) -> Tensor:
    """`(n + 1,)` tiles that the queries of windows fill, when the first 0, 1, ... n tokens are taken."""
    windows, count = windows_of(grid, side, order.device), len(order)
    window = windows.window[order]
    held = torch.bincount(window, minlength=windows.count)
    by_window = window.argsort(stable=True)
    place = torch.empty_like(window)  # how many tokens of its window come before each
    place[by_window] = torch.arange(count, device=order.device) - (held.cumsum(0) - held)[window[by_window]]
    begins = place % queries_per_tile(windows.slots) == 0
    return F.pad(begins.cumsum(0), (1, 0))


@lru_cache(maxsize=64)
def _most_tiles(grid: Grid, side: int, device: torch.device) -> Tensor:
    """`(N + 1,)` the most tiles that 0, 1, ... N tokens fill."""
    windows = windows_of(grid, side, torch.device("cpu"))
    most = [most_tiles(count, windows.count, windows.slots) for count in range(grid[0] * grid[1] + 1)]
    return torch.tensor(most, device=device)


def _convolved(rank: Tensor, count: int) -> Tensor:
    """`(n + 1,)` at how many cells of a level a convolution runs for those that are reached, see `maps.convolve`."""
    reached = _reached(rank, count)
    return torch.where(reached.double() * SPARSE_MAC > rank.numel(), rank.numel(), reached)


def _reached(rank: Tensor, count: int) -> Tensor:
    """`(n + 1,)` how many cells have a rank below 0, 1, ... n."""
    return F.pad(torch.bincount(rank.flatten(), minlength=count + 1)[:count].cumsum(0), (1, 0))


def _around(rank: Tensor) -> Tensor:
    """The smallest rank within one cell of each, `(h, w)`."""
    for dim in (0, 1):
        least, length = rank.clone(), rank.shape[dim] - 1
        for low, high in ((0, 1), (1, 0)):
            target = least.narrow(dim, low, length)
            torch.minimum(target, rank.narrow(dim, high, length), out=target)
        rank = least
    return rank
