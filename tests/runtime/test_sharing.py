"""The order in which streams that share a budget are served."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.policy import GateInput
from eventful_det.runtime.sharing import Order, Terms, affordable, due_tokens, order_tokens


def gate(error: list[float], age: list[int] | None = None, stream: int = 0) -> GateInput:
    return GateInput(torch.tensor(error), torch.tensor(age or [1] * len(error), dtype=torch.int32), 5, stream=stream)


def tokens(order: Order) -> list[tuple[int, int]]:
    return list(zip(order.stream.tolist(), order.index.tolist(), strict=True))


def test_due_then_changed_then_stale() -> None:
    quiet = gate([0.0, 9.0, 0.0, 0.0], [3, 2, 100, 7])
    busy = gate([5.0, 1.0, 8.0, 3.0], [1, 9, 1, 1])
    order = order_tokens([quiet, busy], Terms(noise=2, age_power=0, min_share=0, max_age=100), [0, 0])
    assert (order.due, order.changed) == (1, 4)
    assert tokens(order) == [(0, 2), (0, 1), (1, 2), (1, 0), (1, 3), (1, 1), (0, 3), (0, 0)]
    taken = order.take(3, 2)
    assert [t.tolist() for t in taken] == [[2, 1], [2]]


def test_age_counts() -> None:
    order = order_tokens([gate([4.0, 3.0], [1, 4])], Terms(noise=2, age_power=0.5), [0])
    assert order.index.tolist() == [1, 0]


def test_tokens_renewed_since_the_last_change_are_left_out() -> None:
    still = gate([0.0, 0.0, 1.0], [3, 2, 5])
    assert order_tokens([still], Terms(), [0]).index.tolist() == [2, 0, 1]
    assert order_tokens([still], Terms(), [2]).index.tolist() == [2, 0]
    assert order_tokens([still], Terms(), [5]).index.tolist() == []


@pytest.mark.parametrize("min_share", [0.0, 0.3, 0.5, 0.9])
def test_every_stream_gets_its_minimum(min_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (40, 40, 120)
    loud = (1.0, 10.0, 0.1)  # errors of the first and the last stream are always smaller
    gates = [
        GateInput(volume * (1 + torch.rand(n, generator=generator)), torch.ones(n, dtype=torch.int32), 1, stream=i)
        for i, (n, volume) in enumerate(zip(sizes, loud, strict=True))
    ]
    order = order_tokens(gates, Terms(noise=0, min_share=min_share), [0, 0, 0])
    assert order.changed == 200
    for count in range(0, 201, 7):
        for i, size in enumerate(sizes):
            got = int((order.stream[:count] == i).sum())
            assert got >= min(size, int(min_share * count * size / 200)) - 1
    if min_share == 0:
        assert order.stream[:40].tolist() == [1] * 40


def test_no_token_grows_older_than_stated() -> None:
    """However many grow old at once, and however little else is recomputed."""
    generator = torch.Generator().manual_seed(0)
    for max_age in (1, 2, 3, 7, 20, 100):
        age = torch.ones(53, dtype=torch.int32)
        slices = max(1, max_age // 4)
        for _ in range(3 * max_age + 5):
            due = due_tokens(age, max_age)
            assert int(due.sum()) <= -(-53 // slices)
            chosen = due | (torch.rand(53, generator=generator) < 0.01)
            assert bool((age[~chosen] <= max_age).all())
            age += 1
            age[chosen] = 1
    assert not due_tokens(torch.tensor([10_000]), 0).any()


def order_of(due: int, changed: int, unchanged: int) -> Order:
    total = due + changed + unchanged
    return Order(torch.zeros(total, dtype=torch.long), torch.arange(total), due, changed)


@pytest.mark.parametrize(
    ("purse", "surplus", "count"),
    [(100, 100, 10), (5, 5, 5), (5, 0, 5), (8, 3, 6), (8, 8, 8), (1, 0, 2), (0, 0, 2), (7.9, 0, 6), (3.9, 3.9, 3)],
)
def test_how_many(purse: float, surplus: float, count: int) -> None:
    totals: Tensor = torch.arange(11)
    assert affordable(order_of(2, 4, 4), totals, purse, surplus) == count


def test_terms_are_checked() -> None:
    for bad in ({"min_share": 1.0}, {"max_age": -1}, {"bank": -2}, {"bank": float("nan")}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Terms(**bad)  # type: ignore[arg-type]
