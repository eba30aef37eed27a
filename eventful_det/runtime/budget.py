"""How budgets are written down, and what may be made of them from step to step."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT, Budget, Gmacs, Latency, Selector, check_budget
from eventful_det.options import Natural, NonNegative, Share, convert_fields

_FORMS = "a share of the tokens (0.25 or 25%), tokens (96), GMACs (40GMACs) or a time (50ms, 0.05s)"


@dataclass(frozen=True)
class BudgetOptions:
    """What is kept of a budget, how old tokens may grow, and what every stream may count on.

    Attributes:
        assured: of a budget that several streams share, each is assured of this part of its proportion, see
            `eventful_det.gating.selector.merge`.
        max_age: no token grows older than so many frames; 0 = no bound. It wins over the budget.
        bucket: what is left over of a budget is kept for busy moments, up to that of so many steps. 0 = no step may
            cost more than the budget. Seconds cannot be kept.
    """

    assured: Share = 0.5
    max_age: Natural = 0
    bucket: NonNegative = 0.0

    def __post_init__(self) -> None:
        convert_fields(self, "")


def selector_for(budget: Budget | Selector, assured: float | None = None, default: Selector = DEFAULT) -> Selector:
    """The selector that a budget means: the policy of the default within it. None is the default itself.

    Raises:
        UserError: the budget is none.
    """
    if isinstance(budget, Selector):
        return budget
    if callable(budget):
        raise UserError(f"budget={budget!r} is none; make a policy one by Selector(policy, budget)")
    return default if budget is None else Selector(default.policy, budget, assured)


def parse_budget(value: object) -> Budget:
    """A budget as written in a config or on a slider: a number, or text such as "25%", "40 GMACs" or "50ms".

    Returns:
        None for None.

    Raises:
        UserError: it cannot be understood.
    """
    if not isinstance(value, str):
        return check_budget(value)  # type: ignore[arg-type]
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|[a-z]*)\s*", value, re.IGNORECASE)
    unit = found[2].lower() if found else None
    if found is None or unit not in ("", "%", "tokens", "gmacs", "gmac", "ms", "s"):
        raise UserError(f"budget={value!r} cannot be understood; give {_FORMS}")
    number = float(found[1])
    if unit == "%":
        return check_budget(number / 100)
    if unit in ("gmacs", "gmac"):
        return Gmacs(number)
    if unit in ("ms", "s"):
        return Latency(number / 1e3 if unit == "ms" else number)
    return check_budget(number if "." in found[1] and not unit else int(number))


@dataclass(frozen=True)
class TokenBucket:
    """Budget that was not spent is kept, up to so many steps' worth, for a busy moment.

    In any n steps in a row at most n allowances and the bucket's capacity are spent. It starts empty. Where even the
    smallest step takes more than an allowance, the bucket can hold one such step, so that it is saved up for.

    Attributes:
        capacity: in allowances of one step.
        level: what is in it, in tokens or MACs; below 0 where an engine recomputed more tokens than were selected.
    """

    capacity: float
    level: float = 0.0

    def limit(self, allowance: float) -> float:
        """What may be spent on a step."""
        return allowance + self.level

    def after(self, allowance: float, spent: float, least: float = 0.0, excess: float = 0.0) -> TokenBucket:
        """The bucket after a step, `excess` of it unasked for; the smallest would have spent `least`."""
        most = max(self.capacity * allowance, self.level)  # a step of fewer streams takes nothing away
        most = max(most, least) if least > allowance else most
        return dataclasses.replace(self, level=min(most, max(min(self.level, -excess), self.limit(allowance) - spent)))


def worth(old: object, new: object) -> float:
    """How many frames under a new budget pay for one under the old; 0 where these cannot be compared."""
    if isinstance(old, Gmacs) and isinstance(new, Gmacs):
        old, new = old.value, new.value
    elif isinstance(old, Latency) and isinstance(new, Latency):
        old, new = old.seconds, new.seconds
    if type(old) is not type(new) or not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
        return 0.0
    return old / new if new else 1.0


def due_tokens(age: Tensor, max_age: int) -> Tensor:
    """Tokens that have to be recomputed now so that none grows older than `max_age` frames, `(N,)` booleans.

    In the last S = `max_age` / 4 frames before their time tokens are renewed oldest first, N / S at once, so that even
    if all N are equally old, as after a flush, the last are just in time.

    Example: of six tokens, all 10 frames old, with `max_age` 12, two are due on each of the next three frames.
    """
    due = torch.zeros_like(age, dtype=torch.bool)
    if max_age:
        frames = max(1, max_age // 4)
        oldest = age.argsort(descending=True, stable=True)[: -(-age.numel() // frames)]
        due[oldest] = age[oldest] > max_age - frames
    return due
