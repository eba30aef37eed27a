"""Masks: tokens that lie in them whole are recomputed on flushes only, and cost nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.selector import (
    DEFAULT,
    Focus,
    GateInput,
    LargestError,
    RandomOrder,
    Ranking,
    Selector,
    merge,
)
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.regions import ignored_tokens, within
from eventful_det.runtime.session import StreamOptions

LEFT = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))


def noise(frames: int, seed: int = 0) -> np.ndarray:
    """Frames of which everything changes."""
    return np.random.default_rng(seed).integers(0, 255, (frames, 96, 192, 3), np.uint8)


def test_tokens_are_ignored_where_they_lie_in_a_polygon_whole() -> None:
    ignored = ignored_tokens((LEFT,), (4, 6), (0.25, 1 / 6)).view(4, 6)
    assert ignored[:, :3].all() and not ignored[:, 3:].any()
    nearly = ((0.0, 0.0), (0.45, 0.0), (0.45, 1.0), (0.0, 1.0))
    assert ignored_tokens((nearly,), (4, 6), (0.25, 1 / 6)).view(4, 6).sum() == 8, "cut tokens stay"
    assert ignored_tokens((LEFT, ((0.5, 0), (1, 0), (1, 1), (0.5, 1))), (4, 6), (0.25, 1 / 6)).all()


def test_tokens_beyond_the_frame_are_ignored_with_a_mask() -> None:
    ignored = ignored_tokens((LEFT,), (6, 6), (0.25, 1 / 6)).view(6, 6)
    assert ignored[4:].all() and not ignored[:4, 3:].any()


def test_points_lie_within_polygons_or_on_their_border() -> None:
    points = np.array([[0.2, 0.5], [0.5, 0.5], [0.6, 0.5]], np.float32)
    assert within(points, [LEFT]).tolist() == [True, True, False]
    assert within(points[:0], [LEFT]).shape == (0,)


@pytest.mark.parametrize("policy", [Focus(0.5, floor=1.0), LargestError(), LargestError(0.1), RandomOrder()])
@pytest.mark.parametrize("assured", [None, 0.5])
def test_no_policy_takes_an_ignored_token(policy: Focus | LargestError | RandomOrder, assured: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    ignored = torch.rand(48, generator=generator) < 0.5
    age = torch.where(ignored, 1000, torch.randint(1, 9, (48,), generator=generator))  # never renewed: the oldest
    gate = GateInput(1 + torch.rand(48, generator=generator), age, 3, (6, 8), ignored.float()).ignoring(ignored)
    (all_eligible,) = Selector(policy, 48, assured)([gate])
    assert set(all_eligible.tolist()) == set((~ignored).nonzero().squeeze(1).tolist())
    (half,) = Selector(policy, 0.5, assured)([gate])
    assert len(half) == gate.tokens // 2 and not ignored[half].any(), "a share is one of the eligible tokens"


@pytest.mark.parametrize("budget", [DEFAULT, 0.25, 20, None])
def test_a_mask_over_half_of_the_frame_halves_the_tokens_of_a_busy_one(
    tiny_detector: Detector, budget: Selector | float | int | None
) -> None:
    counts = {}
    for ignore in ((), (LEFT,)):
        with StreamPool(tiny_detector, budget=budget, scene_cuts=False, hold=1) as pool:
            pool.add(noise(4), options=StreamOptions(ignore=ignore))
            results = [result for results in pool for result in results]
        counts[ignore] = [result.cost.recomputed for result in results]
        assert results[0].cost.flush and counts[ignore][0] == results[0].cost.tokens, "a flush computes everything"
        work = torch.stack([result.work for result in results[1:]])
        assert not ignore or not work[:, :, : work.shape[2] // 2].any()
        assert work[:, :, work.shape[2] // 2 :].any()
    if budget != 20:
        halves = zip(counts[()][1:], counts[(LEFT,)][1:], strict=True)
        assert all(abs(masked - busy / 2) <= 1 for busy, masked in halves), counts


def test_other_options_count_from_the_next_frame_on_and_the_state_stays(tiny_detector: Detector) -> None:
    frames = noise(6)
    with StreamPool(tiny_detector, budget=None, scene_cuts=False, hold=1) as pool:
        name = pool.add(frames, options=StreamOptions(ignore=(((0, 0), (1, 0), (1, 1), (0, 1)),)))
        taken = [next(pool)[0].cost for _ in range(3)]
        pool.configure(name, StreamOptions())
        taken += [next(pool)[0].cost for _ in range(3)]
        with pytest.raises(UserError, match="no stream 'x'"):
            pool.configure("x", StreamOptions())
    assert [cost.flush for cost in taken] == [True] + 5 * [False]
    assert [cost.recomputed for cost in taken[1:3]] == [0, 0] and taken[3].recomputed > 0


def test_priority_is_a_share_of_the_budget() -> None:
    rankings = [Ranking(torch.arange(100), 100)] * 2
    sizes = [len(taken) for taken in merge(rankings, [100, 100], 0.5, [3.0, 1.0]).take(40)]
    assert sizes == [30, 10]
    with pytest.raises(UserError, match="priority"):
        StreamOptions(priority=0)


def test_a_stream_of_higher_priority_gets_more(tiny_detector: Detector) -> None:
    with StreamPool(tiny_detector, budget=0.25, scene_cuts=False, hold=1) as pool:
        pool.add(noise(3), name="a", options=StreamOptions(priority=3))
        pool.add(noise(3, 1), name="b")
        rounds = list(pool)
    assert [[result.cost.recomputed for result in results] for results in rounds[1:]] == [[27, 9]] * 2


def test_objects_have_ids_on_every_frame(tiny_detector: Detector) -> None:
    with StreamPool(tiny_detector, hold=1) as pool:
        pool.add(noise(3), track=True)
        assert all(result.detections.tracks is not None for results in pool for result in results)
