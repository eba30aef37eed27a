"""Attention windows: where each token of a grid lies, and relative positions of a few query rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eventful_det.gating.anatomy import Grid


@dataclass(frozen=True)
class Windows:
    """Windows of `side` x `side` tokens over a grid, padded at the bottom and right; side 0 = one global window.

    Attributes:
        shape: tokens of one window, (rows, columns).
        count: number of windows.
        window: `(N,)` window of each token.
        slot: `(N,)` place of each token in its window, row-major.
        place: `(N,)` place of each token among the slots of all windows, window by window.
        token: `(count * slots,)` the token at each place; 0 where there is only padding.
    """

    shape: Grid
    count: int
    window: Tensor
    slot: Tensor
    place: Tensor
    token: Tensor

    @property
    def slots(self) -> int:
        """Places in a window."""
        return self.shape[0] * self.shape[1]


@lru_cache(maxsize=64)
def windows_of(grid: Grid, side: int, device: torch.device) -> Windows:
    """The windows of a token grid."""
    rows, cols = grid
    height, width = (side, side) if side else grid
    across = -(-cols // width)
    count = -(-rows // height) * across
    token = torch.arange(rows * cols, device=device)
    y, x = token // cols, token % cols
    window = (y // height) * across + x // width
    slot = (y % height) * width + x % width
    place = window * (height * width) + slot
    return Windows(
        shape=(height, width),
        count=count,
        window=window,
        slot=slot,
        place=place,
        token=torch.zeros(count * height * width, dtype=torch.long, device=device).index_copy_(0, place, token),
    )


def relative_places(y: Tensor, x: Tensor, shape: Grid) -> Tensor:
    """Where some queries find their relative position embeddings in a table, see `anatomy.relative_table`.

    Args:
        y, x: `(r,)` row and column of each in its window.
        shape: of the window.

    Returns:
        `(r, rows + columns)` rows of the table: for keys in each row, then for keys in each column.
    """
    rows, cols = shape
    along_y = y[:, None] + torch.arange(rows - 1, -1, -1, device=y.device)
    along_x = x[:, None] + torch.arange(2 * rows + cols - 2, 2 * rows - 2, -1, device=x.device)
    return torch.cat([along_y, along_x], dim=1)


def relative_terms(q: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Decomposed relative position terms of some query rows, along y and then along x, as in MViTv2 and ViTDet.

    Args:
        q: `(r, heads, d)` unscaled queries.
        places: `(r, rows + columns)`, see `relative_places`.
        table: `(2 * rows - 1 + 2 * columns - 1, d)` embeddings along y, then along x, for these rows and columns.

    Returns:
        `(r, heads, rows + columns)`.
    """
    embeddings = table.index_select(0, places.flatten()).view(*places.shape, table.shape[1])
    return torch.bmm(q, embeddings.transpose(1, 2))


def relative_bias(terms: Tensor, shape: Grid) -> Tensor:
    """Terms `(..., rows + columns)` as a bias of the scaled products, `(..., rows * columns)`."""
    along_y, along_x = terms.split(list(shape), dim=-1)
    return (along_y[..., :, None] + along_x[..., None, :]).flatten(-2)
