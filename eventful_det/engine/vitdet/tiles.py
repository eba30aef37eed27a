"""Where attention windows lie on the levels of a pyramid: what its 3x3 convolutions read and write of each.

They run on tiles: windows with a halo, or a level as a whole where that has fewer cells. What is around is read from
maps that the caller keeps, as lists of cells, see `vitdet.cells`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eventful_det.detectors.vitdet.cells import Layout, layout_of
from eventful_det.detectors.vitdet.macs import HeadSizes, level_sizes
from eventful_det.gating.windows import Grid

_CPU = torch.device("cpu")
STAGES = 4  # levels p2 to p5 are made from tokens; p6 is every other cell of p5


@dataclass(frozen=True)
class LevelTiles:
    """The windows of a frame on one level, as numbers of cells.

    Attributes:
        own: `(windows, s^2)` the cells of each, s along a side; `Geometry.nowhere` outside of the level.
        read, write: the same with a halo, for every 3x3 convolution: `(windows, side, side)` what is read, cell 0 (a
            border, always zero) outside, and `(windows, side^2)` what is written.
        places: as the last of `write`, but numbered as predictions are.
    """

    own: Tensor
    read: tuple[Tensor, Tensor]
    write: Tensor
    places: Tensor


@dataclass(frozen=True)
class Geometry:
    """Where windows lie on the levels of a pyramid.

    Attributes:
        grid: tokens of the frame.
        window: side of a window in tokens.
        convs: 3x3 convolutions of the proposal head.
    """

    grid: Grid
    window: int
    convs: int

    @cached_property
    def layout(self) -> Layout:
        """The cells of all levels."""
        return layout_of(tuple(level_sizes(self.grid)), _CPU)

    @property
    def nowhere(self) -> int:
        """Number of a cell past the last, to which what lies outside is written."""
        return self.layout.starts[-1]

    @property
    def anchors(self) -> int:
        """Cells of all levels without borders."""
        return sum(self.layout.lengths)

    def side(self, level: int) -> int:
        """Cells of a window along a side."""
        return 4 * self.window >> level

    @cached_property
    def levels(self) -> list[LevelTiles]:
        """The windows on p2 to p5."""
        return [self._tiles(level) for level in range(STAGES)]

    def is_tiled(self, level: int, count: int) -> bool:
        """Whether so many windows with their halos have fewer cells than the level."""
        if level >= STAGES:
            return False
        return count * (self.side(level) + 2 * (1 + self.convs)) ** 2 < self.layout.lengths[level]

    def sizes(self, count: int) -> HeadSizes[int]:
        """At how many places the heads run for so many windows; regions are left out."""
        cells = self.layout.lengths
        around = [
            [
                count * (self.side(level) + 2 * (1 + halo)) ** 2 if self.is_tiled(level, count) else cells[level]
                for level in range(len(cells))
            ]
            for halo in range(self.convs + 1)
        ]
        # Of several convolutions the first run further out, so that the last has what it reads.
        rpn = [
            sum(
                count * (self.side(level) + 2 * (1 + 2 * self.convs - done)) ** 2
                if self.is_tiled(level, count)
                else cells[level]
                for level in range(len(cells))
            )
            for done in range(1, self.convs + 1)
        ]
        tokens = count * self.window**2
        return HeadSizes(
            (tokens, tokens, tokens, tokens // 4), tuple(around[0][:STAGES]), tuple(rpn), sum(around[-1]), 0
        )

    def _tiles(self, level: int) -> LevelTiles:
        inside = [self._cells(level, halo) for halo in (0, 1, 1 + self.convs)]
        reads = [self._cells(level, halo, outside=0) for halo in (2, 1 + 2 * self.convs)]
        places = torch.cat([self.layout.place, torch.tensor([self.anchors])])[inside[2]]
        return LevelTiles(inside[0].flatten(1), (reads[0], reads[1]), inside[1].flatten(1), places.flatten(1))

    def _cells(self, level: int, halo: int, outside: int | None = None) -> Tensor:
        """The cells of every window and around it, `(windows, s + 2 halo, s + 2 halo)`."""
        rows, cols = self.layout.sizes[level]
        down, across = (-(-side // self.window) for side in self.grid)
        side = self.side(level)
        within = torch.arange(-halo, side + halo)
        y, x = (torch.arange(n)[:, None] * side + within for n in (down, across))  # (n, s + 2 halo)
        y, x = y[:, None, :, None], x[None, :, None, :]
        numbers = self.layout.numbers(level, y, x)
        there = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
        return torch.where(there, numbers, self.nowhere if outside is None else outside).flatten(0, 1)
