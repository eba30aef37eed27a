"""Who is recomputed first when several streams share a budget: an order of all their tokens.

A step recomputes as long a beginning of the order as it can pay for. First come tokens that are due: without them some
would grow older than `max_age`. Then those that changed, most changed first, with a fair part for every stream. Last
those that did not, stalest first: their context changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.policy import GateInput, token_scores
from eventful_det.runtime.budget import AGE_POWER, INTEREST

_DUE, _CHANGED, _UNCHANGED = range(3)


@dataclass(frozen=True)
class Terms:
    """What tokens are worth, and what every stream may count on.

    Attributes:
        noise: a token has changed if its error exceeds this.
        age_power, interest: changed tokens are ranked by error x age^`age_power` x (1 + `interest` x the gate's
            interest): with 4, one in a sure box counts five times (docs/policies.md).
        min_share: of the changed tokens that are recomputed, every stream gets at least this share of its proportional
            part (by tokens), if so many of its tokens changed; in [0, 1). 0 = the largest changes win, wherever.
        max_age: no token grows older than so many frames; 0 = no bound. It wins over the budget.
        bank: budget that is left over is kept for busy moments, up to that of so many steps; what is more is spent on
            the stalest tokens at once. 0 = no step may cost more than the budget. Seconds cannot be kept.
    """

    noise: float = 2.0
    age_power: float = AGE_POWER
    interest: float = INTEREST
    min_share: float = 0.5
    max_age: int = 100
    bank: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_share < 1:
            raise UserError(f"min_share must lie in [0, 1), got {self.min_share}")
        if self.max_age < 0:
            raise UserError(f"max_age must be a number of frames, or 0 for no bound, got {self.max_age}")
        if not self.bank >= 0:
            raise UserError(f"bank must be a number of steps, 0 or more, got {self.bank}")


@dataclass(frozen=True)
class Order:
    """Tokens of several streams in the order in which they are to be recomputed.

    Attributes:
        stream: `(M,)` position of each token's stream in the call.
        index: `(M,)` flat index of each token in its stream.
        due, changed: how many at the beginning are due, and how many changed come after them.
    """

    stream: Tensor
    index: Tensor
    due: int
    changed: int

    def take(self, count: int, streams: int) -> list[Tensor]:
        """The first `count` tokens, as flat indices for each of the streams."""
        stream, index = self.stream[:count], self.index[:count]
        return [index[stream == i] for i in range(streams)]


def order_tokens(gates: Sequence[GateInput], terms: Terms, calm: Sequence[int]) -> Order:
    """Order the tokens of all streams.

    Args:
        gates: of the streams.
        terms: see there.
        calm: for each stream the frames since a token of it last changed. Unchanged tokens that were recomputed since
            are left out: nothing is to be gained.
    """
    changed = [gate.error > terms.noise for gate in gates]
    due = [due_tokens(gate.age, terms.max_age) for gate in gates]
    scores = [token_scores(gate, terms.age_power, terms.interest) for gate in gates]
    ages = torch.cat([gate.age for gate in gates]).double()
    kind = torch.full_like(ages, _UNCHANGED)
    kind[torch.cat(changed)] = _CHANGED
    kind[torch.cat(due)] = _DUE
    place = 1 / ages  # stalest first
    fair = _fair_places(scores, changed, terms.min_share)
    place = torch.where(kind == _CHANGED, fair, place)
    idle = torch.cat([gate.age <= quiet for gate, quiet in zip(gates, calm, strict=True)])
    order = place.argsort(stable=True)
    order = order[kind[order].argsort(stable=True)]
    order = order[~(idle & (kind == _UNCHANGED))[order]]
    sizes = torch.tensor([len(gate.age) for gate in gates], device=ages.device)
    stream = torch.arange(len(gates), device=ages.device).repeat_interleave(sizes)
    index = torch.cat([torch.arange(len(gate.age), device=ages.device) for gate in gates])
    return Order(stream[order], index[order], int((kind == _DUE).sum()), int((kind == _CHANGED).sum()))


def affordable(order: Order, totals: Tensor, purse: float, surplus: float) -> int:
    """How many tokens of an order to recompute.

    Args:
        order: of M tokens.
        totals: `(M + 1,)` what the first 0, 1, ... M tokens cost together.
        purse: what may be spent on changed tokens. Those that are due are recomputed in any case.
        surplus: what may be spent if unchanged tokens are among them.
    """
    needed = order.due + order.changed
    changed = int((totals[: needed + 1] <= purse).sum()) - 1
    everything = int((totals <= surplus).sum()) - 1
    return max(order.due, changed, everything)


def due_tokens(age: Tensor, max_age: int) -> Tensor:
    """Tokens that have to be recomputed now so that none grows older than `max_age` frames, `(N,)`.

    In the last S = `max_age` / 4 frames before their time tokens are renewed oldest first, N / S at once, so that even
    if all N are equally old, as after a flush, the last are just in time.
    """
    due = torch.zeros_like(age, dtype=torch.bool)
    if max_age:
        slices = max(1, max_age // 4)
        oldest = age.argsort(descending=True, stable=True)[: -(-age.numel() // slices)]
        due[oldest] = age[oldest] > max_age - slices
    return due


def _fair_places(scores: Sequence[Tensor], changed: Sequence[Tensor], min_share: float) -> Tensor:
    """Places of the changed tokens in the common order, `(M,)`: by score, but no stream's j-th best comes later than
    where the stream's minimum share of all tokens up to there is j. Places of other tokens mean nothing."""
    ranks = [_ranks(score.masked_fill(~some, -torch.inf)) for score, some in zip(scores, changed, strict=True)]
    every = torch.cat(list(scores)).masked_fill(~torch.cat(list(changed)), -torch.inf)
    total, weight = every.numel(), min_share / (1 - min_share)
    latest = torch.cat([(rank + 1) * (total / (weight * rank.numel() + 1e-9)) for rank in ranks])
    return torch.minimum(_ranks(every), latest)


def _ranks(scores: Tensor) -> Tensor:
    """0 for the largest score, 1 for the next, ... `(N,)`."""
    ranks = torch.empty_like(scores, dtype=torch.double)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(
        len(scores), dtype=torch.double, device=scores.device
    )
    return ranks
