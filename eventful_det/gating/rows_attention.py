"""Attention of the selected rows against cached keys and values.

What depends on the selection alone (which windows, which cache rows) is worked out once per frame, in `Queries`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.anatomy import Block, Grid
from eventful_det.gating.cost import Counts
from eventful_det.gating.windows import relative_bias, relative_terms, windows_of

_BIAS_ELEMENTS = 1 << 25  # largest attention bias held at once; longer query lists are cut into pieces

Tables = tuple[Tensor, Tensor]  # relative positions along y and x, each (size, size, d)


@dataclass(frozen=True)
class Queries:
    """Where the rows of a frame stand in the attention of blocks of one window size.

    Queries are laid out as `(groups, widest)`: one group per touched window, padded to the fullest.

    Attributes:
        shape: tokens of a window.
        cached: `(r,)` row of each query in the caches, flattened to `(windows * slots, heads, d)`.
        position: `(r,)` row and column of each query in its window, prefix tokens excepted.
        touched: `(groups,)` the windows that hold a query; None = all of them.
        groups, widest: of the layout.
        place: `(r,)` place of each query in the flattened layout; None = they are in order.
    """

    shape: Grid
    cached: Tensor
    position: tuple[Tensor, Tensor]
    touched: Tensor | None
    groups: int
    widest: int
    place: Tensor | None

    @classmethod
    def of(cls, index: Tensor, grid: Grid, side: int, prefix: int) -> Queries:
        """The layout of the tokens `(r,)`, sorted by window, after `prefix` tokens that are always there.

        Args:
            index: flat indices of the selected tokens.
            grid: tokens of the frame.
            side: of the windows in tokens; 0 = global attention.
            prefix: number of class and register tokens.
        """
        windows = windows_of(grid, side, index.device)
        if not side:
            cached = torch.cat([torch.arange(prefix, device=index.device), index + prefix]) if prefix else index
            return cls(windows.shape, cached, (index // grid[1], index % grid[1]), None, 1, cached.numel(), None)
        window, slot = windows.window[index], windows.slot[index]
        touched, group, rank, widest = _group(window)
        return cls(
            shape=windows.shape,
            cached=window * windows.slots + slot,
            position=(slot // windows.shape[1], slot % windows.shape[1]),
            touched=None if len(touched) == windows.count else touched,
            groups=len(touched),
            widest=widest,
            place=group * widest + rank,
        )

    def spread(self, rows: Tensor) -> Tensor:
        """Rows `(r, ...)` in the layout, `(groups, widest, ...)`; zeros where there is no query."""
        if self.place is None:
            return rows[None]
        spread = rows.new_zeros(self.groups * self.widest, *rows.shape[1:]).index_copy_(0, self.place, rows)
        return spread.unflatten(0, (self.groups, self.widest))

    def gather(self, spread: Tensor) -> Tensor:
        """The rows `(r, ...)` of a layout `(groups, widest, ...)`."""
        flat = spread.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)


def attend(
    block: Block, qkv: Tensor, keys: Tensor, values: Tensor, queries: Queries, tables: Tables | None
) -> tuple[Tensor, Counts]:
    """Refresh the caches and attend to the cached keys of the frame, or of each query's window.

    Args:
        block: the block.
        qkv: `(r, 3 D)` of the selected rows, prefix tokens first.
        keys, values: `(windows, slots, heads, d)`, updated in place.
        queries: where the rows stand.
        tables: relative positions of the block, or None.

    Returns:
        `(r, D)`, and what it took.
    """
    q, k, v = qkv.view(qkv.shape[0], 3, block.heads, -1).unbind(1)
    keys.flatten(0, 1).index_copy_(0, queries.cached, k)
    values.flatten(0, 1).index_copy_(0, queries.cached, v)
    if queries.touched is not None:
        keys, values = keys.index_select(0, queries.touched), values.index_select(0, queries.touched)
    terms = None if tables is None else relative_terms(q, queries.position, tables)
    step = q.shape[0]
    if queries.groups == 1 and terms is not None:
        step = max(1, _BIAS_ELEMENTS // (block.heads * keys.shape[1]))
    if step >= q.shape[0]:
        spread = None if terms is None else queries.spread(terms)
        x = queries.gather(_attention(queries.spread(q), keys, values, spread, queries.shape))
    else:
        rows, pieces = queries.gather(queries.spread(q)), []
        assert terms is not None
        for some, term in zip(rows.split(step), terms.split(step), strict=True):
            pieces.append(_attention(some[None], keys, values, term[None], queries.shape)[0])
        x = torch.cat(pieces)
    laid_out = queries.groups * queries.widest
    counts = Counts(matmul=2 * laid_out * keys.shape[1] * block.dim)
    if terms is not None:
        sides, slots = sum(queries.shape), queries.shape[0] * queries.shape[1]
        counts += Counts(einsum=q.shape[0] * block.dim * sides, add=2 * q.shape[0] * block.heads * slots)
    return x.flatten(1), counts


def _attention(q: Tensor, keys: Tensor, values: Tensor, terms: Tensor | None, shape: Grid) -> Tensor:
    """Queries `(g, n, heads, d)` against `(g, slots, heads, d)`, with relative terms `(g, n, heads, rows + columns)`.

    Returns:
        `(g, n, heads, d)`.
    """
    bias = None if terms is None else relative_bias(terms, shape).transpose(1, 2)
    q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)


def _group(window: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Group rows that are sorted by window.

    Args:
        window: `(r,)` ascending window of each row.

    Returns:
        The touched windows `(t,)`; for each row its place among them and its rank within its window; the
        largest number of rows in a window.
    """
    touched, group, sizes = torch.unique_consecutive(window, return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(window), device=window.device) - starts[group]
    return touched, group, rank, int(sizes.max())
