"""What frames of a compiled detector will cost: `CostModel`s over a short list of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eventful_det.gating.windows import Grid


@dataclass(frozen=True)
class BucketCosts:
    """Costs by how many tokens are selected: a `CostModel`.

    Attributes:
        prices: MACs without the variable part for 0, 1, ... N selected tokens, as ranges of numbers that cost the same:
            (first, MACs) ascending.
        variable: the part of which only a bound is known.
        most: MACs of that part.
    """

    prices: tuple[tuple[int, int], ...]
    variable: str
    most: int

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """See `CostModel.macs`."""
        total = _prices(self, grid[0] * grid[1]).to(order.device)[: len(order) + 1].clone()
        total[1:] += self.most if variable is None else variable
        return total

    def everything(self, grid: Grid) -> int:
        """See `CostModel.everything`."""
        return self.prices[-1][1] + self.most


@lru_cache(maxsize=64)
def _prices(costs: BucketCosts, tokens: int) -> Tensor:
    """`(N + 1,)` MACs for 0, 1, ... N selected tokens."""
    ends = [first for first, _ in costs.prices[1:]] + [tokens + 1]
    counts = torch.tensor([end - first for (first, _), end in zip(costs.prices, ends, strict=True)])
    return torch.tensor([macs for _, macs in costs.prices]).repeat_interleave(counts)
