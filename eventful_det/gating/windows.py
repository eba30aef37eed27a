"""Attention windows: where each token of a grid lies, and relative positions of a few query rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eventful_det.gating.anatomy import Grid, relative_table


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


def relative_bias(q: Tensor, slot: Tensor, shape: Grid, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Decomposed relative position terms of some query rows, as in MViTv2 and ViTDet.

    Args:
        q: `(heads, r, d)` unscaled queries.
        slot: `(r,)` place of each query in its window.
        shape: window size in tokens.
        tables: embeddings along y and x, see `anatomy.relative_table`.

    Returns:
        `(heads, r, rows * columns)` to be added to the scaled products.
    """
    rows, cols = shape
    along_y = torch.einsum("hrd,rkd->hrk", q, relative_table(tables[0], rows)[slot // cols])
    along_x = torch.einsum("hrd,rkd->hrk", q, relative_table(tables[1], cols)[slot % cols])
    return (along_y[..., :, None] + along_x[..., None, :]).flatten(-2)
