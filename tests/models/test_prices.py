"""Prices known in advance are what frames then cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import GateInput
from eventful_det.gating.rows import Rows
from eventful_det.models.detector import Detector
from eventful_det.models.prices import PriceList

GRID = (6, 10)


def cost_of(detector: Detector, chosen: Tensor) -> dict[str, int]:
    """What a frame costs on which just these tokens are recomputed."""

    def choose(gates: Sequence[GateInput]) -> list[Tensor]:
        return [chosen for _ in gates]

    state = detector.init_state()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        (step,) = detector.step(torch.rand(1, 3, 96, 160, generator=generator), state, joint=choose)
    return step.cost.macs


@pytest.mark.parametrize(("seed", "static"), [(0, None), (1, None), (2, True)])
def test_backbone_pyramid_and_proposals_are_exact_and_regions_a_bound(
    tiny_detector: Detector, seed: int, static: bool | None
) -> None:
    tiny_detector.rule = Rows(static=static)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    price_list = PriceList.of(tiny_detector)
    prices, bound = price_list.prices(GRID, order, regions=0), price_list.prices(GRID, order)
    assert len(prices) == 61 and bool((prices.diff() >= 0).all())
    for count in (0, 1, 2, 5, 17, 36, 48, 59, 60):
        macs = cost_of(tiny_detector, order[:count])
        assert prices[count] == macs["backbone"] + macs["pyramid"] + macs["rpn"], count
        assert bound[count] >= sum(macs.values())


def test_neighbours_are_cheaper_than_scattered_tokens(tiny_detector: Detector) -> None:
    block = torch.tensor([11, 12, 21, 22])
    scattered = torch.tensor([0, 9, 35, 50])
    near, far = (PriceList.of(tiny_detector).prices(GRID, order)[-1] for order in (block, scattered))
    assert near < far


def test_nothing_to_take(tiny_detector: Detector) -> None:
    prices = PriceList.of(tiny_detector).prices(GRID, torch.arange(0))
    assert prices.tolist() == [sum(cost_of(tiny_detector, torch.arange(0)).values())]


def test_other_rules_have_no_prices(tiny_detector: Detector) -> None:
    for rule in (Paper(), Rows(gate="embedding")):
        with pytest.raises(UserError, match="rows rule"):
            PriceList.of(tiny_detector.with_rule(rule))
