"""Policies: what they select, whatever the errors and ages."""

from __future__ import annotations

import pytest
import torch
from eventful_det.gating.policy import Focus, GateInput, Policy, RandomK, Threshold, TopFraction, TopK, select_all
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eventful_det.errors import UserError

QUICK = settings(max_examples=80, deadline=None)
# Few distinct values, so that ties are common.
errors = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=40).map(torch.tensor)
shares = st.integers(0, 10).map(lambda n: n / 10)


def gate(error: Tensor, age: Tensor | None = None, frame: int = 1) -> GateInput:
    return GateInput(error, torch.ones(len(error), dtype=torch.int32) if age is None else age, frame)


def check_indices(index: Tensor, tokens: int) -> None:
    assert index.dtype == torch.int64 and index.dim() == 1
    assert len(index.unique()) == len(index)
    assert not len(index) or (int(index.min()) >= 0 and int(index.max()) < tokens)


@QUICK
@given(errors, st.integers(0, 50), st.sampled_from([0.0, 0.5, 2.0]), st.randoms(use_true_random=False))
def test_top_k_takes_the_largest(error: Tensor, k: int, power: float, random: object) -> None:
    age = torch.tensor([random.randint(1, 9) for _ in error], dtype=torch.int32)  # type: ignore[attr-defined]
    index = TopK(k, power)(gate(error, age))
    check_indices(index, len(error))
    assert len(index) == min(k, len(error))
    scores = error * age.float() ** power
    rest = torch.ones(len(error), dtype=torch.bool).index_fill(0, index, False)
    if len(index) and rest.any():
        assert scores[index].min() >= scores[rest].max()


@QUICK
@given(errors, shares)
def test_top_fraction_is_top_k(error: Tensor, fraction: float) -> None:
    index = TopFraction(fraction)(gate(error))
    assert torch.equal(index, TopK(int(fraction * len(error)))(gate(error)))


@QUICK
@given(errors, st.integers(-1, 7).map(float), st.tuples(shares, shares).map(sorted))
def test_threshold_with_floor_and_cap(error: Tensor, threshold: float, limits: list[float]) -> None:
    floor, cap = limits
    index = Threshold(threshold, cap, floor)(gate(error))
    check_indices(index, len(error))
    passed = (error > threshold).nonzero().squeeze(1)  # strictly
    low, high = int(floor * len(error)), int(cap * len(error))
    assert len(index) == min(max(len(passed), low), high)
    if len(index) == len(passed):
        assert set(index.tolist()) == set(passed.tolist())
    rest = torch.ones(len(error), dtype=torch.bool).index_fill(0, index, False)
    if len(index) and rest.any():
        assert error[index].min() >= error[rest].max() or len(index) == len(passed)


def test_threshold_may_select_nothing() -> None:
    assert Threshold(1.0)(gate(torch.ones(5))).shape == (0,)
    assert Threshold(0.0)(gate(torch.zeros(5))).shape == (0,)
    assert Threshold(9.0, floor=0.2)(gate(torch.arange(5.0))).tolist() == [4]


def test_age_orders_where_the_cap_or_the_floor_has_to_choose() -> None:
    error, age = torch.tensor([3.0, 2.0, 0.5]), torch.tensor([1, 4, 1])
    assert Threshold(1.0, cap=0.4, age_power=0.5)(gate(error, age)).tolist() == [1]
    assert Threshold(1.0, cap=0.4)(gate(error, age)).tolist() == [0]
    assert sorted(Threshold(1.0, age_power=9.0)(gate(error, age)).tolist()) == [0, 1]
    assert Threshold(5.0, floor=0.4, age_power=0.5)(gate(error, age)).tolist() == [1]
    old = torch.tensor([1, 1, 99])  # however old, a token that does not pass takes no place of one that does
    assert Threshold(1.0, cap=0.4, age_power=1.0)(gate(error, old)).tolist() == [0]
    assert sorted(Threshold(2.5, floor=0.7, age_power=1.0)(gate(error, old)).tolist()) == [0, 2]
    assert Threshold(2.5, floor=0.4, age_power=1.0)(gate(error, old)).tolist() == [0]


@QUICK
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31), st.sampled_from([0.5, 1.0]))
def test_no_token_starves_under_error_times_age(tokens: int, k: int, seed: int, power: float) -> None:
    """With errors in [1, 3] a token of age A is only passed over for ones older than A / c, c = 3^(1 / power)."""
    generator = torch.Generator().manual_seed(seed)
    age, oldest, policy = torch.ones(tokens, dtype=torch.int32), 1, TopK(k, power)
    for frame in range(1, 120):
        oldest = max(oldest, int(age.max()))
        index = policy(GateInput(1 + 2 * torch.rand(tokens, generator=generator), age, frame))
        age += 1
        age[index] = 1
    assert oldest <= 2 * tokens * (3 ** (1 / power) + 1) / k + 1


def test_a_token_of_small_change_starves_without_age() -> None:
    error = torch.tensor([2.0, 2.0, 1.0])
    for power, refreshed in [(0.0, False), (0.5, True)]:
        age = torch.ones(3, dtype=torch.int32)
        chosen = set()
        for frame in range(1, 20):
            index = TopK(2, power)(GateInput(error, age, frame))
            age += 1
            age[index] = 1
            chosen |= set(index.tolist())
        assert (2 in chosen) == refreshed


def test_interest_favours_tokens_of_the_same_change() -> None:
    error, age = torch.tensor([3.0, 2.0, 1.0]), torch.ones(3)
    told = GateInput(error, age, 1, interest=torch.tensor([0.0, 0.6, 0.0]))
    for policy in (TopK(1, interest=1.0), TopFraction(0.4, interest=1.0), Threshold(0.5, cap=0.4, interest=1.0)):
        assert policy(told).tolist() == [1]  # 2 x 1.6 > 3
        assert policy(told._replace(interest=None)).tolist() == [0]
    assert TopK(1)(told).tolist() == [0]


grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)


def focus_gate(grid: tuple[int, int], seed: int) -> GateInput:
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    error = torch.randint(0, 4, (tokens,), generator=generator).float()
    age = torch.randint(1, 6, (tokens,), generator=generator, dtype=torch.int32)
    return GateInput(error, age, 1, grid, torch.rand(tokens, generator=generator).round())


@QUICK
@given(
    grids,
    seeds,
    st.integers(-1, 4),
    st.tuples(shares, shares).map(sorted),
    st.integers(1, 5),
    st.sampled_from([0, 1, 2.5]),
)
def test_focus_keeps_to_threshold_floor_and_cap(
    grid: tuple[int, int], seed: int, threshold: int, limits: list[float], block: int, renew: float
) -> None:
    (floor, cap), gate = limits, focus_gate(grid, seed)
    tokens = len(gate.error)
    index = Focus(threshold, cap, floor, block=block, renew=renew)(gate)
    check_indices(index, tokens)
    passed = set((gate.error > threshold).nonzero().squeeze(1).tolist())
    wanted = max(int((1 + renew) * len(passed)), int(floor * tokens)) if passed else 0
    assert len(index) == min(wanted, int(cap * tokens), tokens)
    assert set(index.tolist()) <= passed if len(index) <= len(passed) else set(index.tolist()) >= passed


def test_focus_renews_the_stalest_and_only_where_something_changed() -> None:
    error, age = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]), torch.tensor([2, 1, 9, 1, 5])
    for renew, expected in ((0, [1]), (1, [1, 2]), (2.5, [1, 2, 4]), (9, [1, 2, 4, 0])):
        assert Focus(1.0, cap=0.8, block=1, renew=renew)(GateInput(error, age, 1)).tolist() == expected
    assert Focus(1.0, floor=0.4, renew=0)(GateInput(error, age, 1)).tolist() == [1, 2], "frames cost alike"
    assert Focus(1.0, floor=0.4, renew=9)(GateInput(0 * error, age, 1)).tolist() == [], "a still scene is free"


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3, 0.7, 0.9])
def test_focus_orders_blocks_of_equal_interest_by_place_whatever_the_last_bit_of_a_score(score: float) -> None:
    """Blocks at the border have fewer tokens; the rounding of a mean must not put them before or behind others."""
    for offset in range(-8, 9):
        told = torch.full((7 * 7,), score + offset * 2.0**-24)
        gate = GateInput(torch.ones(49), torch.ones(49, dtype=torch.int32), 1, (7, 7), told)
        chosen = Focus(0.0, cap=0.5, interest=100.0, block=4)(gate)
        assert chosen[:16].sort().values.tolist() == [7 * y + x for y in range(4) for x in range(4)]


@QUICK
@given(grids, seeds, st.integers(1, 4), st.integers(1, 9))
def test_focus_takes_whole_blocks_best_first(grid: tuple[int, int], seed: int, block: int, tenths: int) -> None:
    gate = focus_gate(grid, seed)
    chosen = torch.zeros(len(gate.error), dtype=torch.bool)
    chosen[Focus(-1.0, tenths / 10, interest=2.0, block=block)(gate)] = True
    scores = (gate.age * (1 + 2 * gate.interest)).unflatten(0, grid)  # type: ignore[operator]
    blocks = [  # share of the block that was chosen, its mean score
        (chosen.unflatten(0, grid)[y : y + block, x : x + block].float().mean(), part.mean())
        for y in range(0, grid[0], block)
        for x in range(0, grid[1], block)
        for part in [scores[y : y + block, x : x + block]]
    ]
    assert sum(0 < share < 1 for share, _ in blocks) <= 1  # only the last one is cut
    left = max((mean for share, mean in blocks if share < 1), default=torch.tensor(0.0))
    assert all(mean >= left - 1e-5 for share, mean in blocks if share == 1)


@QUICK
@given(st.integers(1, 40), st.integers(1, 9))
def test_focus_takes_turns_where_nothing_was_found(tokens: int, tenths: int) -> None:
    """Without a block or an interest, every token is refreshed once in N / k frames, rounded up."""
    age, cap = torch.ones(tokens, dtype=torch.int32), tenths / 10
    k = int(cap * tokens)
    if k:
        for frame in range(1, 40):
            index = Focus(0.0, cap)(GateInput(torch.rand(tokens) + 0.1, age, frame))
            age += 1
            age[index] = 1
            assert int(age.max()) <= -(-tokens // k) + 1


def test_focus_errors() -> None:
    with pytest.raises(UserError, match="floor <= cap"):
        Focus(1.0, cap=0.1, floor=0.2)
    with pytest.raises(UserError, match="block must be"):
        Focus(1.0, block=0)
    with pytest.raises(UserError, match="renew must be 0 or more"):
        Focus(1.0, renew=-1.0)


@QUICK
@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 99), st.integers(0, 10**6))
def test_random_k(tokens: int, k: int, seed: int, frame: int) -> None:
    policy = RandomK(k=k, seed=seed)
    index = policy(gate(torch.rand(tokens), frame=frame))
    check_indices(index, tokens)
    assert len(index) == min(k, tokens)
    torch.rand(3)  # neither depends on nor disturbs the global generator
    before = torch.get_rng_state()
    assert torch.equal(index, policy(gate(torch.rand(tokens, generator=torch.Generator()), frame=frame)))
    assert torch.equal(before, torch.get_rng_state())


def test_random_k_differs_between_frames_and_seeds() -> None:
    draws = {tuple(RandomK(k=8, seed=s)(gate(torch.rand(64), frame=f)).tolist()) for s in range(5) for f in range(5)}
    assert len(draws) == 25
    assert len(RandomK(fraction=0.25)(gate(torch.rand(64)))) == 16
    counts = torch.bincount(torch.cat([RandomK(k=8)(gate(torch.rand(64), frame=f)) for f in range(800)]))
    assert counts.min() > 60 and counts.max() < 145  # 100 expected


def test_select_all() -> None:
    assert torch.equal(select_all(gate(torch.zeros(7))), torch.arange(7))


@pytest.mark.parametrize(
    "policy",
    [TopK(3, 0.5, 1.0), TopFraction(0.3), Threshold(0.5, 0.4, 0.1), Focus(0.5, 0.4, 0.1), RandomK(k=3), select_all],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_policies_do_not_touch_what_they_are_given(policy: Policy, dtype: torch.dtype) -> None:
    error, age = torch.rand(11).to(dtype), torch.randint(1, 9, (11,), dtype=torch.int32)
    interest = torch.rand(11)
    before = error.clone(), age.clone(), interest.clone()
    check_indices(policy(GateInput(error, age, 3, (1, 11), interest)), 11)
    assert all(map(torch.equal, (error, age, interest), before))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(-1), "k must be 0 or more tokens, got -1"),
        (lambda: TopFraction(1.5), r"fraction must lie in \[0, 1\], got 1.5"),
        (lambda: Threshold(1.0, cap=0.2, floor=0.3), "floor=0.3, cap=0.2"),
        (lambda: RandomK(), "exactly one of k"),
        (lambda: RandomK(k=3, fraction=0.5), "exactly one of k"),
        (lambda: RandomK(k=-3), "k must be 0 or more tokens, got -3"),
        (lambda: RandomK(fraction=25), r"fraction must lie in \[0, 1\], got 25"),
    ],
)
def test_user_errors(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
