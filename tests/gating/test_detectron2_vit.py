"""`eventify` on detectron2's ViT; skipped where detectron2 is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import clip, error, randomise, run
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import EVERYTHING, Threshold, TopK
from eventful_det.gating.vit_spec import spec_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
vit_module = pytest.importorskip(
    "detectron2.modeling.backbone.vit", reason="needs detectron2, which is not installed", exc_type=ImportError
)

VARIANTS: dict[str, dict[str, Any]] = {
    "as ViTDet": {},
    "no class token in the position encoding": {"pretrain_use_cls_token": False},
    "no positions, no qkv bias": {"use_abs_pos": False, "qkv_bias": False},
    "no relative positions": {"use_rel_pos": False},
    "global alone": {"window_block_indexes": ()},
    "windows alone": {"window_block_indexes": (0, 1, 2, 3)},
}


def network(**changes: Any) -> nn.Module:
    """Windows of 4, blocks 1 and 3 global; positions of 6 x 6 tokens and a class token, relative tables for 10 x 10."""
    sizes = {"img_size": 40, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "window_size": 4}
    sizes |= {"window_block_indexes": (0, 2), "use_rel_pos": True, "pretrain_img_size": 24}
    return randomise(vit_module.ViT(**{**sizes, **changes}))


def dense_tokens(vit: nn.Module, frame: Tensor) -> Tensor:
    return vit(frame[None])["last_feat"][0].permute(1, 2, 0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rule", [Rows(), Rows("embedding"), Paper(), Dense()])
@pytest.mark.parametrize("size", [(40, 40), (28, 52), (64, 32), (24, 24)])
def test_all_selected_equals_dense(name: str, rule: Rule[Any], size: tuple[int, int]) -> None:
    vit, frames = network(**VARIANTS[name]), clip(3, *size)
    updates, _ = run(vit, rule, frames, EVERYTHING)
    for (update,), frame in zip(updates, frames, strict=True):
        assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5


@pytest.mark.parametrize("rule", [Rows(), Paper(), Paper("qk"), Paper(pool=2)])
def test_a_few_selected(rule: Rule[Any]) -> None:
    updates, _ = run(network(), rule, clip(4, streams=2), TopK(9))
    assert all(update.tokens.isfinite().all() for step in updates for update in step)
    assert [step[0].flush for step in updates] == [True, False, False, False]


def test_an_identical_frame_changes_nothing() -> None:
    for rule, least in ((Rows(), 0.0), (Paper(), 1e-3)):
        updates, _ = run(network(), rule, clip(1).expand(3, -1, -1, -1, -1), Threshold(least))
        assert torch.equal(updates[2][0].tokens, updates[0][0].tokens) and not updates[2][0].changed.numel()


def test_parameters_are_shared() -> None:
    vit = network()
    eventful = eventify(vit)
    assert list(eventful.state_dict()) == list(vit.state_dict())
    assert all(a is b for a, b in zip(eventful.parameters(), vit.parameters(), strict=True))
    frame = clip(1)[0]
    assert torch.equal(eventful(frame)["last_feat"], vit(frame)["last_feat"])  # type: ignore[call-overload]


def test_residual_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="a residual convolution block is not supported"):
        spec_of(network(residual_block_indexes=(1,)))
