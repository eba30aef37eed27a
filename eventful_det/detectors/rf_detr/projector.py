"""The projector where changed tokens reach, exact given the feature maps; and what that costs.

Everything but the 3x3 convolutions is token-wise. These run within one cell more at each step, see `models.cells`: a
convolution most of whose cells are asked for is computed as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.detectors.protocol import CostModel
from eventful_det.detectors.rf_detr.parts import ConvNorm, DecoderShape, Projector
from eventful_det.detectors.vitdet.cells import cells_run, convolve, layout_of
from eventful_det.detectors.vitdet.macs import around, convolved, ranks, reached
from eventful_det.gating.macs import RowsCosts, ViTShape
from eventful_det.gating.state import TensorTree
from eventful_det.gating.windows import Grid


@dataclass
class ProjectorState(TensorTree):
    """What the projector remembers of a stream. Maps are `(cells, C)`, with borders, see `cells.Layout`.

    Attributes:
        half: the first half after the first convolution.
        maps: the second half, and the result of each 3x3 convolution.
        feature: `(N, C)` the result.
    """

    half: Tensor
    maps: list[Tensor]
    feature: Tensor


@dataclass(frozen=True)
class ProjectorSizes:
    """At how many cells the first convolution, each 3x3 convolution and the last one ran."""

    first: int
    inner: tuple[int, ...]
    last: int


def init_projector(projector: Projector, grid: Grid, like: Tensor) -> ProjectorState:
    """Allocate the state; its first refresh has to be of all tokens."""
    cells = len(layout_of((grid,), like.device).inside)
    hidden = projector.hidden
    return ProjectorState(
        half=like.new_zeros(cells, hidden),
        maps=[like.new_zeros(cells, hidden) for _ in range(len(projector.inner) + 1)],
        feature=like.new_zeros(grid[0] * grid[1], projector.last.conv.out_channels),
    )


def refresh_projector(projector: Projector, tokens: Tensor, changed: Tensor, state: ProjectorState) -> ProjectorSizes:
    """Recompute what changed tokens reach.

    Args:
        projector: the projector.
        tokens: `(H, W, C)` feature maps of all output blocks.
        changed: `(r,)` tokens that may differ from the last refresh.
        state: updated in place.
    """
    grid = (tokens.shape[0], tokens.shape[1])
    layout = layout_of((grid,), tokens.device)
    cells = layout.numbers(0, changed // grid[1], changed % grid[1])
    rows = _point(projector.first, tokens.flatten(0, 1).index_select(0, changed))  # (r, 2 C')
    half, rest = rows.split(projector.hidden, 1)
    state.half.index_copy_(0, cells, half)
    state.maps[0].index_copy_(0, cells, rest)
    ran = []
    for step, source, target in zip(projector.inner, state.maps, state.maps[1:], strict=False):
        cells = layout.union(layout.neighbours(cells))
        rows = convolve(step.conv, source, layout, cells, layout.neighbours(cells), [len(cells)])
        target.index_copy_(0, cells, step.after(rows))
        ran.append(cells_run(len(cells), len(state.feature)))
    together = [state.half, *state.maps[::2]]
    rows = projector.norm(_point(projector.last, torch.cat([values.index_select(0, cells) for values in together], 1)))
    state.feature.index_copy_(0, layout.place.index_select(0, cells), rows)
    return ProjectorSizes(len(changed), tuple(ran), len(cells))


def _point(step: ConvNorm, rows: Tensor) -> Tensor:
    """A 1x1 convolution of some cells `(n, C)`."""
    return step.after(rows @ step.conv.weight.flatten(1).T)


def projector_macs(projector: Projector, sizes: ProjectorSizes) -> int:
    """MACs of a refresh."""
    inner = sum(count * step.conv.weight.numel() for count, step in zip(sizes.inner, projector.inner, strict=True))
    return sizes.first * projector.first.conv.weight.numel() + inner + sizes.last * projector.last.conv.weight.numel()


def everywhere(projector: Projector, grid: Grid) -> ProjectorSizes:
    """The sizes of the dense projector."""
    tokens = grid[0] * grid[1]
    return ProjectorSizes(tokens, (tokens,) * len(projector.inner), tokens)


@dataclass(frozen=True)
class RFDETRCosts(CostModel):
    """What frames will cost, for every number of tokens that may be recomputed: a `CostModel`. It is exact.

    Attributes:
        shape: of the backbone.
        static: see `Rows`.
        projector: the projector.
        decoder: its sizes.
    """

    shape: ViTShape
    static: bool
    projector: Projector
    decoder: DecoderShape

    @property
    def variable(self) -> str:
        """The decoder's cost is known, too; it is all or nothing."""
        return "decoder"

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """See `CostModel.macs`."""
        count, tokens = len(order), grid[0] * grid[1]
        rank = ranks(grid, order)
        total = RowsCosts(self.shape, self.static).macs(grid, order)
        total = total + self.projector.first.conv.weight.numel() * reached(rank, count)
        for step in self.projector.inner:
            rank = around(rank)
            total = total + step.conv.weight.numel() * convolved(rank, count)
        total = total + self.projector.last.conv.weight.numel() * reached(rank, count)
        total[1:] += self.decoder.macs(tokens) if variable is None else variable
        return total
