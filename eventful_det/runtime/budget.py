"""What a user may spend, as small typed values, and how they are written down."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from eventful_det.errors import UserError
from eventful_det.gating.policy import Policy, TopFraction, TopK, select_all

AGE_POWER = 0.5  # error x sqrt(age): no token starves
_FORMS = "a share of dense (0.25 or 25%), tokens (96), GMACs (40GMACs) or a time (50ms, 0.05s)"
INTEREST = 4.0  # a token in a sure box counts five times (docs/policies.md)


@dataclass(frozen=True)
class Gmacs:
    """So many 1e9 multiply-adds of the whole detector per step."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise UserError(f"a budget of {self.value} GMACs cannot be held; give a number above 0")

    def __str__(self) -> str:
        return f"{self.value:g}GMACs"


@dataclass(frozen=True)
class Latency:
    """So many seconds of the whole detector per step."""

    seconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UserError(f"a budget of {self.seconds} s cannot be held; give a time above 0")

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:g}ms"


Budget = float | int | Gmacs | Latency | Policy
"""What one step may cost, which is a frame of a `Stream` or a round of a `StreamPool`: a share of the tokens (float in
[0, 1]), tokens (int), `Gmacs`, `Latency`, or a policy, which decides frame by frame and knows no cost."""


def check_budget(budget: Budget) -> Budget:
    """The budget itself.

    Raises:
        UserError: it is none.
    """
    if isinstance(budget, (Gmacs, Latency)) or callable(budget):
        return budget
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
        raise UserError(f"budget={budget!r} is none; give {_FORMS}, or a policy")
    if isinstance(budget, float) and budget > 1:
        raise UserError(f"a budget of {budget} is more than the frame; give a share in [0, 1], or tokens as an int")
    return budget


def parse_budget(value: object) -> Budget | None:
    """A budget as written in a config or on a slider: a number, or text such as "25%", "40 GMACs" or "50ms".

    Returns:
        None for None.

    Raises:
        UserError: it cannot be understood.
    """
    if value is None:
        return None
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


def policy_for(budget: Budget) -> Policy:
    """The policy that spends a budget of tokens on each frame alone.

    Args:
        budget: tokens per frame (an int), a share of the tokens (a float in [0, 1]), or a policy.

    Raises:
        UserError: the budget is none, or one that takes a stream to hold.
    """
    budget = check_budget(budget)
    if isinstance(budget, (Gmacs, Latency)):
        raise UserError(f"a budget of {budget} is held by streams and pools; here give tokens, a share, or a policy")
    if isinstance(budget, int):
        return TopK(budget, AGE_POWER, INTEREST)
    if isinstance(budget, float):
        return select_all if budget == 1 else TopFraction(budget, AGE_POWER, INTEREST)
    return budget
