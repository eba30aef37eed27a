"""Budgets as values and as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT, Gmacs, Latency, Selector, TopK
from eventful_det.runtime.budget import BudgetOptions, TokenBucket, due_tokens, parse_budget, selector_for


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40GMACs", Gmacs(40)),
        ("1.5 gmacs", Gmacs(1.5)),
        ("50ms", Latency(0.05)),
        ("0.05 s", Latency(0.05)),
        ("25%", 0.25),
        ("96", 96),
        ("96 tokens", 96),
        ("0.25", 0.25),
        (".25", 0.25),
        (0.25, 0.25),
        (96, 96),
        (0, 0),
        (None, None),
        (Gmacs(2), Gmacs(2)),
    ],
)
def test_parse(text: object, budget: object) -> None:
    parsed = parse_budget(text)
    assert parsed == budget and type(parsed) is type(budget)


@pytest.mark.parametrize(
    "text", ["40GFLOPs", "fast", "", "-3", "1e3", "50 m s", "1,5", "ms", "0ms", "0GMACs", "250%", "2.5"]
)
def test_parse_errors(text: str) -> None:
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


def test_written_form_is_read_back() -> None:
    for budget in (Gmacs(40), Gmacs(0.125), Latency(0.05), Latency(1.5)):
        assert parse_budget(str(budget)) == budget


def test_what_a_budget_means() -> None:
    own = TopK(3)
    assert selector_for(own, 0.5) is own and selector_for(None, 0.5) is DEFAULT
    assert selector_for(0.25) == DEFAULT.within(0.25)
    assert selector_for(Gmacs(3), 0.5) == Selector(DEFAULT.policy, Gmacs(3), 0.5)
    for bad in (1.5, -1, -0.1, True, "0.25", float("nan"), DEFAULT.policy):
        with pytest.raises(UserError, match="budget"):
            selector_for(bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"or Latency\(0.05\)"):
        selector_for("50ms")  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    for bad in ({"assured": 1.5}, {"assured": -1}, {"max_age": -1}, {"bucket": -2}, {"bucket": float("nan")}):
        with pytest.raises(UserError, match=next(iter(bad))):
            BudgetOptions(**bad)  # type: ignore[arg-type]


def test_no_token_grows_older_than_stated() -> None:
    """However many grow old at once, and however little else is recomputed."""
    generator = torch.Generator().manual_seed(0)
    for max_age in (1, 2, 3, 7, 20, 100):
        age = torch.ones(53, dtype=torch.int32)
        frames = max(1, max_age // 4)
        for _ in range(3 * max_age + 5):
            due = due_tokens(age, max_age)
            assert int(due.sum()) <= -(-53 // frames)
            chosen = due | (torch.rand(53, generator=generator) < 0.01)
            assert bool((age[~chosen] <= max_age).all())
            age += 1
            age[chosen] = 1
    assert not due_tokens(torch.tensor([10_000]), 0).any()
    assert int(due_tokens(torch.full((6,), 9), 12).sum()) == 0
    assert int(due_tokens(torch.full((6,), 10), 12).sum()) == 2


def test_bucket_by_hand() -> None:
    bucket = TokenBucket(capacity=2)
    assert bucket.limit(10) == 10
    bucket = bucket.after(10, 4)
    assert bucket.level == 6 and bucket.limit(10) == 16
    bucket = bucket.after(10, 0).after(10, 0)
    assert bucket.level == 20
    assert bucket.after(10, 30).level == 0
    assert bucket.after(1, 0).level == 20, "a small round takes nothing away"
    assert bucket.after(10, 1000).level == 0, "no debts"
    assert TokenBucket(0).after(10, 3).level == 0


def test_bucket_holds_every_window() -> None:
    random = np.random.default_rng(1)
    bucket, spent = TokenBucket(capacity=3), []
    for _ in range(500):
        spent.append(min(random.exponential(12), bucket.limit(10)))
        bucket = bucket.after(10, spent[-1])
    total = np.concatenate([[0], np.cumsum(spent)])
    for length in (1, 2, 5, 50):
        assert (total[length:] - total[:-length]).max() <= 10 * length + 30 + 1e-9
