"""Spends a budget on the streams that share the steps of a detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.anatomy import Grid
from eventful_det.gating.policy import GateInput, JointPolicy
from eventful_det.gating.rows import Rows
from eventful_det.gating.state import State
from eventful_det.models.detector import Detector, StepResult
from eventful_det.models.prices import PriceList
from eventful_det.runtime.budget import Budget, Gmacs, Latency, check_budget, policy_for
from eventful_det.runtime.control import Bank, Clock, Load
from eventful_det.runtime.sharing import Order, Terms, affordable, due_tokens, order_tokens

_FLOOR = 1 / 32  # of the tokens may be recomputed however slow the machine is: the detector stays alive
_MEMORY = 0.7  # weight of what was known in a running mean


@dataclass
class Account:
    """What a spender remembers of one stream.

    Attributes:
        calm: frames since a token of the stream last changed.
        regions: MACs that the region heads took in its last frames, on average; None before the first.
    """

    calm: int = 0
    regions: int | None = None


class _Asked(NamedTuple):
    """A stream whose tokens are to be chosen."""

    gate: GateInput
    account: Account

    @property
    def grid(self) -> Grid:
        """Tokens of its frame, which gates of the rows rule always tell."""
        return cast(Grid, self.gate.grid)


@dataclass
class _Plan:
    """A step under way; whatever budget is set meanwhile counts from the next one on.

    Attributes:
        budget: of the step.
        streams: places of those that share it, which flushes do not.
        allowance: what they may spend without the bank, in tokens or MACs.
    """

    budget: Budget | None
    streams: tuple[int, ...] = ()
    allowance: float = 0.0


class Spender:
    """Steps a detector within a budget, which may be set between any two steps.

    Tokens, shares and GMACs are held by construction: a step spends at most the budget and what the bank holds. Flushes
    are paid from outside of it, and so are due tokens where the budget is too small even for them. Of GMACs the region
    heads are reckoned at their upper bound; what they leave goes to the bank. Seconds are held by feedback.

    Args:
        detector: a view of the caller's own; its policy is set where the budget is one.
        budget: None = the detector's policy decides.
        terms: None = the default terms under a budget, none under a policy.

    Attributes:
        clock: what steps take on this machine.
    """

    def __init__(self, detector: Detector, budget: Budget | None, terms: Terms | None) -> None:
        self.detector, self.terms = detector, terms or Terms()
        self.clock = Clock()
        self._bounds_policies = terms is not None and terms.max_age > 0
        self._bank = Bank(self.terms.bank)
        self._price_list: PriceList | None = None
        self._budget: Budget | None = None
        if budget is not None:
            self.budget = budget

    @property
    def budget(self) -> Budget | None:
        """As it was set; None = the detector's own policy decides. A new budget begins with an empty bank."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        check_budget(budget)
        if isinstance(budget, (Gmacs, Latency)):
            PriceList.of(self.detector)  # raises where there is none
        elif callable(budget):
            self.detector.policy = budget
        elif budget == 1.0 or not isinstance(self.detector.rule, Rows):
            self.detector.policy = policy_for(budget)
        self._budget, self._bank = budget, Bank(self.terms.bank)

    @property
    def _prices(self) -> PriceList:
        if self._price_list is None:
            self._price_list = PriceList.of(self.detector)
        return self._price_list

    def step(
        self,
        frames: Sequence[Tensor],
        state: State,
        flush: Sequence[bool],
        accounts: Sequence[Account],
        prepared: Sequence[float],
    ) -> list[StepResult]:
        """`Detector.step` within the budget.

        Args:
            frames: `(3, h, w)` of every stream.
            state: of the streams.
            flush: streams to recompute in full.
            accounts: of the streams, updated in place.
            prepared: seconds that each frame took before the step; they count as "other".
        """
        plan = _Plan(self._budget)
        results = self.detector.step(frames, state, flush, self._joint(accounts, plan))
        for result, seconds in zip(results, prepared, strict=True):
            result.cost.seconds["other"] = result.cost.seconds.get("other", 0.0) + seconds
        if plan.streams and plan.budget is self._budget and not isinstance(plan.budget, Latency):
            costs = [results[i].cost for i in plan.streams]
            spent = sum(cost.total if isinstance(plan.budget, Gmacs) else cost.recomputed for cost in costs)
            self._bank = self._bank.settle(plan.allowance, spent)
        self._learn(results, accounts)
        return results

    def _joint(self, accounts: Sequence[Account], plan: _Plan) -> JointPolicy | None:
        """What chooses the tokens of a step; None = the detector's policy, stream by stream."""
        if not isinstance(self.detector.rule, Rows):
            return None
        if plan.budget is None or callable(plan.budget) or plan.budget == 1.0:
            return self._policy_and_due if self._bounds_policies else None

        def choose(gates: Sequence[GateInput]) -> Sequence[Tensor]:
            plan.streams = tuple(gate.stream for gate in gates)
            asked = [_Asked(gate, accounts[gate.stream]) for gate in gates]
            return self._choose(asked, plan) if asked else []

        return choose

    def _policy_and_due(self, gates: Sequence[GateInput]) -> Sequence[Tensor]:
        """The tokens of the detector's policy, and those that would grow too old."""
        chosen = []
        for gate in gates:
            due = due_tokens(gate.age, self.terms.max_age)
            due[self.detector.policy(gate)] = True  # type: ignore[misc]
            chosen.append(due.nonzero().squeeze(1))
        return chosen

    def _choose(self, asked: Sequence[_Asked], plan: _Plan) -> Sequence[Tensor]:
        """The tokens of streams that share the budget."""
        for one in asked:
            changed = bool((one.gate.error > self.terms.noise).any())
            one.account.calm = 0 if changed else one.account.calm + 1
        order = order_tokens([one.gate for one in asked], self.terms, [one.account.calm for one in asked])
        budget = plan.budget
        if isinstance(budget, Latency):
            return self._choose_in_time(order, self._totals(order, asked, expected=True), asked, budget.seconds)
        if isinstance(budget, Gmacs):
            totals, plan.allowance = self._totals(order, asked), 1e9 * budget.value
        else:
            totals = torch.arange(len(order.index) + 1)
            tokens = sum(one.gate.age.numel() for one in asked)
            plan.allowance = budget * tokens if isinstance(budget, float) else float(cast(int, budget))
        purse, surplus = self._bank.purse(plan.allowance), self._bank.surplus(plan.allowance)
        return order.take(affordable(order, totals, purse, surplus), len(asked))

    def _choose_in_time(
        self, order: Order, totals: Tensor, asked: Sequence[_Asked], seconds: float
    ) -> Sequence[Tensor]:
        """As many tokens as the machine can do in so many seconds; all of them where that is quicker than some."""
        tokens = sum(one.gate.age.numel() for one in asked)
        floor = float(totals[min(len(order.index), math.ceil(_FLOOR * tokens))])
        purse = max(floor, 1e9 * self.clock.gmacs(len(asked), seconds))
        count = affordable(order, totals, purse, purse)
        load = Load(len(asked), float(totals[count]) / 1e9)
        dense = sum(self._prices.whole(one.grid) for one in asked) / 1e9
        if self.clock.prefers_dense(load, dense, seconds):
            return [torch.arange(one.gate.age.numel(), device=one.gate.age.device) for one in asked]
        return order.take(count, len(asked))

    def _totals(self, order: Order, asked: Sequence[_Asked], expected: bool = False) -> Tensor:
        """`(M + 1,)` MACs of the first 0, 1, ... M tokens of an order, with the regions expected or at most."""
        totals = torch.zeros(len(order.index) + 1, dtype=torch.long, device=order.index.device)
        for i, one in enumerate(asked):
            mine = order.stream == i
            regions = one.account.regions if expected else None
            prices = self._prices.prices(one.grid, order.index[mine], regions)
            totals += prices[F.pad(mine.cumsum(0), (1, 0))]
        return totals

    def _learn(self, results: Sequence[StepResult], accounts: Sequence[Account]) -> None:
        """Remember how long the step took and how many regions the streams need."""
        costs = [result.cost for result in results]
        whole = all(cost.recomputed == cost.tokens for cost in costs)
        if whole or not any(cost.flush for cost in costs):
            load = Load(len(costs), sum(cost.total for cost in costs) / 1e9)
            self.clock.observe(load, sum(cost.latency for cost in costs), whole)
        for cost, account in zip(costs, accounts, strict=True):
            if cost.flush:
                account.calm = 0
            if cost.recomputed:
                before = cost.macs["roi"] if account.regions is None else account.regions
                account.regions = round(_MEMORY * before + (1 - _MEMORY) * cost.macs["roi"])
