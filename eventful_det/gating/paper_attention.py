"""Attention of the paper's rule: in full inside windows, incremental over the frame (paper section 4.2).

Counts are those of the official code, and how many of them did not run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.anatomy import Block, Grid, relative_table
from eventful_det.gating.cost import Counts
from eventful_det.gating.paper_products import Mixture, Products, accumulate, multiply
from eventful_det.gating.paper_scores import Scores, relative_terms, take
from eventful_det.gating.windows import windows_of

_ELEMENTS = 1 << 22  # attention weights held at once where none are remembered


def attend_windows(block: Block, qkv: Tensor, attended: Tensor, index: Tensor, grid: Grid) -> Counts:
    """Attention in full inside every window that holds a refreshed token; the others keep their result.

    Args:
        block: with `window` > 0.
        qkv: `(windows * slots, 3 D)` in window order, slots of padded tokens included.
        attended: `(N, D)` row-major, updated in place.
        index: `(r,)` tokens that were refreshed on this frame.
        grid: token grid (H, W).
    """
    windows, side = windows_of(grid, block.window, qkv.device), block.window
    across = -(-grid[1] // side)
    tables = _tables(block, windows.shape, 1)
    slots = torch.arange(side * side, device=qkv.device).view(side, side)
    queries = 0
    for window in windows.window[index].unique().tolist():
        top, left = window // across * side, window % across * side
        place = attended.view(*grid, -1)[top : top + side, left : left + side]  # without padded tokens
        q, k, v = _heads(qkv[window * side * side : (window + 1) * side * side], block.heads)
        slot = slots[: place.shape[0], : place.shape[1]].flatten()
        x = _attend(take(q, slot), k, v, (slot // side, slot % side), tables)
        place.copy_(x.view(place.shape))
        queries += len(slot)
    bias = block.qkv.bias is not None and len(qkv) > grid[0] * grid[1]
    official, ran = (
        Counts(matmul=2 * n * windows.slots * block.dim) + _position_counts(block, n, windows.shape)
        for n in (len(qkv), queries)
    )
    # The bias of a padded token is counted once, as officially.
    return official + Counts(bias=3 * block.dim * bias, spared=official.macs - ran.macs)


def attend_frame(
    block: Block, qkv: Tensor, state: Products | Mixture | None, index: Tensor, grid: Grid, pool: int, flush: bool
) -> tuple[Tensor, Counts]:
    """Attention over the frame, updating what is remembered of it for the refreshed tokens.

    Args:
        block: with `window` = 0.
        qkv: `(L, 3 D)` buffered queries, keys and values; L = prefix tokens + N.
        state: updated in place; None = compute in full.
        index: `(r,)` tokens of `qkv` that were refreshed on this frame.
        grid: token grid (H, W).
        pool: side of the cells over which keys and values are averaged; 1 = none.
        flush: whether all tokens were refreshed because nothing remembered is valid.

    Returns:
        `(L, D)`.
    """
    q, k, v = _heads(qkv, block.heads)
    cells = index
    if pool > 1:
        k, v, cells = _pool(k, grid, pool), _pool(v, grid, pool), _cells(index, grid, pool)
    tables = _tables(block, grid, pool)
    sides = (grid[0] // pool, grid[1] // pool)
    official = _position_counts(block, len(qkv), sides)
    official += _official_products(block, state, len(index), len(cells), len(qkv), k.shape[1], flush)
    if state is None:
        everything = torch.arange(len(qkv), device=qkv.device)
        place = (everything // grid[1], everything % grid[1])
        return _attend(q, k, v, place, tables), official
    ran = _position_counts(block, len(index), sides).einsum
    new_terms = relative_terms(take(q, index), (index // grid[1], index % grid[1]), tables)
    for terms, new in zip(state.positions, new_terms, strict=True):
        terms.index_copy_(2, index, new)
    scores = Scores(q, k, state.positions)
    if isinstance(state, Products):
        x, products = multiply(state, scores, v, index, cells)
    else:
        x, products = state.product, accumulate(state, scores, v, index, cells)
    return x.transpose(0, 1).flatten(1), official + Counts(spared=official.macs - ran - products * block.dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, place: tuple[Tensor, Tensor], tables: Sequence[Tensor]) -> Tensor:
    """Attention in full.

    Args:
        q: `(heads, r, d)` queries, not scaled.
        k, v: `(heads, M, d)` keys and values.
        place: `(r,)` row and column of each query in its map.
        tables: see `_tables`.

    Returns:
        `(r, D)`.
    """
    step = max(1, _ELEMENTS // (len(k) * k.shape[1]))
    pieces = []
    for some, y, x in zip(q.split(step, 1), place[0].split(step), place[1].split(step), strict=True):
        weights, _ = Scores(some, k, relative_terms(some, (y, x), tables)).rows()
        pieces.append(torch.bmm(weights.mT, v).div_(weights.sum(1)[..., None]))
    return torch.cat([piece.transpose(0, 1).flatten(1) for piece in pieces])


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each `(heads, L, d)`, of `(L, 3 D)`."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    return q, k, v


def _official_products(
    block: Block, state: Products | Mixture | None, rows: int, columns: int, length: int, keys: int, flush: bool
) -> Counts:
    """What the official code counts for QK^T and A.V of `length` queries and `keys`, some of which were refreshed."""
    whole = length * keys * block.dim
    if flush or state is None:
        return Counts(matmul=2 * whole)
    updated = (rows * keys + columns * length) * block.dim
    if isinstance(state, Products):
        return Counts(matmul=updated + whole)
    return Counts(
        matmul=updated + 2 * columns * length * block.dim,
        gate=keys * block.dim + block.heads * length * keys,
        accumulator=(columns + 2 * length) * block.dim,
    )


def _position_counts(block: Block, queries: int, keys: Grid) -> Counts:
    """Decomposed relative positions of some queries against a map of keys."""
    if block.rel_pos is None:
        return Counts()
    return Counts(einsum=queries * block.dim * sum(keys), add=2 * queries * block.heads * keys[0] * keys[1])


def _tables(block: Block, shape: Grid, pool: int) -> list[Tensor]:
    """Relative positions along y and x, each `(size, size // pool, d)` of queries and (pooled) keys; or none.

    A table of the block that is already `(size, size, d)`, indexed by query and key, is taken as it is.
    """
    tables = [
        table if table.ndim == 3 else relative_table(table, size)
        for table, size in zip(block.rel_pos or (), shape, strict=False)
    ]
    return tables if pool == 1 else [table.unflatten(1, (-1, pool)).mean(2) for table in tables]


def _pool(x: Tensor, grid: Grid, pool: int) -> Tensor:
    """Average `(heads, N, d)` over square cells of tokens; `(heads, N / pool^2, d)`."""
    return F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), pool).flatten(2).transpose(1, 2)


def _cells(index: Tensor, grid: Grid, pool: int) -> Tensor:
    """The cells that some tokens fall in, ascending, each once."""
    y, x = index // grid[1], index % grid[1]
    cells: Tensor = (y // pool * (grid[1] // pool) + x // pool).unique()
    return cells
