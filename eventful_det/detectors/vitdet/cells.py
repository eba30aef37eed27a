"""All levels of a pyramid as one list of cells, and 3x3 convolutions at some of them.

Each level has a border of one cell, which holds zeros: the zero padding of the convolutions. A neighbour is then an
addition to a cell's number, on whatever level it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.gating.windows import Grid

SPARSE_MAC = 1.25  # time of a multiply-add at listed cells, in those of a convolution over a whole level (measured)
_PATCH_ELEMENTS = 1 << 20  # of neighbourhoods gathered at once: what the caches of a CPU hold


@dataclass(frozen=True)
class Layout:
    """Where the cells of some levels lie in one list: level after level, row after row, borders included.

    Attributes:
        sizes: cells (rows, columns) of each level without its border.
        starts: the first cell of each level, and the end of the last.
        step: `(cells,)` from each cell to the one below.
        inside: `(cells,)` whether it is not on a border.
        place: `(cells,)` number of a cell among those that are inside.
    """

    sizes: tuple[Grid, ...]
    starts: tuple[int, ...]
    step: Tensor
    inside: Tensor
    place: Tensor

    @property
    def lengths(self) -> list[int]:
        """Cells of each level without its border."""
        return [rows * cols for rows, cols in self.sizes]

    def numbers(self, level: int, y: Tensor, x: Tensor) -> Tensor:
        """The cells at some rows and columns of a level."""
        return (y + 1) * (self.sizes[level][1] + 2) + x + (self.starts[level] + 1)

    def positions(self, level: int, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of some cells of a level."""
        cells, width = cells - self.starts[level], self.sizes[level][1] + 2
        return cells // width - 1, cells % width - 1

    def neighbours(self, cells: Tensor) -> Tensor:
        """The 3x3 cells around each of some cells inside, `(n, 9)`, row by row."""
        step = self.step.index_select(0, cells)
        rows = torch.stack([cells - step, cells, cells + step], dim=1)
        return (rows[:, :, None] + torch.arange(-1, 2, device=cells.device)).flatten(1)

    def union(self, cells: Tensor) -> Tensor:
        """The cells inside among some, each once and in order."""
        found = torch.zeros_like(self.inside).index_fill_(0, cells.flatten(), True)
        return (found & self.inside).nonzero().squeeze(1)

    def per_level(self, cells: Tensor) -> list[int]:
        """How many of some cells, in order, lie on each level."""
        bounds = torch.searchsorted(cells, torch.tensor(self.starts, device=cells.device)).tolist()
        return [after - before for before, after in zip(bounds, bounds[1:], strict=False)]

    def view(self, level: int, values: Tensor) -> Tensor:
        """A level of `(cells, C)` values, border included, `(1, C, rows + 2, columns + 2)`."""
        rows, cols = self.sizes[level]
        cells = values[self.starts[level] : self.starts[level + 1]]
        return cells.view(rows + 2, cols + 2, -1).permute(2, 0, 1)[None]


@lru_cache(maxsize=64)
def layout_of(sizes: tuple[Grid, ...], device: torch.device) -> Layout:
    """The layout of levels of some sizes (rows, columns)."""
    step, inside = [], []
    for rows, cols in sizes:
        step.append(torch.full(((rows + 2) * (cols + 2),), cols + 2, device=device))
        inside.append(F.pad(torch.ones(rows, cols, dtype=torch.bool, device=device), (1, 1, 1, 1)).flatten())
    where = torch.cat(inside)
    starts = accumulate((len(level) for level in step), initial=0)
    return Layout(sizes, tuple(starts), torch.cat(step), where, where.cumsum(0) - 1)


def cells_run(count: int, length: int) -> int:
    """At how many cells of a level of so many a convolution runs when it is asked for at some."""
    return length if count * SPARSE_MAC > length else count


def convolve(
    conv: nn.Conv2d, values: Tensor, layout: Layout, cells: Tensor, neighbours: Tensor, counts: list[int]
) -> Tensor:
    """A 3x3 convolution at some cells, without what may follow it in its module.

    Args:
        conv: the convolution.
        values: `(cells, C)` of all cells, zero on borders.
        layout: of the cells.
        cells: `(n,)` where to compute, in order.
        neighbours: `(n, 9)` of these cells.
        counts: how many of them lie on each level. A level most of whose cells are asked for is computed as a whole,
            see `cells_run`.

    Returns:
        `(n, C')`.
    """
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    rows, begin = values.new_empty(len(cells), len(weight)), 0
    listed = 0  # where cells begin that are gathered together, of one level or more
    for level, (count, length) in enumerate(zip(counts, layout.lengths, strict=False)):
        if cells_run(count, length) == length and count:
            _convolve_listed(weight, conv.bias, values, neighbours[listed:begin], rows[listed:begin])
            image = F.conv2d(layout.view(level, values), conv.weight, conv.bias)[0].flatten(1).T
            places = layout.place.index_select(0, cells[begin : begin + count]) - sum(layout.lengths[:level])
            torch.index_select(image, 0, places, out=rows[begin : begin + count])
            listed = begin + count
        begin += count
    _convolve_listed(weight, conv.bias, values, neighbours[listed:], rows[listed:])
    return rows


def _convolve_listed(weight: Tensor, bias: Tensor | None, values: Tensor, neighbours: Tensor, out: Tensor) -> None:
    """Write the convolution, `weight (C', 9 C)`, at cells whose neighbours are given to `out (n, C')`."""
    step = max(1, _PATCH_ELEMENTS // weight.shape[1])
    for around, rows in zip(neighbours.split(step), out.split(step), strict=True):
        patches = values.index_select(0, around.flatten()).view(len(around), weight.shape[1])
        if bias is None:
            torch.mm(patches, weight.T, out=rows)
        else:
            torch.addmm(bias, patches, weight.T, out=rows)
