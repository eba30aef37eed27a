"""Turns, pairs and percentiles by hand; memory, kernels and operators of things that are known."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from eventful_det.benchmark.timing import (
    attention_kernels,
    paired_ratios,
    peak_of,
    profile_operations,
    time_together,
)
from eventful_det.evaluation.efficiency import Spread

CPU = torch.device("cpu")


def test_callables_take_turns_in_changing_order() -> None:
    log: list[tuple[str, int]] = []
    rounds: list[int] = []

    def call(name: str, i: int) -> int:
        log.append((name, i))
        time.sleep(0.003 if name == "slow" else 0)
        return 10 * i

    names = ("slow", "quick", "idle")
    timed = time_together(
        {name: lambda i, name=name: call(name, i) for name in names},  # type: ignore[misc]
        repetitions=6,
        warm_up=2,
        device=CPU,
        on_repetition=lambda: rounds.append(len(log)),
    )
    turns = [log[3 * i : 3 * i + 3] for i in range(8)]
    assert all({name for name, _ in turn} == set(names) and {i for _, i in turn} == {t} for t, turn in enumerate(turns))
    assert len({tuple(name for name, _ in turn) for turn in turns}) > 1, "always the same order"
    assert rounds == [3 * i for i in range(1, 9)]
    for name in names:
        assert timed[name].first.result == 0
        assert [call.result for call in timed[name].calls] == [20, 30, 40, 50, 60, 70]
    assert all(call.seconds >= 0.003 for call in timed["slow"].calls)


def test_the_order_repeats() -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        time_together({name: lambda _, name=name: log.append(name) for name in "abcd"}, 9, 1, seed=seed)  # type: ignore[misc]
        return log

    assert order(5) == order(5) != order(6)


@pytest.mark.parametrize(("repetitions", "warm_up"), [(0, 1), (1, 0)])
def test_at_least_one(repetitions: int, warm_up: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        time_together({"a": lambda i: i}, repetitions, warm_up)


def test_pairs_are_not_the_ratio_of_medians() -> None:
    reference, other = [4.0, 8.0, 40.0], [1.0, 4.0, 4.0]
    ratio = paired_ratios(reference, other)
    assert ratio.median == 4 and np.median(reference) / np.median(other) == 2
    assert (ratio.p5, ratio.p95) == pytest.approx((2.2, 9.4))
    with pytest.raises(ValueError):
        paired_ratios([1.0], [1.0, 2.0])


seconds = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20)


@given(seconds, st.floats(0.1, 10))
def test_ratios_to_a_scaled_copy(values: list[float], factor: float) -> None:
    ratio = paired_ratios([factor * value for value in values], values)
    assert (ratio.median, ratio.p5, ratio.p95) == pytest.approx((factor,) * 3)
    spread = Spread.of(values)
    assert min(values) <= spread.p5 <= spread.median <= spread.p95 <= max(values)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be reset here")
def test_peak_is_what_comes_on_top() -> None:
    held = torch.ones(10_000_000)
    peak = peak_of(lambda: torch.ones(20_000_000).sum() + held.sum(), CPU)
    assert 60e6 < peak < 160e6
    assert peak_of(lambda: None, CPU) < 20e6


def test_attention_kernels() -> None:
    q = torch.randn(1, 2, 8, 16)

    def twice() -> None:
        for _ in range(2):
            F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(1, 2, 8, 8))

    with torch.no_grad():
        (count,) = attention_kernels(twice).values()
        assert count == 2
        assert attention_kernels(lambda: (q @ q.mT).softmax(-1) @ q) == {}


def test_profile() -> None:
    a = torch.randn(200, 200)
    operations = profile_operations(lambda: [a @ a, a @ a, a + 1], CPU)
    calls = {operation.name: operation.calls for operation in operations}
    assert calls["aten::mm"] == 2 and calls["aten::add"] == 1
    assert sum(operation.share for operation in operations) == pytest.approx(1)
    assert [o.seconds for o in operations] == sorted((o.seconds for o in operations), reverse=True)
