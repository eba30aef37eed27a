"""What the paper's rule remembers of the attention of global blocks (section 4.2), and how it is updated.

Attention weights are held key-major, `(heads, M keys, r queries)`: what section 4.2 calls columns, the weights of a
refreshed key, are then contiguous. M = L keys, or their pooled cells. Functions that return a number of multiply-adds
return those per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from eventful_det.gating.paper_scores import Scores, take
from eventful_det.gating.state import TensorTree

Tree = TypeVar("Tree", bound=TensorTree)

_ROWS = 512  # queries whose weights are computed at once
_COLUMNS = 128  # keys whose weights are computed at once: those of one head then stay in the cache
_LOSS = 1 / 32  # share of its largest value to which a denominator may fall before it is computed anew


@dataclass
class Products(TensorTree):
    """QK^T of a block whose A.V is computed in full, in the form that the softmax needs.

    Attributes:
        weights: `(heads, M, L)` exp(score - base).
        base: `(heads, L)` largest score of each query when its row was last computed.
        positions: the two of `Scores`, or none.
    """

    weights: Tensor
    base: Tensor
    positions: list[Tensor]


@dataclass
class Mixture(TensorTree):
    """A.V by delta accumulation.

    It takes only the weights of refreshed keys, and these only the denominators of the softmax, so QK^T itself is not
    remembered: in the denominators, the exponentials of a refreshed key replace those of the key that it was before.

    Attributes:
        weights: `(heads, M, L)` attention weights of every key as last let through.
        keys, values: `(heads, M, d)` as last let through.
        base: `(heads, L)` largest score of each query when its row was last computed.
        sums: `(heads, L)` denominators: the sums of exp(score - base) over the keys.
        peak: `(heads, L)` the largest that `sums` have been since then.
        product: `(heads, L, d)` the accumulated A.V.
        positions: the two of `Scores`, or none.
    """

    weights: Tensor
    keys: Tensor
    values: Tensor
    base: Tensor
    sums: Tensor
    peak: Tensor
    product: Tensor
    positions: list[Tensor]


def empty_products(like: Tensor, heads: int, queries: int, keys: int, width: int, sides: Sequence[int]) -> Products:
    """Allocate the state of a block.

    Args:
        like: of the device and type that the state shall have.
        heads: number of heads.
        queries: L.
        keys: M.
        width: channels of a head.
        sides: map of keys, rows and columns, if there are relative positions; else none.
    """
    positions = [like.new_zeros(heads, side, queries) for side in sides]
    return Products(like.new_zeros(heads, keys, queries), like.new_zeros(heads, queries), positions)


def empty_mixture(like: Tensor, heads: int, queries: int, keys: int, width: int, sides: Sequence[int]) -> Mixture:
    """As `empty_products`."""
    precise = torch.promote_types(like.dtype, torch.float32)
    return Mixture(
        weights=like.new_zeros(heads, keys, queries),
        keys=like.new_zeros(heads, keys, width),
        values=like.new_zeros(heads, keys, width),
        base=like.new_zeros(heads, queries),
        sums=like.new_zeros(heads, queries, dtype=precise),
        peak=like.new_zeros(heads, queries, dtype=precise),
        product=like.new_zeros(heads, queries, width),
        positions=[like.new_zeros(heads, side, queries) for side in sides],
    )


def multiply(products: Products, scores: Scores, values: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
    """A.V in full from the remembered QK^T, of which the rows and columns of refreshed tokens are updated first.

    Args:
        products: updated in place; in full, where that is cheaper.
        scores: of all queries and keys.
        values: `(heads, M, d)`.
        rows: `(r,)` refreshed queries.
        columns: `(c,)` refreshed keys.

    Returns:
        `(heads, L, d)`, and the multiply-adds that ran.
    """
    heads, keys, length = products.weights.shape
    ran = len(rows) * keys + len(columns) * length
    if ran >= length * keys:
        ran, rows, columns = length * keys, torch.arange(length, device=rows.device), columns[:0]
    for i in range(heads):
        one, head = _head(products, i), scores.head(i)
        _update_rows(one, head, rows)
        for part in columns.split(_COLUMNS):
            weights = head.columns(take(head.k, part), head.offsets(part, one.base))
            one.weights.index_copy_(1, part, weights)
    sums = products.weights.sum(1)
    numbers = torch.finfo(sums.dtype)
    lost = (~((sums > numbers.tiny**0.5) & (sums <= numbers.max))).any(0).nonzero().squeeze(1)
    if len(lost):  # their bases are too far from their scores by now
        _update_rows(products, scores, lost)
        sums.index_copy_(1, lost, products.weights.index_select(2, lost).sum(1))
    x = torch.bmm(products.weights.mT, values).div_(sums[..., None])
    return x, ran + len(lost) * keys + length * keys


def accumulate(mixture: Mixture, scores: Scores, values: Tensor, rows: Tensor, columns: Tensor) -> int:
    """Update A.V by the differences in the weights and values of refreshed keys, or in full where that is cheaper.

    Args:
        mixture: updated in place.
        scores: of all queries and keys.
        values: `(heads, M, d)`.
        rows: `(r,)` refreshed queries.
        columns: `(c,)` refreshed keys.

    Returns:
        The multiply-adds that ran.
    """
    if not len(rows):
        return 0
    heads, keys, length = mixture.weights.shape
    ran = len(rows) * keys + 4 * len(columns) * length
    whole, lost = ran >= 2 * length * keys, 0
    new_keys, new_values = take(scores.k, columns), take(values, columns)
    for i in range(heads):
        one, head = _head(mixture, i), scores.head(i)
        if whole:
            _renew(one, head, new_values[i : i + 1], columns)
        else:
            lost += _accumulate(one, head, new_keys[i : i + 1], new_values[i : i + 1], rows, columns)
    mixture.keys.index_copy_(1, columns, new_keys)
    mixture.values.index_copy_(1, columns, new_values)
    return 2 * length * keys if whole else ran + lost * keys // heads


def _accumulate(mixture: Mixture, scores: Scores, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> int:
    """`accumulate` in one head, given the new keys and values `(1, c, d)`; returns the rows that ran beyond `rows`."""
    for part in _rows(scores, rows):
        _rebase(mixture, *part)
    weights, lost = _replace(mixture, scores, keys, rows, columns)
    product, scale = mixture.product, mixture.sums.reciprocal().to(mixture.weights.dtype)[:, None]
    for index, new, new_values in zip(columns.split(_COLUMNS), weights, values.split(_COLUMNS, 1), strict=True):
        old, old_values = mixture.weights.index_select(1, index), mixture.values.index_select(1, index)
        mixture.weights.index_copy_(1, index, new.mul_(scale))
        torch.baddbmm(product, new.mT, new_values - old_values, out=product)
        torch.baddbmm(product, torch.sub(new, old, out=old).mT, old_values, out=product)
    return lost


def _replace(mixture: Mixture, scores: Scores, keys: Tensor, rows: Tensor, columns: Tensor) -> tuple[list[Tensor], int]:
    """Replace refreshed keys in the denominators of all queries but the refreshed `rows`, whose hold already.

    Returns:
        The weights `(1, c, L)` of the keys before normalisation, in pieces; the denominators that had to be computed
        anew, because what is left of them is too small beside the rounding errors of what has gone.
    """
    parts = list(zip(columns.split(_COLUMNS), keys.split(_COLUMNS, 1), strict=True))
    weights, change = [], torch.zeros_like(mixture.sums)
    for index, new in parts:
        offsets = scores.offsets(index, mixture.base)
        weights.append(scores.columns(new, offsets.clone()))
        before = scores.columns(mixture.keys.index_select(1, index), offsets)
        change.add_(weights[-1].sum(1, dtype=change.dtype)).sub_(before.sum(1, dtype=change.dtype))
    mixture.sums.add_(change.index_fill_(1, rows, 0))
    torch.maximum(mixture.peak, mixture.sums, out=mixture.peak)
    lost = (~(mixture.sums > _LOSS * mixture.peak)).nonzero()[:, 1]
    if len(lost):
        for part in _rows(scores, lost):
            _rebase(mixture, *part)
        some, base = scores.queries(lost), mixture.base.index_select(1, lost)
        for (index, new), piece in zip(parts, weights, strict=True):
            piece.index_copy_(2, lost, some.columns(new, some.offsets(index, base)))
    return weights, len(lost)


def _renew(mixture: Mixture, scores: Scores, values: Tensor, columns: Tensor) -> None:
    """`accumulate` in one head and in full, given the new values `(1, c, d)`."""
    mixture.values.index_copy_(1, columns, values)
    start = 0
    for part, weights, base in _rows(scores, torch.arange(scores.q.shape[1], device=columns.device)):
        weights = weights.index_select(1, columns).div_(_rebase(mixture, part, weights, base)[:, None])
        mixture.weights[:, :, start : start + len(part)].index_copy_(1, columns, weights)
        start += len(part)
    torch.bmm(mixture.weights.mT, mixture.values, out=mixture.product)


def _rows(scores: Scores, index: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries, piece by piece: their indices `(r,)`, weights `(heads, M, r)` and bases `(heads, r)`."""
    for part in index.split(_ROWS):
        yield part, *scores.queries(part).rows()


def _update_rows(products: Products, scores: Scores, index: Tensor) -> None:
    for part, weights, base in _rows(scores, index):
        products.weights.index_copy_(2, part, weights)
        products.base.index_copy_(1, part, base)


def _rebase(mixture: Mixture, index: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    """Take the denominators of some queries from their weights `(heads, M, r)`; returns them, `(heads, r)`."""
    sums = weights.sum(1, dtype=mixture.sums.dtype)
    mixture.base.index_copy_(1, index, base)
    mixture.sums.index_copy_(1, index, sums)
    mixture.peak.index_copy_(1, index, sums)
    return sums


def _head(tree: Tree, i: int) -> Tree:
    """The state of one head, as a batch of one."""
    return tree.map(lambda tensor: tensor[i : i + 1])
