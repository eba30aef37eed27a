"""Attention of the paper's rule: in full inside windows, incremental over the frame (paper section 4.2).

Every function returns what it computed and the operations that it ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.anatomy import Block, Grid, relative_table
from eventful_det.gating.cost import Counts
from eventful_det.gating.state import TensorTree
from eventful_det.gating.windows import windows_of


@dataclass
class Products(TensorTree):
    """Remembered attention products of a global block; M = L keys, or their pooled cells.

    Attributes:
        scores: `(heads, L, M)` scaled QK^T, before relative positions.
        mixture: A.V and its references, or None where A.V is computed in full.
    """

    scores: Tensor
    mixture: Mixture | None


@dataclass
class Mixture(TensorTree):
    """State of the delta accumulation of A.V.

    Attributes:
        weights: `(heads, L, M)` attention weights, columns as last let through.
        values: `(heads, M, d)` values last let through.
        product: `(heads, L, d)` the accumulated A.V.
    """

    weights: Tensor
    values: Tensor
    product: Tensor


def attend_windows(block: Block, qkv: Tensor, grid: Grid) -> tuple[Tensor, Counts]:
    """Attention in full inside every window.

    Args:
        block: with `window` > 0.
        qkv: `(windows * slots, 3 D)` in window order, slots of padded tokens included.
        grid: token grid (H, W).

    Returns:
        `(N, D)` row-major.
    """
    windows = windows_of(grid, block.window, qkv.device)
    q, k, v = _heads(qkv.unflatten(0, (windows.count, windows.slots)), block.heads)
    scores, score_counts = _multiply(q / q.shape[-1] ** 0.5, k.mT)
    scores, position_counts = _add_positions(scores, q, block, windows.shape, 1, in_place=True)
    x, mix_counts = _multiply(scores.softmax(-1), v)
    x = x.transpose(1, 2).reshape(len(qkv), block.dim)
    bias = Counts()
    if len(qkv) > grid[0] * grid[1] and block.qkv.bias is not None:
        bias = Counts(bias=3 * block.dim)  # of the one padded token, as the official code counts
    return x[windows.window * windows.slots + windows.slot], score_counts + position_counts + mix_counts + bias


def attend_frame(
    block: Block, qkv: Tensor, products: Products | None, index: Tensor, grid: Grid, pool: int, flush: bool
) -> tuple[Tensor, Counts]:
    """Attention over the frame, updating the remembered products for the selected tokens.

    Args:
        block: with `window` = 0.
        qkv: `(L, 3 D)` buffered queries, keys and values; L = prefix tokens + N.
        products: updated in place; None = compute in full.
        index: `(r,)` tokens of `qkv` that were recomputed on this frame.
        grid: token grid (H, W).
        pool: side of the cells over which keys and values are averaged; 1 = none.
        flush: whether nothing remembered is valid.

    Returns:
        `(L, D)`.
    """
    q, k, v = _heads(qkv, block.heads)
    if pool > 1:
        k, v = _pool(k, grid, pool), _pool(v, grid, pool)
        index_k = _cells(index, grid, pool)
    else:
        index_k = index
    scores, score_counts = _scores(q / q.shape[-1] ** 0.5, k.mT, products, index, index_k, flush)
    scores, position_counts = _add_positions(scores, q, block, grid, pool, in_place=products is None)
    weights = scores.softmax(-1)
    if products is None or products.mixture is None:
        x, mix_counts = _multiply(weights, v)
    else:
        x, mix_counts = _mix(weights, v, products.mixture, index_k, flush)
    return x.transpose(0, 1).flatten(1), score_counts + position_counts + mix_counts


def _scores(
    q: Tensor, k: Tensor, products: Products | None, index: Tensor, index_k: Tensor, flush: bool
) -> tuple[Tensor, Counts]:
    """QK^T `(heads, L, M)` of scaled queries and transposed keys: rows, then columns of the refreshed tokens."""
    if products is None:
        return _multiply(q, k)
    scores = products.scores
    if flush:
        product, counts = _multiply(q, k)
        return scores.copy_(product), counts
    rows, row_counts = _multiply(q.index_select(1, index), k)
    scores.index_copy_(1, index, rows)
    columns, column_counts = _multiply(q, k.index_select(2, index_k))
    scores.index_copy_(2, index_k, columns)
    return scores, row_counts + column_counts


def _mix(weights: Tensor, values: Tensor, mixture: Mixture, index: Tensor, flush: bool) -> tuple[Tensor, Counts]:
    """A.V `(heads, L, d)` by the differences in the columns and values at `index`; the result is the buffer."""
    if flush:
        product, counts = _multiply(weights, values)
        mixture.weights.copy_(weights)
        mixture.values.copy_(values)
        return mixture.product.copy_(product), counts
    old_weights, new_weights = mixture.weights.index_select(2, index), weights.index_select(2, index)
    old_values, new_values = mixture.values.index_select(1, index), values.index_select(1, index)
    by_values, value_counts = _multiply(new_weights, new_values - old_values)
    by_weights, weight_counts = _multiply(new_weights - old_weights, old_values)
    mixture.product.add_(by_values).add_(by_weights)
    mixture.weights.index_copy_(2, index, new_weights)
    mixture.values.index_copy_(1, index, new_values)
    counts = Counts(
        gate=mixture.values.numel() + mixture.weights.numel(),
        accumulator=new_values.numel() + 2 * mixture.product.numel(),
    )
    return mixture.product, value_counts + weight_counts + counts


def _add_positions(
    scores: Tensor, q: Tensor, block: Block, shape: Grid, pool: int, in_place: bool
) -> tuple[Tensor, Counts]:
    """Add decomposed relative positions of unscaled queries `(..., heads, L, d)` to `scores (..., heads, L, M)`."""
    if block.rel_pos is None:
        return scores, Counts()
    rows, cols = shape
    along_y, along_x = (_table(table, size, pool) for table, size in zip(block.rel_pos, shape, strict=True))
    q = q.unflatten(-2, shape)
    bias_y = torch.einsum("...yxd,ykd->...yxk", q, along_y)[..., :, None]
    bias_x = torch.einsum("...yxd,xkd->...yxk", q, along_x)[..., None, :]
    maps = scores.view(*scores.shape[:-2], rows, cols, rows // pool, cols // pool)
    maps = (maps.add_(bias_y) if in_place else maps + bias_y).add_(bias_x)
    counts = Counts(einsum=(bias_y.numel() + bias_x.numel()) * q.shape[-1], add=2 * maps.numel())
    return maps.view(scores.shape), counts


def _table(table: Tensor, size: int, pool: int) -> Tensor:
    """Relative positions `(size, size // pool, d)` of queries and (pooled) keys along one axis.

    A table that is already `(size, size, d)`, indexed by query and key, is taken as it is.
    """
    expanded = table if table.ndim == 3 else relative_table(table, size)
    return expanded if pool == 1 else expanded.unflatten(1, (-1, pool)).mean(2)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each `(..., heads, L, d)`, of `(..., L, 3 D)`."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).transpose(-4, -2).unbind(-3)
    return q, k, v


def _pool(x: Tensor, grid: Grid, pool: int) -> Tensor:
    """Average `(heads, N, d)` over square cells of tokens; `(heads, N / pool^2, d)`."""
    return F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), pool).flatten(2).transpose(1, 2)


def _cells(index: Tensor, grid: Grid, pool: int) -> Tensor:
    """The cells that some tokens fall in, ascending, each once."""
    y, x = index // grid[1], index % grid[1]
    cells: Tensor = (y // pool * (grid[1] // pool) + x // pool).unique()
    return cells


def _multiply(a: Tensor, b: Tensor) -> tuple[Tensor, Counts]:
    product = a @ b
    return product, Counts(matmul=product.numel() * a.shape[-1])
