"""Steps of a detector within a budget.

Shares and tokens are held by the selector itself. What takes memory from step to step is here: GMACs, which need
prices; seconds, which need a clock of the machine; a token bucket; and tokens that would grow too old. Nothing
integrates an error, so nothing winds up while a budget is out of reach or not needed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.protocol import AnyRule, CostModel, Network, S, T
from eventful_det.detectors.results import StepResult
from eventful_det.gating.paper import Paper
from eventful_det.gating.selector import (
    DEFAULT,
    Budget,
    GateInput,
    Gmacs,
    Latency,
    Merged,
    Policy,
    Ranking,
    Selector,
    merge,
    ranked,
    tokens_allowed,
)
from eventful_det.gating.state import State
from eventful_det.gating.windows import Grid
from eventful_det.runtime.budget import BudgetOptions, TokenBucket, due_tokens, selector_for, worth
from eventful_det.runtime.pace import Clock, Load
from eventful_det.runtime.session import KeyFrame, Result, Session, StreamOptions, StreamResult, StreamSession

_FLOOR = 1 / 32  # of the tokens may be recomputed however slow the machine is: the detector stays alive
_KEY = cast(float, DEFAULT.budget)  # of the tokens a key frame may recompute, although frames are held to pay for it
_LONGEST = 64.0  # frames from one key frame to the next, however small the budget is
_LATE = 10  # of the smallest steps are too slow, and a budget in seconds is out of reach
_NEVER = 2**30  # frames
_LOG = logging.getLogger(__name__)
_MEMORY = 0.7  # weight of what was known in a running mean


R = TypeVar("R", bound=Result)
Due = tuple[Session[S, T, R], KeyFrame]  # a stream and the frame of it on which the network has to run


class _Setting(NamedTuple):
    """A budget as it was set, the selector that it means, and what is left over of it."""

    budget: Budget | Selector
    selector: Selector
    bucket: TokenBucket


class NetworkStepper(Generic[S, T, R]):
    """Runs the key frames of one or more streams in one step of the network, within a budget.

    A step spends at most the budget and what the bucket holds; seconds are held by feedback. Flushes are paid from
    outside of it, and so are tokens that would grow too old where the budget is too small even for them. Of GMACs the
    variable part of the detector is reckoned at its bound; what it leaves goes to the bucket.

    Of sessions that hold frames as the budget demands (`auto`) a key frame may recompute what the default does, however
    small the budget is. Frames are held until that is paid for.

    Args:
        detector: runs the steps.
        rule: how tokens are recomputed.
        budget: of a step, as for `Stream`; streams share all but a `Selector` that says otherwise.
        options: of the budget. Under a `Selector` that streams do not share, `max_age` alone counts.
        timing: measure the seconds of each part, as a budget in seconds does in any case.
        default: what is selected without a budget, and the policy within one.

    Raises:
        UserError: the budget is none, or the rule cannot hold it.
    """

    def __init__(
        self,
        detector: Network[S, T],
        *,
        rule: AnyRule,
        budget: Budget | Selector,
        options: BudgetOptions | None,
        timing: bool,
        default: Selector = DEFAULT,
    ) -> None:
        self.detector, self.rule, self.timing, self.default = detector, rule, timing, default
        self.options = options or BudgetOptions()
        self.clock = Clock()
        self.budget = budget

    @property
    def budget(self) -> Budget | Selector:
        """As it was set. A new budget begins with an empty bucket."""
        return self._setting.budget

    @budget.setter
    def budget(self, budget: Budget | Selector) -> None:
        selector = selector_for(budget, self.options.assured, self.default)
        if isinstance(selector.budget, (Gmacs, Latency)) or self.options != BudgetOptions(self.options.assured):
            self.detector.cost_model(self.rule)  # raises where there is none
        self._setting = _Setting(budget, selector, TokenBucket(self.options.bucket))  # at once: threads may set it
        self.late = 0  # steps so far that took longer than a budget in seconds, although they were the smallest

    def step(self, due: Sequence[Due[S, T, R]], sharing: Sequence[Session[S, T, R]] = ()) -> list[R]:
        """Run the detector on the next key frame of each of some streams.

        Args:
            due: streams and their frames.
            sharing: among which the budget is shared, those that wait for their turn included; empty = each has it.
        """
        setting = self._setting
        plan = _Plan(self, due, setting)
        timing = self.timing or isinstance(plan.selector.budget, Latency)
        state = State([session.state.streams[0] for session, _ in due])
        results = self.detector.step(
            [key.image for _, key in due],
            state,
            rule=self.rule,
            selector=plan if plan.needed else plan.selector,
            flush=[key.flush for _, key in due],
            timing=timing,
        )
        for (session, key), remembered, result in zip(due, state.streams, results, strict=True):
            session.state.streams[0] = remembered
            if timing:
                for part, seconds in key.seconds.items():
                    result.cost.seconds[part] = result.cost.seconds.get(part, 0.0) + seconds
        if setting is self._setting:  # whatever budget was set meanwhile counts from the next step on
            self._setting = setting._replace(bucket=plan.settle(results))
        if timing:
            self._observe(results)
        if isinstance(plan.selector.budget, Latency):
            plan.remember(results)
        return [
            session.finish(key, result, self._price(setting, session, key, result, sharing))
            for (session, key), result in zip(due, results, strict=True)
        ]

    def _price(
        self,
        setting: _Setting,
        session: Session[S, T, R],
        key: KeyFrame,
        result: T,
        sharing: Sequence[Session[S, T, R]],
    ) -> float | None:
        """What a frame cost in what it might; None where a user chose the frames or the tokens."""
        budget, cost, moving = setting.budget, result.cost, 0.0
        if not session.auto or (isinstance(budget, Selector) and budget != self.default):
            return None
        if budget is None or isinstance(budget, Selector) or cost.flush:
            return 0.0  # nothing to pay
        if isinstance(budget, Gmacs):
            spent, income = cost.total / 1e9, budget.value
        elif isinstance(budget, Latency):
            spent, income, moving = cost.latency, budget.seconds, key.seconds.get("motion", 0.0)
        else:
            spent, income = float(cost.recomputed), float(tokens_allowed(budget, (len(sharing) or 1) * cost.tokens))
        part = session.options.priority / sum(one.options.priority for one in sharing) if sharing else 1.0
        income = part * income - moving  # boxes move on every frame
        return min(_LONGEST, (spent - moving) / income) if income > 0 else _LONGEST

    def _observe(self, results: Sequence[T]) -> None:
        """Remember how long a step took."""
        costs = [result.cost for result in results]
        whole = all(cost.recomputed == cost.tokens for cost in costs)
        if whole or not any(cost.flush for cost in costs):
            load = Load(len(costs), sum(cost.total for cost in costs) / 1e9)
            self.clock.observe(load, sum(cost.latency for cost in costs), whole)


class Budgeted(ABC):
    """What has a stepper, whose budget may be set between any two steps; `with` closes it in the end."""

    _stepper: NetworkStepper[Any, Any, Any]

    @abstractmethod
    def close(self) -> None:
        """Release the sources; iteration ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def budget(self) -> Budget | Selector:
        """What a frame (of a pool, a round) may cost, as it was set; None = the default selector."""
        return self._stepper.budget

    @budget.setter
    def budget(self, budget: Budget | Selector) -> None:
        before, self._stepper.budget = self._stepper.budget, budget
        for session in self._sessions():  # they wait for what frames took, which is less of a larger budget
            session.relieve(session.debt - min(_LONGEST, session.debt * worth(before, budget)))

    def _sessions(self) -> Sequence[StreamSession[Any]]:
        """Those that may hold frames."""
        return ()


class Stepper(NetworkStepper[S, StepResult, StreamResult]):
    """That of a detector."""


class _Plan(Generic[S, T, R]):
    """Selects the tokens of one step, where the selector alone cannot."""

    def __init__(self, stepper: NetworkStepper[S, T, R], due: Sequence[Due[S, T, R]], setting: _Setting) -> None:
        self.stepper, self.options = stepper, stepper.options
        _, selector, bucket = setting
        self.selector, self.bucket = selector, bucket
        self.sessions = [session for session, _ in due]
        self.keys = [key for _, key in due]
        self.priced = isinstance(selector.budget, (Gmacs, Latency))
        self.shared = self.priced or selector.assured is not None
        known = any(key.expected is not None for key in self.keys)
        own = any(session.options != StreamOptions() for session in self.sessions)
        single = not isinstance(stepper.rule, Paper)  # which has many gates in a frame
        self.needed = (self.shared and single) or self.options.max_age > 0 or known or own
        self.asked: list[int] = []  # places of the streams that the budget is for: all but those that are flushed
        self.allowance = 0.0  # in tokens or MACs
        self.taken = 0  # tokens that were selected; engines round that up
        self.least = 0.0  # tokens or MACs of the smallest step that recomputes something
        self.smallest = False  # such a step is taken, for want of seconds

    def __call__(self, gates: Sequence[GateInput]) -> Sequence[Tensor]:
        """For each gate the flat indices of its tokens."""
        gates = [self.sessions[gate.stream].aim(gate, self.keys[gate.stream]) for gate in gates]
        if not self.shared:
            alone = self._choose if self.options.max_age else self._select
            return [alone([gate])[0] for gate in gates]
        self.asked = [gate.stream for gate in gates]
        return self._choose(gates) if gates else []

    def _policy(self, gate: GateInput) -> Policy:
        return self.sessions[gate.stream].options.policy or self.selector.policy

    def _select(self, gates: Sequence[GateInput]) -> Sequence[Tensor]:
        """The tokens of a stream that has the budget for itself."""
        return dataclasses.replace(self.selector, policy=self._policy(gates[0]))(gates)

    def settle(self, results: Sequence[T]) -> TokenBucket:
        """The bucket after the step."""
        if not self.asked or isinstance(self.selector.budget, Latency):
            return self.bucket
        costs = [results[i].cost for i in self.asked]
        spent = sum(cost.total if self.priced else cost.recomputed for cost in costs)
        excess = 0.0 if self.priced else max(0.0, spent - self.taken)
        return self.bucket.after(self.allowance, spent, self.least, excess)

    def remember(self, results: Sequence[T]) -> None:
        """How much the variable part of the detector took, and whether seconds can be held at all."""
        taken, budget = sum(result.cost.latency for result in results), cast(Latency, self.selector.budget)
        late = self.smallest and taken > budget.seconds
        self.stepper.late += late
        if late and self.stepper.late == _LATE:
            message = "budget=%s is out of reach: the smallest step takes %.0f ms here; give more, or leave hold out"
            _LOG.warning(message, budget, 1e3 * taken)
        variable = self._costs.variable
        for session, result in zip(self.sessions, results, strict=True):
            if result.cost.recomputed:
                now = float(result.cost.macs[variable])
                before = now if session.variable_macs is None else session.variable_macs
                session.variable_macs = _MEMORY * before + (1 - _MEMORY) * now

    @property
    def _costs(self) -> CostModel:
        return self.stepper.detector.cost_model(self.stepper.rule)

    def _choose(self, gates: Sequence[GateInput]) -> Sequence[Tensor]:
        """The tokens of streams that share the budget."""
        order, due = self._order(gates)
        budget = self.selector.budget
        if isinstance(budget, Latency):
            return self._choose_in_time(gates, order, due, budget.seconds)
        count = max(due, self._affordable(gates, order), self._least(gates))
        streams = order.stream.unique()
        if count > due and len(streams) > 1 and len(order.stream[:count].unique()) < len(streams):  # they take turns
            waited = torch.stack([_waited(gate) for gate in gates])[order.stream]
            waited[:due] = waited.max() + 1
            turn = waited.argsort(descending=True, stable=True)
            order = Merged(order.stream[turn], order.index[turn], order.streams)
            count = max(due, self._affordable(gates, order), self._least(gates))
        self.taken = min(count, len(order.index))
        return order.take(count)

    def _affordable(self, gates: Sequence[GateInput], order: Merged) -> int:
        """How many tokens of an order the budget and the bucket allow."""
        budget, tokens = self.selector.budget, sum(gate.tokens for gate in gates)
        if not isinstance(budget, Gmacs):
            assert not isinstance(budget, Latency)
            self.allowance = budget * tokens if isinstance(budget, float) else float(tokens_allowed(budget, tokens))
            self.least = 1.0
            return int(self.bucket.limit(self.allowance))
        totals = self._totals(gates, order)
        idle, self.least = float(totals[0]), float(totals[:2][-1])
        self.allowance = max(int(1e9 * budget.value), idle + self.least // _LONGEST)
        return int((totals <= self.bucket.limit(self.allowance)).sum()) - 1

    def _least(self, gates: Sequence[GateInput]) -> int:
        """How many tokens may be recomputed whatever that costs: those of key frames that others pay for."""
        return int(_KEY * sum(gate.tokens for gate in gates if self.sessions[gate.stream].auto))

    def _order(self, gates: Sequence[GateInput]) -> tuple[Merged, int]:
        """The wanted tokens of all streams, those that would grow too old first, and how many these are."""
        due = [due_tokens(gate.age, self.options.max_age) for gate in gates]
        rankings = []
        for gate, old in zip(gates, due, strict=True):
            order, wanted = ranked(self._policy(gate), gate)
            rest = order[:wanted][~old[order[:wanted]]]
            rankings.append(Ranking(rest, len(rest)))
        priorities = [self.sessions[gate.stream].options.priority for gate in gates]
        merged = merge(rankings, [gate.tokens for gate in gates], self.selector.assured or 0.0, priorities)
        first = [old.nonzero().squeeze(1) for old in due]
        stream = [torch.full_like(index, i) for i, index in enumerate(first)]
        both = Merged(torch.cat([*stream, merged.stream]), torch.cat([*first, merged.index]), len(gates))
        return both, sum(map(len, first))

    def _choose_in_time(self, gates: Sequence[GateInput], order: Merged, due: int, seconds: float) -> Sequence[Tensor]:
        """As many tokens as the machine can do in so many seconds; all of them where that is quicker than some."""
        totals, clock = self._totals(gates, order, expected=True), self.stepper.clock
        tokens = sum(gate.tokens for gate in gates)
        least = max(self._least(gates), math.ceil(_FLOOR * tokens))
        floor = float(totals[min(len(order.index), least)])
        affordable = 1e9 * clock.gmacs(len(gates), seconds)
        self.smallest = affordable < floor and bool(len(order.index)) and not self._least(gates)
        affordable = max(floor, affordable)
        count = max(due, int((totals <= affordable).sum()) - 1)
        dense = sum(self._costs.everything(_grid(gate)) for gate in gates) / 1e9
        whole = all(gate.ignored is None for gate in gates)
        if whole and count and clock.prefers_dense(Load(len(gates), float(totals[count]) / 1e9), dense, seconds):
            return [torch.arange(gate.age.numel(), device=gate.age.device) for gate in gates]
        return order.take(count)

    def _totals(self, gates: Sequence[GateInput], order: Merged, expected: bool = False) -> Tensor:
        """`(M + 1,)` MACs of the first 0, 1, ... M tokens of an order, the variable part as expected or at most."""
        totals = torch.zeros(len(order.index) + 1, dtype=torch.long, device=order.index.device)
        for i, gate in enumerate(gates):
            mine = order.stream == i
            variable = self.sessions[gate.stream].variable_macs if expected else None
            macs = self._costs.macs(_grid(gate), order.index[mine], None if variable is None else round(variable))
            totals += macs[F.pad(mine.cumsum(0), (1, 0))]
        return totals


def _waited(gate: GateInput) -> Tensor:
    """For how many frames nothing of a stream was recomputed."""
    return (gate.age if gate.ignored is None else gate.age.masked_fill(gate.ignored, _NEVER)).min()


def _grid(gate: GateInput) -> Grid:
    """Tokens of the frame, which gates of rules with a cost model always tell."""
    return cast(Grid, gate.grid)
