"""Costs known in advance are what frames then cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import GateInput

GRID = (6, 10)


def cost_of(detector: Detector, chosen: Tensor, rule: Rows) -> dict[str, int]:
    """What a frame costs on which just these tokens are recomputed."""

    def choose(gates: Sequence[GateInput]) -> list[Tensor]:
        return [chosen for _ in gates]

    state = detector.init_state()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        (step,) = detector.step(torch.rand(1, 3, 96, 160, generator=generator), state, rule=rule, selector=choose)
    return step.cost.macs


@pytest.mark.parametrize(("seed", "static"), [(0, None), (1, None), (2, True)])
def test_all_but_the_regions_is_exact_and_they_are_a_bound(
    tiny_detector: Detector, seed: int, static: bool | None
) -> None:
    rule = Rows(static=static)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    costs = tiny_detector.cost_model(rule)
    known, bound = costs.macs(GRID, order, variable=0), costs.macs(GRID, order)
    assert costs.variable == "roi" and len(known) == 61 and bool((known.diff() >= 0).all())
    for count in (0, 1, 2, 5, 17, 36, 48, 59, 60):
        macs = cost_of(tiny_detector, order[:count], rule)
        assert known[count] == macs["backbone"] + macs["pyramid"] + macs["rpn"], count
        assert bound[count] >= sum(macs.values())
    assert costs.everything(GRID) >= int(bound[60])


def test_neighbours_are_cheaper_than_scattered_tokens(tiny_detector: Detector) -> None:
    costs = tiny_detector.cost_model(Rows())
    near, far = (costs.macs(GRID, torch.tensor(order))[-1] for order in ([11, 12, 21, 22], [0, 9, 35, 50]))
    assert near < far


def test_nothing_to_take(tiny_detector: Detector) -> None:
    macs = tiny_detector.cost_model(Rows()).macs(GRID, torch.arange(0))
    assert macs.tolist() == [sum(cost_of(tiny_detector, torch.arange(0), Rows()).values())]


def test_dense_heads_are_what_everything_costs(tiny_detector: Detector) -> None:
    """Tokens all recomputed, or the dense network: the same heads, by the same weights."""
    tokens, proposals = torch.arange(60), tiny_detector.config.proposals
    macs = cost_of(tiny_detector, tokens, Rows())
    dense = tiny_detector.head_weights.dense(GRID, proposals)
    assert (macs["pyramid"], macs["rpn"]) == (dense["pyramid"], dense["rpn"]) and macs["roi"] <= dense["roi"]


@pytest.mark.parametrize("rule", [Paper(), Rows(gate="embedding"), Dense()])
def test_other_rules_have_no_costs_in_advance(tiny_detector: Detector, rule: Paper | Rows | Dense) -> None:
    with pytest.raises(UserError, match="rows rule"):
        tiny_detector.cost_model(rule)
