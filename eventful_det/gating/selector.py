"""Which tokens are recomputed: a policy ranks them, a budget limits them, and both make a selector.

All of them are frozen values without memory, so one may serve many streams and be exchanged between any two frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.windows import Grid, windows_of


class GateInput(NamedTuple):
    """What a gate knows of one stream when tokens have to be chosen.

    Attributes:
        error: `(N,)` 2-norm of each token minus its reference (paper section 4.1).
        age: `(N,)` frames since each token was last let through; 1 = on the last frame.
        frame: frames since the stream's last flush.
        grid: tokens of the frame (H, W), N = H * W; None where tokens have no place, as at the gates of `Paper`.
        saliency: `(N,)` how much each token matters, 0 to 1; None = nobody said.
        stream: place of the stream among those of the step.
        noise: `(N,)` how much of each error may be noise; None = not known.
        ignored: `(N,)` tokens that are not eligible, see `ignoring`; None = all are.
    """

    error: Tensor
    age: Tensor
    frame: int
    grid: Grid | None = None
    saliency: Tensor | None = None
    stream: int = 0
    noise: Tensor | None = None
    ignored: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are eligible."""
        return self.error.numel() - (0 if self.ignored is None else int(self.ignored.sum()))

    def ignoring(self, ignored: Tensor) -> GateInput:
        """The same without some tokens `(N,)`: none of them is taken, and to policies they are as if just renewed."""
        return self._replace(
            error=self.error.masked_fill(ignored, 0),
            age=self.age.masked_fill(ignored, 1),
            saliency=None if self.saliency is None else self.saliency.masked_fill(ignored, 0),
            ignored=ignored,
        )


class Ranking(NamedTuple):
    """The tokens of one stream, ranked.

    Attributes:
        order: `(n,)` flat indices of the eligible tokens, each once, most important first.
        wanted: how many of them would be taken if there were no limit.
    """

    order: Tensor
    wanted: int


_NOISE = 1.25  # a change of fewer times the noise is none
_OBJECT = 0.5  # saliency from which on a token is taken for one of an object
_MOVES = 0.2  # objects move where this share of their tokens changed; else something passes before them

Policy = Callable[[GateInput], Ranking]
"""Ranks the tokens of one stream."""

Select = Callable[[Sequence[GateInput]], Sequence[Tensor]]
"""Selects tokens: for each gate their flat indices `(r,)`, each at most once, in any order. `Selector` is one, and any
callable of this form may take its place. Streams that recompute everything, as at a flush, are not asked about."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _salient(scores: Tensor, gate: GateInput, weight: float) -> Tensor:
    """Scores x (1 + weight x saliency), `(N,)`."""
    return scores if gate.saliency is None or not weight else scores * (1 + weight * gate.saliency)


@dataclass(frozen=True)
class Focus:
    """Tokens that changed; objects first and the rest in turns.

    A token changed if its error exceeds `threshold` and stands out of its noise. Each one of an object, as the saliency
    tells, wants `renew` others along, whose context changed: they were computed among keys and values of long ago.
    Where objects move, at least the share `floor` is wanted, so that frames cost alike; where nothing changed, nothing
    at all. Changed tokens come first. Among them, and among the others, the order is by age x (1 +
    `saliency` x the gate's saliency): where something was detected on the last frame tokens are refreshed together and
    often, elsewhere the stalest are next. The size of the error does not count, because when a camera moves everything
    has changed, most of all background of strong contrast. Blocks of `block` x `block` tokens share their mean order,
    so that what is chosen is compact: windows are refreshed as wholes, and the heads have fewer borders to recompute.
    """

    threshold: float
    floor: float = 0.0
    saliency: float = 100.0
    block: int = 4
    renew: float = 2.0

    def __post_init__(self) -> None:
        _require(not math.isnan(self.threshold), "Focus: threshold must be a number, got nan")
        _require(0 <= self.floor <= 1, f"Focus: floor must be a share of the tokens in [0, 1], got {self.floor}")
        _require(self.saliency >= 0, f"Focus: saliency must be 0 or more, got {self.saliency}")
        _require(self.block >= 1, f"Focus: block must be 1 or more tokens, got {self.block}")
        _require(self.renew >= 0, f"Focus: renew must be 0 or more tokens, got {self.renew}")

    def __call__(self, gate: GateInput) -> Ranking:
        changed = gate.error > self.threshold
        if gate.noise is not None:
            changed &= gate.error > _NOISE * gate.noise
        if not changed.any():  # a still frame is not ordered
            return Ranking(torch.empty(0, dtype=torch.int64, device=changed.device), 0)
        order = _by_block(_salient(gate.age.float(), gate, self.saliency), gate.grid, self.block)
        objects = torch.ones_like(changed) if gate.saliency is None else gate.saliency >= _OBJECT
        objects = objects if objects.any() else ~objects  # where none is known, the frame is one
        moving = int((changed & objects).sum())
        floor = self.floor if moving >= _MOVES * int(objects.sum()) else 0.0
        changed = changed[order]
        first = order[changed]
        wanted = max(int(floor * gate.tokens), len(first) + int(self.renew * moving))
        return Ranking(torch.cat([first, order[~changed]]), wanted)


def _by_block(scores: Tensor, grid: Grid | None, side: int) -> Tensor:
    """Tokens `(N,)` by falling mean score of their block of `side` x `side` tokens, those of a block together."""
    if grid is None or side == 1:
        return scores.argsort(descending=True, stable=True)
    blocks = windows_of(grid, side, scores.device)
    # Sums of 12 and of 16 equal numbers would not give the same mean in float32: a rounding would order the blocks.
    total = scores.new_zeros(blocks.count, dtype=torch.float64).index_add_(0, blocks.window, scores.double())
    mean = (total / torch.bincount(blocks.window, minlength=blocks.count)).float()
    rank = mean.argsort(descending=True, stable=True).argsort()
    return rank[blocks.window].argsort(stable=True)


@dataclass(frozen=True)
class LargestError:
    """Tokens by error x age^`age_power` x (1 + `saliency` x the gate's saliency), all of them wanted.

    The plain form is the paper's policy (section 4.1). With a `threshold` only tokens whose bare error exceeds it are
    eligible; None = all are.
    """

    threshold: float | None = None
    age_power: float = 0.0
    saliency: float = 0.0

    def __post_init__(self) -> None:
        wrong = self.threshold is not None and math.isnan(self.threshold)
        _require(not wrong, "LargestError: threshold must be a number, or None, got nan")
        _require(self.age_power >= 0, f"LargestError: age_power must be 0 or more, got {self.age_power}")
        _require(self.saliency >= 0, f"LargestError: saliency must be 0 or more, got {self.saliency}")

    def __call__(self, gate: GateInput) -> Ranking:
        scores = gate.error * gate.age.to(gate.error.dtype) ** self.age_power if self.age_power else gate.error
        order = _salient(scores, gate, self.saliency).argsort(descending=True, stable=True)
        if self.threshold is not None:
            order = order[(gate.error > self.threshold)[order]]
        return Ranking(order, len(order))


@dataclass(frozen=True)
class RandomOrder:
    """All tokens in random order: the baseline that every policy has to beat.

    The draw depends on the seed and the frame number alone, so runs repeat and streams do not disturb each other.
    """

    seed: int = 0

    def __call__(self, gate: GateInput) -> Ranking:
        tokens = gate.error.numel()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + gate.frame)
        return Ranking(torch.randperm(tokens, generator=generator).to(gate.error.device), tokens)


@dataclass(frozen=True)
class Gmacs:
    """A budget of so many 1e9 multiply-adds of the whole detector per step."""

    value: float

    def __post_init__(self) -> None:
        valid = math.isfinite(self.value) and self.value > 0
        _require(valid, f"a budget of {self.value} GMACs cannot be held; give a number above 0")

    def __str__(self) -> str:
        return f"{self.value:g}GMACs"


@dataclass(frozen=True)
class Latency:
    """A budget of so many seconds of the whole detector per step."""

    seconds: float

    def __post_init__(self) -> None:
        valid = math.isfinite(self.seconds) and self.seconds > 0
        _require(valid, f"a budget of {self.seconds} s cannot be held; give a time above 0")

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:g}ms"


Budget = float | int | Gmacs | Latency | None
"""How many tokens may be taken: a share of them (float in [0, 1]), a number (int), as many as `Gmacs` or `Latency`
allow, or None for as many as the policy wants."""


def ranked(policy: Policy, gate: GateInput) -> Ranking:
    """The eligible tokens of a stream as a policy ranks them."""
    ranking = policy(gate)
    if gate.ignored is None:
        return ranking
    order = ranking.order[~gate.ignored[ranking.order]]
    return Ranking(order, min(ranking.wanted, len(order)))


def check_budget(budget: Budget) -> Budget:
    """The budget itself.

    Raises:
        UserError: it is none.
    """
    if budget is None or isinstance(budget, (Gmacs, Latency)):
        return budget
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    _require(
        number and budget >= 0,
        f"budget={budget!r} is none; give a share of the tokens (0.25), tokens (96), Gmacs(40) or Latency(0.05)",
    )
    share = isinstance(budget, float)
    _require(
        not share or budget <= 1,
        f"a budget of {budget} is more than the frame; give a share in [0, 1], or tokens as an int",
    )
    return budget


def tokens_allowed(budget: float | int | None, tokens: int) -> int:
    """How many of so many tokens a share, a number or None allows."""
    if budget is None:
        return tokens
    return int(budget * tokens) if isinstance(budget, float) else budget


@dataclass(frozen=True)
class Selector:
    """A policy within a budget.

    Args:
        policy: ranks the tokens of each stream.
        budget: limits them. `Gmacs` and `Latency` take prices and a clock: streams and pools hold them, by another
            callable in the selector's place.
        assured: None = each stream of a step has the budget for itself. A number in [0, 1] = the streams share it by
            `merge`, each assured of that part of its proportion.

    Raises:
        UserError: the budget is none, or `assured` is out of range.
    """

    policy: Policy
    budget: Budget = None
    assured: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        valid = self.assured is None or 0 <= self.assured <= 1
        _require(valid, f"assured must be a part of the proportion in [0, 1], or None, got {self.assured}")

    def within(self, budget: Budget) -> Selector:
        """The same policy within another budget."""
        return dataclasses.replace(self, budget=budget)

    def __call__(self, gates: Sequence[GateInput]) -> list[Tensor]:
        """For each gate the flat indices `(r,)` of the selected tokens, most important first."""
        if isinstance(self.budget, (Gmacs, Latency)):
            raise UserError(f"a budget of {self.budget} is held by streams and pools; here give tokens or a share")
        rankings = [ranked(self.policy, gate) for gate in gates]
        sizes = [gate.tokens for gate in gates]
        if self.assured is None:
            limits = [tokens_allowed(self.budget, size) for size in sizes]
            return [rank.order[: min(rank.wanted, limit)] for rank, limit in zip(rankings, limits, strict=True)]
        merged = merge(rankings, sizes, self.assured)
        return merged.take(tokens_allowed(self.budget, sum(sizes)))


@dataclass(frozen=True)
class Merged:
    """The wanted tokens of several streams in one order.

    Attributes:
        stream: `(M,)` place of each token's stream among those merged.
        index: `(M,)` flat index of each token in its stream.
        streams: number of streams.
    """

    stream: Tensor
    index: Tensor
    streams: int

    def take(self, count: int) -> list[Tensor]:
        """The first `count` tokens, as flat indices for each stream."""
        stream, index = self.stream[:count], self.index[:count]
        return [index[stream == i] for i in range(self.streams)]


def merge(
    rankings: Sequence[Ranking], sizes: Sequence[int], assured: float, priorities: Sequence[float] | None = None
) -> Merged:
    """How streams share a budget: their wanted tokens in one order, of which a step takes as long a beginning as fits.

    Each stream's tokens come in its own order, at its own rate: a part `assured` of the rates is in proportion to the
    sizes of the streams, the rest in proportion to what they want. Of any beginning of n tokens a stream so has at
    least `assured` of its proportion, rounded down, or all that it wants.

    Example: two streams of 100 tokens want 30 and 10, and half is assured. The rates are 0.5 * 1/2 + 0.5 * 30/40 =
    0.625 and 0.375, so that the j-th tokens come at 1.6, 3.2, 4.8, 6.4, 8 ... and at 2.7, 5.3, 8 ...: of a budget of
    six tokens the streams get four and two.

    Args:
        rankings: of the streams.
        sizes: tokens of their frames.
        assured: in [0, 1].
        priorities: of the streams, above 0: a stream of priority 2 counts as two of its kind; None = all are 1.
    """
    wanted = [min(ranking.wanted, len(ranking.order)) for ranking in rankings]
    weights = [1.0] * len(rankings) if priorities is None else priorities
    tokens = max(1, sum(p * n for p, n in zip(weights, sizes, strict=True)))
    total = max(1, sum(p * w for p, w in zip(weights, wanted, strict=True)))
    device = rankings[0].order.device if rankings else None
    triples = zip(weights, sizes, wanted, strict=True)
    rates = [p * (assured * n / tokens + (1 - assured) * w / total) for p, n, w in triples]
    turns = [torch.arange(1, w + 1, device=device).double() / rate for w, rate in zip(wanted, rates, strict=True)]
    stream = [torch.full((w,), i, device=device) for i, w in enumerate(wanted)]
    index = [ranking.order[:w] for ranking, w in zip(rankings, wanted, strict=True)]
    if not rankings:
        return Merged(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0)
    order = torch.cat(turns).argsort(stable=True)
    return Merged(torch.cat(stream)[order], torch.cat(index)[order], len(rankings))


DEFAULT = Selector(Focus(2.0, floor=0.25), 0.35)
"""What is selected where nobody says otherwise."""

EVERYTHING = Selector(LargestError())
"""Every token: the eventful network then equals the dense one."""


def TopK(k: int) -> Selector:
    """The `k` tokens of largest error."""
    return Selector(LargestError(), k)


def TopFraction(fraction: float) -> Selector:
    """The share `fraction` of all tokens, those of largest error."""
    return Selector(LargestError(), float(fraction))


def Threshold(threshold: float) -> Selector:
    """Every token whose error exceeds `threshold`."""
    return Selector(LargestError(threshold))


def RandomK(k: int, seed: int = 0) -> Selector:
    """`k` tokens drawn at random."""
    return Selector(RandomOrder(seed), k)
