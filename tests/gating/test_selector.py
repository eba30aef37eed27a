"""Selectors: what policies rank and budgets allow, whatever the errors and ages, for one stream and for several."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.selector import (
    DEFAULT,
    EVERYTHING,
    Budget,
    Focus,
    GateInput,
    Gmacs,
    LargestError,
    Latency,
    Policy,
    RandomK,
    RandomOrder,
    Ranking,
    Select,
    Selector,
    Threshold,
    TopFraction,
    TopK,
    merge,
)

QUICK = settings(max_examples=80, deadline=None)
# Few distinct values, so that ties are common.
errors = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=40).map(torch.tensor)
shares = st.integers(0, 10).map(lambda n: n / 10)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)


def gate(error: Tensor, age: Tensor | None = None, frame: int = 1) -> GateInput:
    return GateInput(error, torch.ones(len(error), dtype=torch.int32) if age is None else age, frame)


def one(selector: Select, gate: GateInput) -> Tensor:
    (index,) = selector([gate])
    assert index.dtype == torch.int64 and index.dim() == 1 and len(index.unique()) == len(index)
    assert not len(index) or (int(index.min()) >= 0 and int(index.max()) < len(gate.error))
    return index


@QUICK
@given(errors, st.integers(0, 50), st.sampled_from([0.0, 0.5, 2.0]), st.randoms(use_true_random=False))
def test_largest_error_takes_the_largest(error: Tensor, k: int, power: float, random: object) -> None:
    age = torch.tensor([random.randint(1, 9) for _ in error], dtype=torch.int32)  # type: ignore[attr-defined]
    index = one(Selector(LargestError(age_power=power), k), gate(error, age))
    assert len(index) == min(k, len(error))
    scores = error * age.float() ** power
    rest = torch.ones(len(error), dtype=torch.bool).index_fill(0, index, False)
    if len(index) and rest.any():
        assert scores[index].min() >= scores[rest].max()


@QUICK
@given(errors, st.integers(-1, 7).map(float), shares)
def test_threshold_is_strict_and_limited_by_the_budget(error: Tensor, threshold: float, share: float) -> None:
    index = one(Threshold(threshold).within(share), gate(error))
    passed = (error > threshold).nonzero().squeeze(1)
    assert len(index) == min(len(passed), int(share * len(error)))
    assert set(index.tolist()) <= set(passed.tolist())
    assert set(one(Threshold(threshold), gate(error)).tolist()) == set(passed.tolist())


def test_the_papers_names() -> None:
    error = torch.arange(10.0)
    assert torch.equal(one(TopFraction(0.35), gate(error)), one(TopK(3), gate(error)))
    assert one(Threshold(7.0), gate(error)).tolist() == [9, 8]
    assert len(one(RandomK(4), gate(error))) == 4 and torch.equal(one(EVERYTHING, gate(error)).sort().values, error)
    assert one(Threshold(1.0), gate(torch.ones(5))).shape == (0,)


@QUICK
@given(st.integers(1, 30), st.integers(1, 30), seeds, st.sampled_from([0.5, 1.0]))
def test_no_token_starves_under_error_times_age(tokens: int, k: int, seed: int, power: float) -> None:
    """With errors in [1, 3] a token of age A is only passed over for ones older than A / c, c = 3^(1 / power)."""
    generator = torch.Generator().manual_seed(seed)
    age, oldest, selector = torch.ones(tokens, dtype=torch.int32), 1, Selector(LargestError(age_power=power), k)
    for frame in range(1, 120):
        oldest = max(oldest, int(age.max()))
        index = one(selector, GateInput(1 + 2 * torch.rand(tokens, generator=generator), age, frame))
        age += 1
        age[index] = 1
    assert oldest <= 2 * tokens * (3 ** (1 / power) + 1) / k + 1


def test_saliency_favours_tokens_of_the_same_change() -> None:
    salient = GateInput(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3), 1, saliency=torch.tensor([0.0, 0.6, 0.0]))
    favouring = Selector(LargestError(saliency=1.0), 1)
    assert one(favouring, salient).tolist() == [1]  # 2 x 1.6 > 3
    assert one(favouring, salient._replace(saliency=None)).tolist() == one(TopK(1), salient).tolist() == [0]


def focus_gate(grid: tuple[int, int], seed: int) -> GateInput:
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    error = torch.randint(0, 4, (tokens,), generator=generator).float()
    age = torch.randint(1, 6, (tokens,), generator=generator, dtype=torch.int32)
    return GateInput(error, age, 1, grid, torch.rand(tokens, generator=generator).round())


@QUICK
@given(grids, seeds, st.integers(-1, 4), shares, shares, st.integers(1, 5), st.sampled_from([0, 1, 2.5]))
def test_focus_keeps_to_threshold_floor_and_budget(
    grid: tuple[int, int], seed: int, threshold: int, floor: float, budget: float, block: int, renew: float
) -> None:
    gate = focus_gate(grid, seed)
    tokens = len(gate.error)
    index = one(Selector(Focus(threshold, floor, block=block, renew=renew), budget), gate)
    passed = set((gate.error > threshold).nonzero().squeeze(1).tolist())
    assert gate.saliency is not None
    objects = set(gate.saliency.nonzero().squeeze(1).tolist()) or set(range(tokens))
    moving = passed & objects
    wanted = len(passed) + int(renew * len(moving))
    if moving and len(moving) >= 0.2 * len(objects):
        wanted = max(wanted, int(floor * tokens))
    assert len(index) == min(wanted, int(budget * tokens), tokens)
    assert set(index.tolist()) <= passed if len(index) <= len(passed) else set(index.tolist()) >= passed


def test_focus_renews_the_stalest_and_only_where_something_changed() -> None:
    error, age = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]), torch.tensor([2, 1, 9, 1, 5])
    for renew, expected in ((0, [1]), (1, [1, 2]), (2.5, [1, 2, 4]), (9, [1, 2, 4, 0])):
        assert one(Selector(Focus(1.0, block=1, renew=renew), 0.8), GateInput(error, age, 1)).tolist() == expected
    floor = Selector(Focus(1.0, floor=0.4, renew=0))
    assert one(floor, GateInput(error, age, 1)).tolist() == [1, 2], "frames cost alike"
    assert one(floor, GateInput(0 * error, age, 1)).tolist() == [], "a still scene is free"


def test_focus_takes_the_floor_where_objects_move_not_for_what_passes_before_them() -> None:
    error, age, saliency = torch.zeros(40), torch.ones(40), torch.zeros(40)
    saliency[:11] = 0.9
    error[[0, 1, 30, 31]] = 3.0
    passing = GateInput(error, age, 1, saliency=saliency)
    policy = Focus(1.0, floor=0.5, renew=2, block=1)
    assert policy(passing).wanted == 4 + 2 * 2
    error[2] = 3.0
    assert policy(passing).wanted == 20


def test_focus_takes_no_noise_for_a_change() -> None:
    gate = GateInput(torch.tensor([3.0, 3.0, 3.0, 0.5]), torch.ones(4), 1, noise=torch.tensor([2.5, 2.3, 0.0, 0.0]))
    assert one(Selector(Focus(1.0, block=1, renew=0)), gate).tolist() == [1, 2]
    assert one(Threshold(1.0), gate).tolist() == [0, 1, 2], "the paper's threshold is what it says"


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3, 0.7, 0.9])
def test_focus_orders_blocks_of_equal_saliency_by_place_whatever_the_last_bit_of_a_score(score: float) -> None:
    """Blocks at the border have fewer tokens; the rounding of a mean must not put them before or behind others."""
    for offset in range(-8, 9):
        salient = torch.full((7 * 7,), score + offset * 2.0**-24)
        gate = GateInput(torch.ones(49), torch.ones(49, dtype=torch.int32), 1, (7, 7), salient)
        chosen = one(Selector(Focus(0.0), 0.5), gate)
        assert chosen[:16].sort().values.tolist() == [7 * y + x for y in range(4) for x in range(4)]


@QUICK
@given(grids, seeds, st.integers(1, 4), st.integers(1, 9))
def test_focus_takes_whole_blocks_best_first(grid: tuple[int, int], seed: int, block: int, tenths: int) -> None:
    gate = focus_gate(grid, seed)
    chosen = torch.zeros(len(gate.error), dtype=torch.bool)
    chosen[one(Selector(Focus(-1.0, saliency=2.0, block=block), tenths / 10), gate)] = True
    scores = (gate.age * (1 + 2 * gate.saliency)).unflatten(0, grid)  # type: ignore[operator]
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
def test_focus_takes_turns_where_nothing_was_detected(tokens: int, tenths: int) -> None:
    """Without a block or saliency, every token is refreshed once in N / k frames, rounded up."""
    age, share = torch.ones(tokens, dtype=torch.int32), tenths / 10
    k = int(share * tokens)
    if k:
        for frame in range(1, 40):
            index = one(Selector(Focus(0.0), share), GateInput(torch.rand(tokens) + 0.1, age, frame))
            age += 1
            age[index] = 1
            assert int(age.max()) <= -(-tokens // k) + 1


@QUICK
@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 99), st.integers(0, 10**6))
def test_random_order(tokens: int, k: int, seed: int, frame: int) -> None:
    selector = RandomK(k, seed)
    index = one(selector, gate(torch.rand(tokens), frame=frame))
    assert len(index) == min(k, tokens)
    torch.rand(3)  # neither depends on nor disturbs the global generator
    before = torch.get_rng_state()
    assert torch.equal(index, one(selector, gate(torch.rand(tokens, generator=torch.Generator()), frame=frame)))
    assert torch.equal(before, torch.get_rng_state())


def test_random_order_differs_between_frames_and_seeds() -> None:
    draws = {tuple(one(RandomK(8, s), gate(torch.rand(64), frame=f)).tolist()) for s in range(5) for f in range(5)}
    assert len(draws) == 25
    counts = torch.bincount(torch.cat([one(RandomK(8), gate(torch.rand(64), frame=f)) for f in range(800)]))
    assert counts.min() > 60 and counts.max() < 145  # 100 expected


@pytest.mark.parametrize("policy", [LargestError(0.5, 0.5, 1.0), LargestError(), Focus(0.5, 0.1), RandomOrder()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_policies_do_not_touch_what_they_are_given(policy: Policy, dtype: torch.dtype) -> None:
    error, age = torch.rand(11).to(dtype), torch.randint(1, 9, (11,), dtype=torch.int32)
    saliency = torch.rand(11)
    before = error.clone(), age.clone(), saliency.clone()
    one(Selector(policy, 0.4), GateInput(error, age, 3, (1, 11), saliency))
    assert all(map(torch.equal, (error, age, saliency), before))


def test_the_default_within_a_budget() -> None:
    """A quarter of the tokens means the default policy limited to a quarter."""
    gate = GateInput(torch.full((64,), 9.0), torch.ones(64, dtype=torch.int32), 1, (8, 8))
    assert len(one(DEFAULT, gate)) == int(0.35 * 64)
    assert len(one(DEFAULT.within(0.25), gate)) == 16 and len(one(DEFAULT.within(5), gate)) == 5
    assert len(one(DEFAULT.within(None), gate)) == 64
    assert DEFAULT.within(0.25).policy == DEFAULT.policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.budget = 0.5  # type: ignore[misc]


def test_streams_have_the_budget_for_themselves_unless_they_share_it() -> None:
    busy, still = gate(torch.full((20,), 3.0)), gate(torch.zeros(20))
    selector = Selector(LargestError(2.0), 0.25)
    assert [len(index) for index in selector([busy, still, busy])] == [5, 0, 5]
    shared = dataclasses.replace(selector, assured=0.5)
    assert [len(index) for index in shared([busy, still])] == [10, 0]
    assert [len(index) for index in shared([busy, busy])] == [5, 5]
    assert shared([]) == []


def test_the_example_of_merging() -> None:
    rankings = [Ranking(torch.arange(30), 30), Ranking(torch.arange(10), 10)]
    merged = merge(rankings, [100, 100], 0.5)
    assert merged.stream[:6].tolist() == [0, 1, 0, 0, 1, 0]
    assert [index.tolist() for index in merged.take(6)] == [[0, 1, 2, 3], [0, 1]]


@QUICK
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=4), shares)
def test_any_beginning_of_a_merge_assures_every_stream_of_its_part(
    streams: list[tuple[int, int]], assured: float
) -> None:
    rankings = [Ranking(torch.randperm(size), wanted) for size, wanted in streams]
    sizes = [size for size, _ in streams]
    merged = merge(rankings, sizes, assured)
    wanted = [min(pair) for pair in streams]
    assert len(merged.index) == sum(wanted)
    for count in range(sum(wanted) + 1):
        taken = merged.take(count)
        assert sum(map(len, taken)) == count
        for index, ranking, size, wants in zip(taken, rankings, sizes, wanted, strict=True):
            assert torch.equal(index, ranking.order[: len(index)])
            assert len(index) >= min(wants, int(assured * count * size / sum(sizes) - 1e-9))


@pytest.mark.parametrize("budget", [True, -1, -0.1, float("nan"), 1.5, "half"])
def test_budgets_that_are_none(budget: Budget) -> None:
    with pytest.raises(UserError, match="budget"):
        DEFAULT.within(budget)


def test_gmacs_and_seconds_are_for_streams() -> None:
    for budget in (Gmacs(40), Latency(0.05)):
        with pytest.raises(UserError, match=f"a budget of {budget} is held by streams and pools"):
            DEFAULT.within(budget)([gate(torch.ones(3))])
    assert (str(Gmacs(40)), str(Latency(0.05))) == ("40GMACs", "50ms")
    for bad in (lambda: Gmacs(0), lambda: Latency(float("nan")), lambda: Gmacs(float("inf"))):
        with pytest.raises(UserError, match="cannot be held"):
            bad()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Focus(1.0, floor=1.2), r"floor must be a share of the tokens in \[0, 1\], got 1.2"),
        (lambda: Focus(1.0, block=0), "block must be"),
        (lambda: Focus(1.0, renew=-1.0), "renew must be 0 or more"),
        (lambda: Focus(float("nan")), "threshold must be a number"),
        (lambda: LargestError(float("nan")), "threshold must be a number"),
        (lambda: LargestError(age_power=-1.0), "age_power must be 0 or more, got -1"),
        (lambda: Selector(Focus(2.0), assured=1.5), "assured must be"),
        (lambda: TopFraction(1.5), r"share in \[0, 1\]"),
    ],
)
def test_user_errors(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
