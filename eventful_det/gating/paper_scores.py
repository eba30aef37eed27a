"""QK^T and its exponentials, for some queries or some keys.

Everything is held key-major, `(heads, M keys, r queries)`: what paper section 4.2 calls columns, the weights of a
refreshed key, are then contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What QK^T, scaled and with relative positions, is computed from.

    Attributes:
        q: `(heads, L, d)` queries, not scaled.
        k: `(heads, M, d)` keys.
        positions: relative position terms of every query, `(heads, y, L)` and `(heads, x, L)` for keys in row y and
            column x of their map; or none.
    """

    q: Tensor
    k: Tensor
    positions: Sequence[Tensor]

    def head(self, i: int) -> Scores:
        """Those of one head, as a batch of one."""
        return Scores(self.q[i : i + 1], self.k[i : i + 1], [terms[i : i + 1] for terms in self.positions])

    def queries(self, index: Tensor) -> Scores:
        """Those of some queries `(r,)`."""
        return Scores(take(self.q, index), self.k, [terms.index_select(2, index) for terms in self.positions])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weights `(heads, M, L)` but for their normalisation, exp(score - base), and the base `(heads, L)`.

        The base is the largest score of a query.
        """
        scores = self.q.new_empty(*self.k.shape[:2], self.q.shape[1])
        if self.positions:
            along_y, along_x = self.positions
            maps = scores.unflatten(1, (along_y.shape[1], along_x.shape[1]))
            torch.add(along_y[:, :, None], along_x[:, None], out=maps)
        beta, alpha = 1 if self.positions else 0, self.k.shape[-1] ** -0.5
        torch.baddbmm(scores, self.k, self.q.mT, beta=beta, alpha=alpha, out=scores)
        base = scores.amax(1)
        return scores.sub_(base[:, None]).exp_(), base

    def offsets(self, index: Tensor, base: Tensor) -> Tensor:
        """What turns QK^T of some keys `(c,)` into exponents, `(heads, c, L)`: relative positions minus the base."""
        if not self.positions:
            return base.neg()[:, None].repeat(1, len(index), 1)
        along_y, along_x = self.positions
        y, x = index // along_x.shape[1], index % along_x.shape[1]
        return (along_y - base[:, None]).index_select(1, y).add_(along_x.index_select(1, x))

    def columns(self, k: Tensor, offsets: Tensor) -> Tensor:
        """Weights of keys `(heads, c, d)` but for their normalisation, written over their offsets."""
        return torch.baddbmm(offsets, k, self.q.mT, alpha=k.shape[-1] ** -0.5, out=offsets).exp_()


def relative_terms(q: Tensor, place: tuple[Tensor, Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    """Decomposed relative position terms of some queries.

    Args:
        q: `(heads, r, d)` queries, not scaled.
        place: `(r,)` row and column of each in its map.
        tables: embeddings along y and x, `(rows, rows of keys, d)` and `(cols, columns of keys, d)`; or none.

    Returns:
        As `Scores.positions`.
    """
    q = q.permute(1, 2, 0)  # (r, d, heads)
    return [
        torch.bmm(table.index_select(0, where), q).permute(2, 1, 0).contiguous()
        for table, where in zip(tables, place, strict=False)
    ]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Some tokens `(heads, r, d)` of `(heads, L, d)`; fast if they lie in memory token by token."""
    return x.transpose(0, 1).index_select(0, index).transpose(0, 1)
