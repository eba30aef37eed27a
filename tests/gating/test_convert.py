"""`eventify`: parameters are shared, rules and policies may change between frames, errors are clear."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from networks import clip, dense_tokens, error, plain, sam
from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.convert import EventfulViT, eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import EVERYTHING, GateInput, Select, Threshold, TopFraction, TopK
from eventful_det.gating.state import State


@pytest.mark.parametrize("vit", [sam(), plain(), plain(reg_tokens=2, init_values=0.1)])
@pytest.mark.parametrize("rule", [Rows(), Paper(), Dense()])
def test_parameters_are_shared_and_named_as_before(vit: nn.Module, rule: Any) -> None:
    eventful = eventify(vit, rule)
    assert list(eventful.state_dict()) == list(vit.state_dict())
    own, dense = dict(eventful.named_parameters()), dict(vit.named_parameters())
    assert own.keys() == dense.keys() and all(own[name] is dense[name] for name in own)
    eventful.load_state_dict({key: value * 2 for key, value in vit.state_dict().items()})
    assert eventful.dense is vit and torch.equal(vit.pos_embed, eventful.pos_embed)


def test_checkpoints_fit_both_ways() -> None:
    source, target = sam(), sam(depth=4)
    for parameter in target.parameters():
        parameter.data.zero_()
    eventify(target).load_state_dict(source.state_dict())
    frame = clip(1)[0]
    assert torch.equal(target.forward_features(frame), source.forward_features(frame))


def test_the_dense_network_is_left_intact() -> None:
    vit, frame = sam(), clip(1)[0]
    before, code = vit.forward_features(frame), type(vit).forward
    eventful = eventify(vit)
    eventful.step(frame, eventful.init_state())
    assert torch.equal(vit.forward_features(frame), before) and type(vit).forward is code
    assert not any(hook for module in vit.modules() for hook in (module._forward_hooks, module._forward_pre_hooks))
    assert torch.equal(eventful(frame), vit(frame))


def test_casting_and_copying_keep_sharing() -> None:
    vit = sam()
    eventful = eventify(vit).to(torch.float64)
    assert all(p.dtype == torch.float64 for p in vit.parameters())
    assert eventful.pos_embed is vit.pos_embed
    twin = copy.deepcopy(eventful)
    twin.pos_embed.data.zero_()
    assert twin.dense.pos_embed is twin.pos_embed and vit.pos_embed.abs().sum() > 0
    frame = clip(1)[0].double()
    (ours,), (theirs,) = (network.step(frame, network.init_state()) for network in (eventful, twin))
    assert error(theirs.tokens, dense_tokens(twin.dense, frame[0])) < 1e-5 < error(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("selector", [EVERYTHING, TopK(8)])
def test_a_flush_sees_new_weights(selector: Select) -> None:
    vit, frame = sam(), clip(1)[0]
    eventful = eventify(vit, selector=selector)
    state = eventful.init_state()
    eventful.step(frame, state)
    for parameter in vit.parameters():
        parameter.data.mul_(0.9)
    (update,) = eventful.step(frame, state, flush=True)
    assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5


def test_selectors_change_between_frames() -> None:
    eventful = eventify(sam(), selector=TopK(4))
    state, seen = eventful.init_state(), []
    selectors: list[Select | None] = [None, TopK(3), Threshold(1e9), TopFraction(0.5), None]
    selectors.append(lambda gates: [torch.tensor([7]) for _ in gates])
    for selector, frame in zip(selectors, clip(6), strict=True):
        (update,) = eventful.step(frame, state, selector=selector)
        seen.append(len(update.changed))
    assert seen == [100, 3, 0, 50, 4, 1]


def test_a_rule_of_another_layout_flushes() -> None:
    """Also where buffers happen to have the same shape: a patch of 4 x 4 x 3 and a token of 48 numbers."""
    vit, frames = sam(embed_dim=48), clip(9)
    state: State[Any] = State([None])
    rules: list[tuple[Rule[Any], bool]] = [
        (Rows(), True),
        (Rows(renew_every=2), False),
        (Rows("embedding"), True),
        (Paper(), True),
        (Paper(stgt=True), False),
        (Paper("qk"), True),
        (Paper("qk", gate_before_norm=True), True),
        (Dense(), True),
        (Rows(), True),
    ]
    for (rule, flush), frame in zip(rules, frames, strict=True):
        (update,) = eventify(vit, rule, TopK(5)).step(frame, state)
        assert update.flush == flush
        if flush:
            assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5


def test_rules_are_frozen_values() -> None:
    for rule, name in ((Rows(), "gate"), (Paper(), "pool")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 3)
    assert Rows() == Rows("patches") and hash(Paper("qk")) == hash(Paper(ablation="qk"))


class EveryOther(Rows):
    """A rule of the user's own."""

    def step(self, vit: Any, frames: Any, states: Sequence[RowsState], select: Any, saliency: Any) -> Any:
        def every_other(gates: Sequence[GateInput]) -> list[torch.Tensor]:
            return [torch.arange(gate.frame % 2, gate.error.numel(), 2) for gate in gates]

        return super().step(vit, frames, states, every_other, saliency)


def test_own_rules_and_selectors() -> None:
    eventful = eventify(sam(), EveryOther())
    state = eventful.init_state()
    assert [len(eventful.step(frame, state)[0].changed) for frame in clip(3)] == [100, 50, 50]

    def loud(gates: Sequence[GateInput]) -> list[torch.Tensor]:
        return [(gate.error > gate.error.mean()).nonzero().squeeze(1) for gate in gates]

    assert eventify(sam(), selector=loud).selector is loud


@pytest.mark.parametrize("rule", [Rows(), Paper(), Dense()])
def test_frames_of_any_form(rule: Rule[Any]) -> None:
    eventful, frames = eventify(sam(), rule, TopK(5)), clip(1, streams=2)[0]
    expected = eventful.step(frames, eventful.init_state(2))
    for form in (list(frames), tuple(frames), frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        for ours, theirs in zip(eventful.step(form, eventful.init_state(2)), expected, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
    different = [frames[0], frames[1, :, :24, :], frames[1, :, :, :13]]
    updates = eventful.step(different, eventful.init_state(3))
    assert [tuple(update.tokens.shape) for update in updates] == [(10, 10, 24), (6, 10, 24), (10, 4, 24)]


@pytest.mark.parametrize("rule", [Rows(), Paper(), Dense()])
def test_steps_need_no_gradient_and_work_in_inference_mode(rule: Rule[Any]) -> None:
    vit = sam(img_size=48).requires_grad_(True)  # of a size of its own: no index map of it is cached
    eventful = eventify(vit, rule, TopK(9))
    state, expected = eventful.init_state(), eventful.init_state()
    for t, frame in enumerate(clip(5, 48, 52)):
        with torch.inference_mode(t % 2 == 0):
            (update,) = eventful.step(frame, state)
        assert not update.tokens.requires_grad and not any(x.is_inference() for x in state.tensors())
        assert torch.equal(update.tokens, eventful.step(frame, expected)[0].tokens)
    eventful(clip(1)[0]).sum().backward()
    assert vit.pos_embed.grad is not None


def test_user_errors() -> None:
    with pytest.raises(UserError, match=r"rule must be Rows\(\), Paper\(\) or Dense\(\) .*got 'rows'"):
        eventify(sam(), "rows")  # type: ignore[call-overload]
    for network in (timm.create_model("resnet10t"), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="supported: timm VisionTransformerSAM, .*detectron2 ViT"):
            eventify(network)
    eventful = eventify(sam())
    with pytest.raises(UserError, match="got 2 frames for a state of 3 streams"):
        eventful.step(clip(1, streams=2)[0], eventful.init_state(3))
    with pytest.raises(UserError, match="got 1 flush flags for a state of 2 streams"):
        eventful.step(clip(1, streams=2)[0], eventful.init_state(2), flush=[True])
    with pytest.raises(UserError, match=r"frame of shape \(1, 40, 40\).*\(3, height, width\)"):
        eventful.step([torch.zeros(1, 40, 40)], eventful.init_state())
    with pytest.raises(UserError, match=r"frame of torch.uint8.*torch.float32"):
        eventful.step([torch.zeros(3, 40, 40, dtype=torch.uint8)], eventful.init_state())
    assert isinstance(eventful, EventfulViT)
