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
    """

    shape: Grid
    count: int
    window: Tensor
    slot: Tensor

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
    y = torch.arange(rows, device=device)[:, None].expand(rows, cols).flatten()
    x = torch.arange(cols, device=device)[None, :].expand(rows, cols).flatten()
    return Windows(
        shape=(height, width),
        count=-(-rows // height) * across,
        window=(y // height) * across + x // width,
        slot=(y % height) * width + x % width,
    )


def relative_terms(q: Tensor, place: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> Tensor:
    """Decomposed relative position terms of some query rows, along y and then along x, as in MViTv2 and ViTDet.

    Args:
        q: `(r, heads, d)` unscaled queries.
        place: `(r,)` row and column of each query in its window.
        tables: embeddings along y and x, `(rows, rows, d)` and `(columns, columns, d)`, see `anatomy.relative_table`.

    Returns:
        `(r, heads, rows + columns)`.
    """
    embeddings = torch.cat([table[where] for table, where in zip(tables, place, strict=True)], dim=1)
    return torch.bmm(q, embeddings.transpose(1, 2))


def relative_bias(terms: Tensor, shape: Grid) -> Tensor:
    """Terms `(..., rows + columns)` as a bias of the scaled products, `(..., rows * columns)`."""
    along_y, along_x = terms.split(list(shape), dim=-1)
    return (along_y[..., :, None] + along_x[..., None, :]).flatten(-2)
