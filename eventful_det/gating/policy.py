"""Policies: which tokens to recompute.

A policy is any callable that takes a `GateInput` and returns the flat indices of the selected tokens. Policies
hold no state, so one may be shared by many streams and exchanged between any two frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Grid
from eventful_det.gating.windows import windows_of


class GateInput(NamedTuple):
    """What a gate knows of one stream when it has to choose.

    Attributes:
        error: `(N,)` 2-norm of each token minus its reference (paper section 4.1).
        age: `(N,)` frames since each token was last let through; 1 = on the last frame.
        frame: frames since the stream's last flush.
        grid: tokens of the frame (H, W), N = H * W; None where tokens have no place, as at the gates of `Paper`.
        interest: `(N,)` how much each token matters, 0 to 1, as whoever reads the tokens told; None = not told.
        stream: place of the stream among those of the step.
    """

    error: Tensor
    age: Tensor
    frame: int
    grid: Grid | None = None
    interest: Tensor | None = None
    stream: int = 0


class Policy(Protocol):
    """Selects tokens: any callable of this form."""

    def __call__(self, gate: GateInput, /) -> Tensor:
        """Flat indices `(r,)` of the selected tokens, each at most once, in any order."""


class JointPolicy(Protocol):
    """Selects tokens of several streams at once, so that they can share a budget: any callable of this form."""

    def __call__(self, gates: Sequence[GateInput], /) -> Sequence[Tensor]:
        """For each stream the flat indices `(r,)` of its selected tokens, each at most once, in any order.

        Streams that recompute everything, as at a flush, are not asked about.
        """


def token_scores(gate: GateInput, age_power: float, interest: float) -> Tensor:
    """Error x age^a x (1 + w x interest), `(N,)`: who waited long or matters is chosen for a smaller change."""
    scores = gate.error * gate.age.to(gate.error.dtype) ** age_power if age_power else gate.error
    return _favour(scores, gate, interest)


def _favour(scores: Tensor, gate: GateInput, interest: float) -> Tensor:
    """Scores x (1 + w x interest), `(N,)`."""
    return scores if gate.interest is None or not interest else scores * (1 + interest * gate.interest)


def _largest(scores: Tensor, k: int) -> Tensor:
    k = min(k, scores.numel())
    return scores.topk(k, sorted=False).indices


@dataclass(frozen=True)
class TopK:
    """The `k` tokens of largest error x age^`age_power` x (1 + `interest` x the gate's interest).

    With both at 0 it is the paper's policy (section 4.1).
    """

    k: int
    age_power: float = 0.0
    interest: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UserError(f"TopK: k must be 0 or more tokens, got {self.k}")

    def __call__(self, gate: GateInput) -> Tensor:
        return _largest(token_scores(gate, self.age_power, self.interest), self.k)


@dataclass(frozen=True)
class TopFraction:
    """The share `fraction` of all tokens, ordered as by `TopK`."""

    fraction: float
    age_power: float = 0.0
    interest: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise UserError(f"TopFraction: fraction must lie in [0, 1], got {self.fraction}")

    def __call__(self, gate: GateInput) -> Tensor:
        return _largest(token_scores(gate, self.age_power, self.interest), int(self.fraction * gate.error.numel()))


@dataclass(frozen=True)
class Threshold:
    """Every token whose error exceeds `threshold`, at most the share `cap`, at least the share `floor`.

    The comparison is strict, and the threshold applies to the bare error; `age_power` and `interest` only order the
    tokens where the cap or the floor has to choose. Without a floor nothing at all may be selected.
    """

    threshold: float
    cap: float = 1.0
    floor: float = 0.0
    age_power: float = 0.0
    interest: float = 0.0

    def __post_init__(self) -> None:
        _check_bounds(self)

    def __call__(self, gate: GateInput) -> Tensor:
        tokens = gate.error.numel()
        passes = gate.error > self.threshold
        passed = passes.nonzero().squeeze(1)
        low, high = int(self.floor * tokens), int(self.cap * tokens)
        if low <= passed.numel() <= high:
            return passed
        scores = token_scores(gate, self.age_power, self.interest)
        if passed.numel() > high:
            return _largest(scores.masked_fill(~passes, -torch.inf), high)
        return _largest(scores.masked_fill(passes, torch.inf), low)


@dataclass(frozen=True)
class Focus:
    """Every token whose error exceeds `threshold`; where that is too much, objects first and the rest in turns.

    Each token that changed takes `renew` others along, whose context changed: they were computed among keys and values
    of long ago. At most the share `cap` is selected and at least the share `floor`, so that frames cost alike; where
    nothing changed, nothing at all. Within these limits tokens go by age x (1 + `interest` x the gate's interest):
    where something was found on the last frame tokens are refreshed together and often, elsewhere the stalest are next.
    The size of the error does not count, because when a camera moves everything has changed, most of all background
    of strong contrast. Blocks of `block` x `block` tokens share their mean order, so that what is chosen is compact:
    windows are refreshed as wholes, and the heads have fewer borders to recompute.
    """

    threshold: float
    cap: float = 1.0
    floor: float = 0.0
    interest: float = 100.0
    block: int = 4
    renew: float = 2.0

    def __post_init__(self) -> None:
        _check_bounds(self)
        if self.block < 1:
            raise UserError(f"Focus: block must be 1 or more tokens, got {self.block}")
        if self.renew < 0:
            raise UserError(f"Focus: renew must be 0 or more tokens, got {self.renew}")

    def __call__(self, gate: GateInput) -> Tensor:
        tokens = gate.error.numel()
        low, high = int(self.floor * tokens), int(self.cap * tokens)
        passes = gate.error > self.threshold
        if not passes.any():
            return torch.empty(0, dtype=torch.int64, device=passes.device)
        order = _blockwise(_favour(gate.age.float(), gate, self.interest), gate.grid, self.block)
        passes = passes[order]
        changed = order[passes]
        wanted = max(low, int((1 + self.renew) * len(changed)))
        return torch.cat([changed, order[~passes]])[: min(wanted, high)]


def _check_bounds(policy: Threshold | Focus) -> None:
    if not 0 <= policy.floor <= policy.cap <= 1:
        name = type(policy).__name__
        raise UserError(f"{name}: need 0 <= floor <= cap <= 1, got floor={policy.floor}, cap={policy.cap}")


def _blockwise(scores: Tensor, grid: Grid | None, side: int) -> Tensor:
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
class RandomK:
    """`k` tokens drawn at random (or the share `fraction`): the baseline every policy has to beat.

    The draw depends on the seed and the frame number only, so runs repeat and streams do not disturb each other.
    """

    k: int | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.k is None) == (self.fraction is None):
            raise UserError("RandomK: give exactly one of k (tokens) and fraction (share of the tokens)")
        if self.k is not None and self.k < 0:
            raise UserError(f"RandomK: k must be 0 or more tokens, got {self.k}")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise UserError(f"RandomK: fraction must lie in [0, 1], got {self.fraction}")

    def __call__(self, gate: GateInput) -> Tensor:
        tokens = gate.error.numel()
        k = self.k if self.k is not None else int((self.fraction or 0.0) * tokens)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + gate.frame)
        return torch.randperm(tokens, generator=generator)[:k].to(gate.error.device)


def select_all(gate: GateInput) -> Tensor:
    """Every token: the eventful network then equals the dense one."""
    return torch.arange(gate.error.numel(), device=gate.error.device)
