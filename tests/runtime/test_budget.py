"""Budgets as values and as text."""

from __future__ import annotations

import pytest

from eventful_det.errors import UserError
from eventful_det.gating.policy import TopK
from eventful_det.runtime.budget import Gmacs, Latency, check_budget, parse_budget


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


def test_check() -> None:
    policy = TopK(3)
    assert check_budget(policy) is policy
    for bad in (1.5, -1, -0.1, True, "0.25", None, float("nan")):
        with pytest.raises(UserError, match="budget"):
            check_budget(bad)  # type: ignore[arg-type]
    for make in (Gmacs, Latency):
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(UserError, match="budget"):
                make(value)
