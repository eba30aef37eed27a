"""Aggregates of frame costs, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eventful_det.detectors.results import FrameCost
from eventful_det.evaluation.efficiency import peak_memory, reset_peak_memory, summarise


def cost(macs: int, seconds: dict[str, float], flush: bool = False) -> FrameCost:
    return FrameCost({"backbone": macs, "roi": macs // 2}, {"backbone": 4 * 10**9, "roi": 10**9}, 7, 10, flush, seconds)


def test_means_medians_and_flushes_apart() -> None:
    seconds = [0.5, 0.1, 0.2, 0.3]
    costs = [cost(4 * 10**9, {"backbone": seconds[0], "roi": 0.1}, flush=True)]
    costs += [cost(2 * 10**9, {"backbone": s, "roi": 0.1}) for s in seconds[1:]]
    result = summarise(costs)
    assert (result.frames, result.flushes, result.tokens, result.recomputed) == (4, 1, 10, 7)
    assert result.gmacs == pytest.approx({"backbone": 2.5, "roi": 1.25, "total": 3.75})
    assert result.gmacs_steady == pytest.approx({"backbone": 2, "roi": 1, "total": 3})
    assert result.gmacs_dense == pytest.approx({"backbone": 4, "roi": 1, "total": 5})
    backbone, total = result.ms["backbone"], result.ms["total"]
    assert (backbone.mean, backbone.median) == pytest.approx((275, 250))
    assert (total.mean, total.median) == pytest.approx((375, 350))
    assert total.p95 == pytest.approx(100 + 1000 * np.percentile(seconds, 95))
    assert result.latency == result.ms["total"] and result.frames_per_second == pytest.approx(4 / 1.5)
    assert result.latency_flush is not None and result.latency_flush.median == pytest.approx(600)


def test_held_frames_cost_nothing_and_times_may_be_missing() -> None:
    result = summarise([cost(10**9, {"backbone": 0.2}), cost(0, {})])
    assert result.gmacs["total"] == pytest.approx(0.75) and result.ms["total"].mean == pytest.approx(100)
    assert result.latency_flush is None
    untimed = summarise([cost(10**9, {}, flush=True)])
    assert untimed.ms == {} and untimed.latency is None and untimed.gmacs_steady == {}


def test_frames_that_share_a_step_wait_for_all_of_it() -> None:
    """Two streams, two steps of 0.4 and 0.2 seconds: a frame costs half of a step and is there at its end."""
    shares = [0.2, 0.2, 0.1, 0.1]
    result = summarise([cost(10**9, {"backbone": s}, flush=s > 0.1) for s in shares], [2 * s for s in shares])
    assert result.ms["total"].mean == pytest.approx(150) and result.frames_per_second == pytest.approx(4 / 0.6)
    assert result.latency is not None and result.latency_flush is not None
    assert (result.latency.mean, result.latency_flush.median) == pytest.approx((300, 400))


def test_peak_memory_remembers_what_is_gone() -> None:
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    np.ones(20_000_000)
    assert peak_memory(device) >= before
    assert before > 10e6
