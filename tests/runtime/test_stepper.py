"""Budgets are held on streams, whatever their kind, and old tokens are renewed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.results import FrameCost, StepResult
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.selector import EVERYTHING, Budget, Focus, Gmacs, Latency, Selector, Threshold
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.session import StreamResult

Image = NDArray[np.uint8]
WANTS_ALL = Selector(Focus(0.0, renew=100.0))  # whatever changes, every token is wanted


def clip(index: int, frames: int) -> list[Image]:
    options = SceneOptions(width=144, height=96, frames=frames, cut_fraction=0)
    return [frame.image for frame in render_video(options, index=index)]


@pytest.fixture(scope="module")
def moving() -> list[Image]:
    """A moving camera: much changes on every frame."""
    return clip(4, 40)


def steady(results: Sequence[StreamResult]) -> list[StreamResult]:
    return [result for result in results if not result.cost.flush]


def worst_age(results: Sequence[StreamResult]) -> int:
    """How many frames old a token ever was, told by the maps of recomputed tokens."""
    age, worst = torch.zeros_like(results[0].work), 0
    for result in results:
        age = torch.where(result.work > 0, 0, age + 1)
        worst = max(worst, int(age.max()))
    return worst


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_gmacs_are_never_exceeded(tiny_detector: Detector, moving: list[Image], share: float) -> None:
    dense = next(tiny_detector.stream(moving)).cost.dense_total
    results = steady(list(tiny_detector.stream(moving, budget=Gmacs(share * dense / 1e9), hold=1)))
    spent = [result.cost.total / dense for result in results]
    assert max(spent) <= share
    assert np.mean(spent) > 0.3 * share, "and it is used: what lacks is the bound of the region heads"


@pytest.mark.parametrize("budget", [Gmacs(0.002), 0.005, 0.0])
def test_less_than_a_token_is_saved_up_for(tiny_detector: Detector, moving: list[Image], budget: Budget) -> None:
    """It is spent by and by, not never; a budget of nothing is nothing."""
    results = steady(list(tiny_detector.stream(moving * 3, budget=budget, scene_cuts=False, hold=1)))
    gmacs = isinstance(budget, Gmacs)
    spent = [result.cost.total / 1e9 if gmacs else result.cost.recomputed / 60 for result in results]
    allowance = budget.value if isinstance(budget, Gmacs) else budget or 0.0
    assert sum(spent) <= allowance * len(spent) + max(spent)
    assert any(result.cost.recomputed for result in results) == (allowance > 0)


def test_streams_of_a_small_budget_take_turns(tiny_detector: Detector) -> None:
    pool = StreamPool(tiny_detector, budget=1, scene_cuts=False, hold=1)
    for index in range(4):
        pool.add(clip(4 + index, 40), name=str(index))
    served = [result.stream for results in list(pool)[1:] for result in results if result.cost.recomputed]
    counts = [served.count(name) for name in "0123"]
    assert min(counts) > 5 and max(counts) < 2 * min(counts), "not one of them alone"


@pytest.mark.parametrize("budget", [Gmacs(0.02), Latency(10.0)])
def test_frames_padded_to_squares(tiny_detector: Detector, moving: list[Image], budget: Budget) -> None:
    """The tokens that are priced are those of the padded frame, as of checkpoints from detectron2's zoo."""
    square = Detector(dataclasses.replace(tiny_detector.config, square_pad=160)).eval()
    square.load_state_dict(tiny_detector.state_dict())
    results = steady(list(square.stream(moving[:6], budget=budget, hold=1)))
    assert results and all(result.cost.tokens == 100 for result in results)
    if isinstance(budget, Gmacs):
        assert 0 < max(result.cost.total for result in results) <= 1e9 * budget.value


def test_dense_is_the_ceiling(tiny_detector: Detector, moving: list[Image]) -> None:
    gated = tiny_detector.stream(moving[:6], budget=EVERYTHING.within(Gmacs(1000)))
    for result, dense in zip(gated, tiny_detector.stream(moving[:6], rule=Dense()), strict=True):
        torch.testing.assert_close(result.detections.boxes, dense.detections.boxes, atol=1e-2, rtol=0)


@pytest.mark.parametrize("budget", [Gmacs(0.01), 0.1, 9])
def test_a_bucket_never_gives_more_than_it_holds(tiny_detector: Detector, budget: Budget) -> None:
    images = [clip(1, 1)[0]] * 12 + clip(4, 25)
    results = steady(
        list(tiny_detector.stream(images, budget=budget, scene_cuts=False, hold=1, options=BudgetOptions(bucket=3)))
    )
    gmacs = isinstance(budget, Gmacs)
    spent = [result.cost.total / 1e9 if gmacs else result.cost.recomputed for result in results]
    allowance = budget.value if isinstance(budget, Gmacs) else 6 if budget == 0.1 else 9
    total = np.concatenate([[0], np.cumsum(spent)])
    for length in (1, 2, 5, 20):
        assert (total[length:] - total[:-length]).max() <= (length + 3) * allowance + 1e-9
    assert max(spent) > 1.5 * allowance, "a busy moment draws on it"


def test_budget_of_any_kind_between_frames(tiny_detector: Detector, moving: list[Image]) -> None:
    stream = tiny_detector.stream(moving, budget=0.5, hold=1)
    next(stream)
    dense = 0.0
    budgets: list[Budget | Selector] = [Gmacs(0.012), 7, Threshold(1e9), 0.0, Gmacs(0.02), EVERYTHING]
    for budget in budgets:
        stream.budget = budget
        assert stream.budget == budget
        cost = next(stream).cost
        dense = cost.dense_total
        if isinstance(budget, Gmacs):
            assert cost.recomputed > 0 and cost.total <= 1e9 * budget.value
        expected = {7: 7, Threshold(1e9): 0, 0.0: 0, EVERYTHING: 60}
        assert cost.recomputed == expected.get(budget, cost.recomputed)  # type: ignore[call-overload]
    assert dense > 0


@pytest.mark.parametrize("budget", [0.02, 1, Gmacs(0.008), Latency(1e-6), Threshold(1e9)])
def test_staleness_is_bounded(tiny_detector: Detector, budget: Budget | Selector) -> None:
    images = [clip(1, 1)[0]] * 45
    results = list(tiny_detector.stream(images, budget=budget, options=BudgetOptions(max_age=12), hold=1))
    assert worst_age(results) <= 12
    unbounded = list(tiny_detector.stream(images, budget=Threshold(1e9)))
    assert worst_age(unbounded) == 44


@pytest.mark.parametrize("budget", [8, 0.2])
def test_what_is_due_is_part_of_the_budget(tiny_detector: Detector, moving: list[Image], budget: Budget) -> None:
    results = steady(list(tiny_detector.stream(moving, budget=budget, options=BudgetOptions(max_age=40), hold=1)))
    assert worst_age(results) <= 40
    assert max(result.cost.recomputed for result in results) == (8 if budget == 8 else 12)


class Simulated(Detector):
    """A detector on a machine that takes `seconds` for a step, by each frame's cost."""

    seconds: Callable[[FrameCost], float]

    def step(self, *args: Any, **options: Any) -> list[StepResult]:
        results = super().step(*args, **options)
        for result in results:
            result.cost.seconds.clear()
            result.cost.seconds["backbone"] = self.seconds(result.cost)
        return results


def simulated(detector: Detector, seconds: Callable[[FrameCost], float]) -> Simulated:
    copy = Simulated(detector.config)
    copy.load_state_dict(detector.state_dict())
    copy.seconds = seconds  # type: ignore[method-assign]
    return copy.eval()


def test_latency_is_held_by_feedback(
    tiny_detector: Detector, moving: list[Image], caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth of the time whatever is recomputed; twice as slow from frame 40 to 80; then a tenth of the target."""
    load = 1.0
    detector = simulated(tiny_detector, lambda cost: load * (0.01 + 0.09 * cost.total / cost.dense_total))
    stream = detector.stream(
        moving * 3 + moving[::-1], budget=WANTS_ALL.within(Latency(0.05)), scene_cuts=False, hold=1
    )
    next(stream)
    taken = []
    for frame in range(119):
        load = 2.0 if 39 <= frame < 79 else 1.0
        taken.append(next(stream).cost.seconds["backbone"])
    settled = np.array(taken[15:39] + taken[50:79] + taken[95:])
    assert settled.mean() == pytest.approx(0.05, rel=0.1) and settled.max() < 1.4 * 0.05
    stream.budget = WANTS_ALL.within(Latency(0.005))
    caplog.clear()
    floors = [next(stream).cost.recomputed for _ in range(20)]
    assert min(floors[5:]) >= 1, "out of reach, but alive"
    assert [record.getMessage() for record in caplog.records if "budget=5ms is out of reach" in record.getMessage()]


def test_dense_where_gating_takes_longer(tiny_detector: Detector, moving: list[Image]) -> None:
    def seconds(cost: FrameCost) -> float:
        dense = cost.recomputed == cost.tokens
        return 0.1 if dense else 0.01 + 0.3 * cost.total / cost.dense_total

    results = steady(list(simulated(tiny_detector, seconds).stream(moving, budget=WANTS_ALL.within(Latency(0.2)))))
    assert all(result.cost.recomputed == 60 for result in results[5:])
    few = steady(list(simulated(tiny_detector, seconds).stream([moving[0]] * 8, budget=Latency(0.2))))
    assert all(result.cost.recomputed == 0 for result in few)


def test_the_paper_rule_knows_tokens_and_shares_only(tiny_detector: Detector, moving: list[Image]) -> None:
    (_, second) = list(tiny_detector.stream(moving[:2], rule=Paper(), budget=0.25))
    assert 0 < second.cost.recomputed <= 15
    for budget in (Gmacs(1), Latency(1)):
        with pytest.raises(UserError, match="rows rule"):
            tiny_detector.stream(moving, rule=Paper(), budget=budget)
    with pytest.raises(UserError, match="rows rule"):
        tiny_detector.stream(moving, rule=Paper(), budget=0.25, options=BudgetOptions(max_age=9))


def test_results_do_not_depend_on_the_past_of_a_budget(tiny_detector: Detector, moving: list[Image]) -> None:
    costs = [[r.cost.macs for r in tiny_detector.stream(moving[:8], budget=Gmacs(0.01))] for _ in range(2)]
    assert costs[0] == costs[1] and any(a != b for a, b in pairwise(costs[0]))


@pytest.mark.parametrize("share", [0.03, 0.1, 0.7])
def test_a_small_budget_has_frames_held_and_is_kept_on_average(
    tiny_detector: Detector, moving: list[Image], share: float
) -> None:
    """Rather a few key frames that are worth their cost than a little on each; early ones are paid for later."""
    images = (moving + moving[::-1]) * 4
    dense = next(tiny_detector.stream(images)).cost.dense_total
    results = list(tiny_detector.stream(images, budget=Gmacs(share * dense / 1e9), scene_cuts=False))[1:]
    spent = np.array([result.cost.total / dense for result in results])
    assert spent.sum() <= share * len(spent) + 2 * spent.max(), "ahead by two key frames at most"
    assert spent.mean() > 0.5 * min(share, 0.3), "and it is used"
    keys = [result for result in results if not result.held]
    assert np.median([result.cost.recomputed for result in keys]) >= 15, "what the default takes of the 60 tokens"
    assert (len(keys) < len(results) / 3) == (share < 0.2)


def test_a_small_share_of_the_tokens_has_frames_held(tiny_detector: Detector, moving: list[Image]) -> None:
    shared = list(tiny_detector.stream((moving + moving[::-1]) * 4, budget=0.05, scene_cuts=False))[1:]
    assert sum(result.cost.recomputed for result in shared) <= 1.1 * 0.05 * 60 * len(shared)
    assert all(result.held or result.cost.recomputed <= 21 for result in shared)
    assert 0 < sum(not result.held for result in shared) < len(shared) / 3


def test_a_small_budget_in_seconds_is_kept_with_the_time_of_moving(
    tiny_detector: Detector, moving: list[Image]
) -> None:
    detector = simulated(tiny_detector, lambda cost: 1.0 + 9.0 * cost.total / cost.dense_total)
    stream = detector.stream((moving + moving[::-1]) * 3, budget=Latency(0.5), scene_cuts=False)
    next(stream)
    taken = [result.cost.latency for result in stream][10:]
    assert np.mean(taken) == pytest.approx(0.5, rel=0.25)
