"""What a user may spend on a frame, as a policy."""

from __future__ import annotations

from eventful_det.errors import UserError
from eventful_det.gating.policy import Policy, TopFraction, TopK, select_all

AGE_POWER = 0.5  # error x sqrt(age): no token starves
INTEREST = 4.0  # a token in a sure box counts five times (docs/policies.md)


def policy_for(budget: float | int | Policy) -> Policy:
    """The policy that spends a budget.

    Args:
        budget: tokens per frame (an int), a share of the tokens (a float in [0, 1]), or a policy.

    Raises:
        UserError: the budget is none of these.
    """
    if callable(budget):
        return budget
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget < 0:
        raise UserError(f"budget must be tokens (int), a share in [0, 1] (float) or a policy, got {budget!r}")
    if isinstance(budget, int):
        return TopK(budget, AGE_POWER, INTEREST)
    if budget > 1:
        raise UserError(f"a budget of {budget} is more than the frame; give a share in [0, 1], or tokens as an int")
    return select_all if budget == 1 else TopFraction(budget, AGE_POWER, INTEREST)
