"""Sizes in, MACs out, for the heads of a detector: of frames that ran, and of frames before they run.

A frame is described by its `HeadSizes`: at how many cells each part of the heads ran. `HeadWeights.macs` turns sizes
into MACs. `DetectorCosts` works out the sizes for every number of tokens that may be recomputed, before any is: tokens
are taken in a given order, and a cell is reached as soon as one token of its neighbourhood is taken, so the smallest
rank around each cell, sorted, tells how many cells any beginning of the order reaches.

Example: five tokens in a row are taken in the order 2, 0, 4, 1, 3, so that their ranks are 1, 3, 0, 4, 2. The smallest
rank within one cell of each is 1, 0, 0, 0, 2: the first token reaches three cells, two reach four, three reach all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.vitdet.cells import SPARSE_MAC
from eventful_det.detectors.vitdet.roi_heads import POOL
from eventful_det.detectors.vitdet.rpn import ProposalHead
from eventful_det.detectors.vitdet.vitdet import SCALES, ViTDetBackbone
from eventful_det.gating.macs import RowsCosts, ViTShape
from eventful_det.gating.windows import Grid

N = TypeVar("N", int, Tensor)


def level_sizes(grid: Grid) -> list[Grid]:
    """Cells (rows, columns) of the levels p2 to p6 over a token grid of stride 16."""
    rows, cols = grid
    p5 = (rows // 2, cols // 2)
    return [(4 * rows, 4 * cols), (2 * rows, 2 * cols), grid, p5, (-(-p5[0] // 2), -(-p5[1] // 2))]


@dataclass(frozen=True)
class HeadSizes(Generic[N]):
    """At how many places the heads run on a frame; numbers, or tensors of them for many frames.

    Attributes:
        sources: tokens (2x2 tokens of p5) from which each pyramid stage p2 to p5 starts.
        pyramid: cells at which the last convolution of each of these stages runs.
        rpn: cells of all levels at which each 3x3 convolution of the proposal head runs.
        predicted: cells at which its last layers run.
        regions: proposals that the region heads judge.
    """

    sources: tuple[N, ...]
    pyramid: tuple[N, ...]
    rpn: tuple[N, ...]
    predicted: N
    regions: N


@dataclass(frozen=True)
class HeadWeights:
    """MACs of the heads at one place, for each of the entries of `HeadSizes`."""

    sources: tuple[int, ...]
    pyramid: tuple[int, ...]
    rpn: tuple[int, ...]
    predicted: int
    regions: int

    @staticmethod
    def of(backbone: ViTDetBackbone, head: ProposalHead, roi_heads: nn.Module) -> HeadWeights:
        """Those of a detector; reading the regions is not counted."""
        convolutions = sum(m.weight.numel() for m in roi_heads.modules() if isinstance(m, nn.Conv2d))
        linears = sum(m.weight.numel() for m in roi_heads.modules() if isinstance(m, nn.Linear))
        return HeadWeights(
            sources=tuple(stage_macs(stage[:-1]) for stage in backbone.stages),
            pyramid=tuple(cast(nn.Conv2d, stage[-1]).weight.numel() for stage in backbone.stages),
            rpn=tuple(cast(nn.Conv2d, conv).weight.numel() for conv in head.convs),
            predicted=head.objectness_logits.weight.numel() + head.anchor_deltas.weight.numel(),
            regions=convolutions * POOL**2 + linears,
        )

    def macs(self, sizes: HeadSizes[N]) -> dict[str, N]:
        """MACs by part."""
        return {
            "pyramid": _total(self.sources + self.pyramid, sizes.sources + sizes.pyramid),
            "rpn": _total(self.rpn, sizes.rpn) + self.predicted * sizes.predicted,
            "roi": self.regions * sizes.regions,
        }

    def dense(self, grid: Grid, proposals: int) -> dict[str, int]:
        """MACs by part of the dense heads over a token grid."""
        levels = [rows * cols for rows, cols in level_sizes(grid)]
        tokens, cells = levels[2], sum(levels)
        sources = (tokens, tokens, tokens, levels[3])
        return self.macs(HeadSizes(sources, tuple(levels[:4]), (cells,) * len(self.rpn), cells, proposals))


def _total(weights: tuple[int, ...], sizes: tuple[N, ...]) -> N:
    """The sum of weights x sizes."""
    total = weights[0] * sizes[0]
    for weight, size in zip(weights[1:], sizes[1:], strict=True):
        total = total + weight * size
    return total


def stage_macs(stage: Iterable[nn.Module]) -> int:
    """MACs of a chain of convolutions on one cell of the map that it starts from."""
    cells, macs = 1, 0
    for layer in stage:
        if isinstance(layer, nn.ConvTranspose2d):
            macs += cells * layer.weight.numel()
            cells *= layer.stride[0] * layer.stride[1]
        elif isinstance(layer, nn.Conv2d):
            macs += cells * layer.weight.numel()
    return macs


@dataclass(frozen=True)
class DetectorCosts:
    """What a gated frame will cost for every number of tokens that may be recomputed: a `CostModel`.

    Backbone, pyramid and proposal head are exact under the `Rows` rule with the patch gate. Of the region heads only a
    bound is known in advance, since which proposals survive depends on the values.

    Attributes:
        shape: of the backbone.
        weights: of the heads.
        proposals: that the region heads judge at most.
        static: windows take as many tiles as if tokens lay as scattered as can be, see `Rows`.
    """

    shape: ViTShape
    weights: HeadWeights
    proposals: int
    static: bool

    @property
    def variable(self) -> str:
        """The part of which only a bound is known."""
        return "roi"

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """See `CostModel.macs`."""
        heads = self.weights.macs(self._sizes(ranks(grid, order), len(order)))
        total = RowsCosts(self.shape, self.static).macs(grid, order) + heads["pyramid"] + heads["rpn"]
        total[1:] += int(heads["roi"].max()) if variable is None else variable
        return total

    def everything(self, grid: Grid) -> int:
        """See `CostModel.everything`."""
        return _everything(self, grid)

    def _sizes(self, rank: Tensor, count: int) -> HeadSizes[Tensor]:
        """The sizes, each `(n + 1,)`, from the ranks `(H, W)` of the tokens."""
        halved = -F.max_pool2d(-rank[None].float(), 2)[0].int()
        starts = (rank, rank, rank, halved)
        spread = [
            start.repeat_interleave(s, 0).repeat_interleave(s, 1) for start, s in zip(starts, SCALES, strict=True)
        ]
        levels = [around(level) for level in spread]
        pyramid = tuple(convolved(level, count) for level in levels)
        levels.append(levels[-1][::2, ::2])  # p6
        rpn = []
        for _ in self.weights.rpn:
            levels = [around(level) for level in levels]  # each convolution reaches one cell further
            rpn.append(torch.stack([convolved(level, count) for level in levels]).sum(0))
        return HeadSizes(
            sources=tuple(reached(start, count) for start in starts),
            pyramid=pyramid,
            rpn=tuple(rpn),
            predicted=torch.stack([reached(level, count) for level in levels]).sum(0),
            regions=torch.tensor([self.proposals], device=rank.device),
        )


@lru_cache(maxsize=64)
def _everything(costs: DetectorCosts, grid: Grid) -> int:
    return int(costs.macs(grid, torch.arange(grid[0] * grid[1]))[-1])


def ranks(grid: Grid, order: Tensor) -> Tensor:
    """`(H, W)` place of each token in an order `(n,)`; n for those that are not in it."""
    rank = torch.full((grid[0] * grid[1],), len(order), dtype=torch.int32, device=order.device)
    rank[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return rank.view(grid)


def convolved(rank: Tensor, count: int) -> Tensor:
    """`(n + 1,)` at how many cells of a level a convolution runs for those that are reached, see `cells_run`."""
    cells = reached(rank, count)
    return torch.where(cells.double() * SPARSE_MAC > rank.numel(), rank.numel(), cells)


def reached(rank: Tensor, count: int) -> Tensor:
    """`(n + 1,)` how many cells have a rank below 0, 1, ... n."""
    return F.pad(torch.bincount(rank.flatten(), minlength=count + 1)[:count].cumsum(0), (1, 0))


def around(rank: Tensor) -> Tensor:
    """The smallest rank within one cell of each, `(h, w)`."""
    for dim in (0, 1):
        least, length = rank.clone(), rank.shape[dim] - 1
        for low, high in ((0, 1), (1, 0)):
            target = least.narrow(dim, low, length)
            torch.minimum(target, rank.narrow(dim, high, length), out=target)
        rank = least
    return rank
