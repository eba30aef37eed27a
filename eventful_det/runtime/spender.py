"""Spends a budget on the streams that share the steps of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.policy import GateInput
from eventful_det.gating.rows import Rows
from eventful_det.gating.state import State
from eventful_det.models.detector import Detector, StepResult
from eventful_det.runtime.budget import Budget, Gmacs, Latency, check_budget, policy_for
from eventful_det.runtime.sharing import Terms, longest, order_tokens


@dataclass
class Account:
    """What a spender remembers of one stream.

    Attributes:
        calm: frames since a token of the stream last changed.
    """

    calm: int = 0


class Spender:
    """Steps a detector within a budget, which may be set between any two steps."""

    def __init__(self, detector: Detector, budget: Budget | None, terms: Terms) -> None:
        self.detector, self.terms = detector, terms
        self._budget: Budget | None = None
        if budget is not None:
            self.budget = budget

    @property
    def budget(self) -> Budget | None:
        """As it was set; None = the detector's own policy decides."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._budget = check_budget(budget)
        if callable(budget):
            self.detector.policy = budget
        elif not isinstance(self.detector.rule, Rows):
            if isinstance(budget, (Gmacs, Latency)):
                raise UserError(f"a budget of {budget} needs gate=rows; give tokens, a share or a policy")
            self.detector.policy = policy_for(budget)

    @property
    def shares(self) -> bool:
        """Whether tokens are chosen by the budget, not by the detector's policy."""
        return self._budget is not None and not callable(self._budget) and isinstance(self.detector.rule, Rows)

    def step(
        self, frames: Sequence[Tensor], state: State, flush: Sequence[bool], accounts: Sequence[Account]
    ) -> list[StepResult]:
        """`Detector.step` within the budget.

        Args:
            frames: `(3, h, w)` of every stream.
            state: of the streams.
            flush: streams to recompute in full; that is paid from outside of the budget.
            accounts: of the streams, updated in place.
        """
        if not self.shares:
            return self.detector.step(frames, state, flush)

        def choose(gates: Sequence[GateInput]) -> Sequence[Tensor]:
            return self._choose(gates, [accounts[gate.stream] for gate in gates])

        results = self.detector.step(frames, state, flush, choose)
        for account, result in zip(accounts, results, strict=True):
            if result.cost.flush:
                account.calm = 0
        return results

    def _choose(self, gates: Sequence[GateInput], accounts: Sequence[Account]) -> Sequence[Tensor]:
        for gate, account in zip(gates, accounts, strict=True):
            account.calm = 0 if bool((gate.error > self.terms.noise).any()) else account.calm + 1
        if not gates:
            return []
        order = order_tokens(gates, self.terms, [account.calm for account in accounts])
        purse = self._purse(sum(gate.age.numel() for gate in gates))
        count = longest(float, order.due, len(order.index), purse)
        return order.take(count, len(gates))

    def _purse(self, tokens: int) -> float:
        """Tokens that may be recomputed of so many."""
        if isinstance(self._budget, float):
            return self._budget * tokens
        if isinstance(self._budget, int):
            return self._budget
        return tokens
