"""Section 4.2: the products of attention, updated instead of computed anew.

L = prefix tokens + N tokens are queries; M = L keys, or their pooled cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.macs import Ablation
from eventful_det.gating.spec import Block, relative_table
from eventful_det.gating.state import TensorTree
from eventful_det.gating.windows import Grid, relative_bias, windows_of


@dataclass
class ProductState(TensorTree):
    """What is remembered of the attention of a global block.

    Attributes:
        scores: `(heads, L, M)` QK^T, scaled and with relative positions: B in the paper.
        weights: `(heads, L, M)` columns of the attention matrix A as last let through; None with ablation "qk".
        values: `(heads, M, d)` values as last let through; or None.
        product: `(heads, L, d)` the accumulated A.V; or None.
    """

    scores: Tensor
    weights: Tensor | None
    values: Tensor | None
    product: Tensor | None


def init_products(block: Block, queries: int, keys: int, ablation: Ablation) -> ProductState | None:
    """Allocate what is remembered of a global block; nothing with ablation "tokenwise"."""
    if ablation == "tokenwise":
        return None
    zeros, width = block.weight.new_zeros, block.dim // block.heads
    scores = zeros(block.heads, queries, keys)
    if ablation == "qk":
        return ProductState(scores, None, None, None)
    weights, values = torch.zeros_like(scores), zeros(block.heads, keys, width)
    return ProductState(scores, weights, values, zeros(block.heads, queries, width))


def attend_windows(block: Block, qkv: Tensor, grid: Grid) -> Tensor:
    """Attention in full inside every window, `(N, D)` from `(N, 3 D)`."""
    windows = windows_of(grid, block.window, qkv.device)
    padded = block.padding_qkv().flatten().repeat(windows.count * windows.slots, 1).to(qkv.dtype)
    padded.index_copy_(0, windows.place, qkv)
    q, k, v = padded.view(windows.count, windows.slots, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    terms = position_terms(q, block, windows.shape, pool=1)  # (windows, heads, slots, rows + columns)
    bias = None if terms is None else relative_bias(terms, windows.shape)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)  # (windows, slots, heads, d)
    return x.flatten(0, 1).flatten(1).index_select(0, windows.place)


def attend_frame(
    block: Block, qkv: Tensor, state: ProductState | None, index: Tensor, grid: Grid, pool: int, flush: bool
) -> tuple[Tensor, int]:
    """Attention over the frame.

    Args:
        block: a global block.
        qkv: `(L, 3 D)` buffered queries, keys and values.
        state: updated in place where tokens were refreshed; None = compute in full.
        index: `(r,)` refreshed tokens.
        grid: token grid (H, W).
        pool: side of the cells over which keys and values are averaged; 1 = none.
        flush: whether nothing remembered is valid.

    Returns:
        `(L, D)`, and the number of keys that were refreshed.
    """
    q, k, v = qkv.view(len(qkv), 3, block.heads, -1).permute(1, 2, 0, 3)  # (heads, L, d) each
    keys, columns = grid, index
    if pool > 1:
        k, v, columns = _pooled(k, grid, pool), _pooled(v, grid, pool), _cells(index, grid, pool)
        keys = (grid[0] // pool, grid[1] // pool)
    terms = position_terms(q, block, grid, pool)  # (heads, L, rows + columns of keys)
    if state is None:
        bias = None if terms is None else relative_bias(terms, keys)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        _update_scores(state.scores, q, k, terms, keys, index, columns[:0] if flush else columns)
        x = _mix(state, v, columns, flush)
    return x.transpose(0, 1).flatten(1), len(columns)


def _update_scores(
    scores: Tensor, q: Tensor, k: Tensor, terms: Tensor | None, keys: Grid, rows: Tensor, columns: Tensor
) -> None:
    """The query-key product: compute the rows of refreshed queries and the columns of refreshed keys anew."""
    q = q * q.shape[-1] ** -0.5
    new = q.index_select(1, rows) @ k.mT  # (heads, r, M)
    if terms is not None:
        new += relative_bias(terms.index_select(1, rows), keys)
    scores.index_copy_(1, rows, new.to(scores.dtype))
    new = q @ k.index_select(1, columns).mT  # (heads, L, c)
    if terms is not None:
        along_y, along_x = terms.split(list(keys), dim=-1)
        new += _columns(along_y, columns // keys[1]) + _columns(along_x, columns % keys[1])
    scores.index_copy_(2, columns, new.to(scores.dtype))


def _mix(state: ProductState, v: Tensor, columns: Tensor, flush: bool) -> Tensor:
    """The attention-value product, by accumulating differences: A v += A_new dv + dA v_old."""
    if state.weights is None or state.values is None or state.product is None:
        return state.scores.softmax(-1) @ v
    if flush:
        state.weights.copy_(state.scores.softmax(-1))
        state.values.copy_(v)
        state.product.copy_(state.weights @ v)
        return state.product
    # The softmax of the columns of refreshed keys alone. Head by head, intermediate results stay in the CPU's cache.
    normaliser = torch.stack([head.logsumexp(-1, keepdim=True) for head in state.scores])  # (heads, L, 1)
    new_weights, new_values = (_columns(state.scores, columns) - normaliser).exp(), v.index_select(1, columns)
    old_weights, old_values = _columns(state.weights, columns), state.values.index_select(1, columns)
    state.product += new_weights @ (new_values - old_values) + (new_weights - old_weights) @ old_values
    state.weights.index_copy_(2, columns, new_weights)
    state.values.index_copy_(1, columns, new_values)
    return state.product


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns `(heads, L, c)` of `(heads, L, M)`; much faster than `index_select` along the last axis."""
    return x.gather(2, index.expand(*x.shape[:2], -1))


def position_terms(q: Tensor, block: Block, shape: Grid, pool: int) -> Tensor | None:
    """Decomposed relative positions of all queries, along y and then along x.

    Args:
        q: `(..., heads, rows * columns, d)` unscaled queries of windows or frames of `shape` tokens.
        block: its tables are `(2 * size - 1, d)`, or `(size, size, d)` by query and key.
        shape: (rows, columns).
        pool: side of the cells over which the embeddings of keys are averaged.

    Returns:
        `(..., heads, rows * columns, rows of keys + columns of keys)`, or None.
    """
    if block.rel_pos is None:
        return None
    tables = [
        table if table.ndim == 3 else relative_table(table, size)
        for table, size in zip(block.rel_pos(), shape, strict=True)
    ]
    y, x = (table.unflatten(1, (-1, pool)).mean(2) for table in tables)  # (rows, rows of keys, d), same for columns
    q = q.unflatten(-2, shape)  # (..., heads, rows, columns, d)
    along_y = torch.einsum("...yxd,ykd->...yxk", q, y)
    along_x = torch.einsum("...yxd,xkd->...yxk", q, x)
    return torch.cat([along_y, along_x], -1).flatten(-3, -2)


def _pooled(x: Tensor, grid: Grid, pool: int) -> Tensor:
    """Average `(heads, N, d)` over square cells of tokens; `(heads, N / pool^2, d)`."""
    return F.avg_pool2d(x.mT.unflatten(2, grid), pool).flatten(2).mT


def _cells(index: Tensor, grid: Grid, pool: int) -> Tensor:
    """The cells that some tokens fall in, ascending, each once."""
    cells: Tensor = (index // grid[1] // pool * (grid[1] // pool) + index % grid[1] // pool).unique()
    return cells
