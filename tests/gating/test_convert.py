"""`eventify`: parameters are shared, rules and policies may change between frames, errors are clear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from networks import clip, dense_tokens, error, plain, sam
from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.convert import EventfulViT, Rule, eventify
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import GateInput, Policy, Threshold, TopFraction, TopK, select_all
from eventful_det.gating.rows import Rows
from eventful_det.gating.update import Update


@pytest.mark.parametrize("vit", [sam(), plain(), plain(reg_tokens=2, init_values=0.1)])
@pytest.mark.parametrize("rule", ["rows", "paper"])
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


@pytest.mark.parametrize("policy", [select_all, TopK(8)])
def test_a_flush_sees_new_weights(policy: Policy) -> None:
    vit, frame = sam(), clip(1)[0]
    eventful = eventify(vit, "rows", policy)
    state = eventful.init_state()
    eventful.step(frame, state)
    for parameter in vit.parameters():
        parameter.data.mul_(0.9)
    (update,) = eventful.step(frame, state, flush=True)
    assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5


def test_policies_change_between_frames() -> None:
    eventful = eventify(sam(), Rows())
    state, seen = eventful.init_state(), []
    policies: list[Policy] = [select_all, TopK(3), Threshold(1e9), TopFraction(0.5), lambda gate: torch.tensor([7])]
    for policy, frame in zip(policies, clip(5), strict=True):
        eventful.policy = policy
        (update,) = eventful.step(frame, state)
        seen.append(len(update.changed))
    assert seen == [100, 3, 0, 50, 1] and eventful.rule.policy is policies[-1]


def test_a_rule_of_another_kind_flushes() -> None:
    """Also where buffers happen to have the same shape: a patch of 4 x 4 x 3 and a token of 48 numbers."""
    vit, frames = sam(embed_dim=48), clip(8)
    eventful = eventify(vit)
    state = eventful.init_state()
    rules: list[tuple[Rule, bool]] = [
        (Rows(TopK(5)), True),
        (Rows(TopK(9), renew_every=2), False),
        (Rows(TopK(5), gate="embedding"), True),
        (Paper(TopK(5)), True),
        (Paper(TopK(9), stgt=True), False),
        (Paper(TopK(9), "qk"), True),
        (Paper(TopK(9), "qk", gate_before_norm=True), True),
        (Rows(TopK(5)), True),
    ]
    for (rule, flush), frame in zip(rules, frames, strict=True):
        eventful.rule = rule
        (update,) = eventful.step(frame, state)
        assert update.flush == flush
        if flush:
            assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5


class EveryOther(Rows):
    """A rule of the user's own."""

    def step(self, anatomy: Any, patches: Any, states: Any, joint: Any = None) -> list[Update]:
        self.policy = lambda gate: torch.arange(gate.frame % 2, gate.error.numel(), 2)
        return super().step(anatomy, patches, states, joint)


def test_own_rules_and_policies() -> None:
    eventful = eventify(sam(), EveryOther())
    state = eventful.init_state()
    assert [len(eventful.step(frame, state)[0].changed) for frame in clip(3)] == [100, 50, 50]

    def loud(gate: GateInput) -> torch.Tensor:
        return (gate.error > gate.error.mean()).nonzero().squeeze(1)

    assert eventify(sam(), policy=loud).policy is loud


@pytest.mark.parametrize("rule", [Rows(TopK(5)), Paper(TopK(5))])
def test_frames_of_any_form(rule: Rule) -> None:
    eventful, frames = eventify(sam(), rule), clip(1, streams=2)[0]
    expected = eventful.step(frames, eventful.init_state(2))
    for form in (list(frames), tuple(frames), frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        for ours, theirs in zip(eventful.step(form, eventful.init_state(2)), expected, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
    different = [frames[0], frames[1, :, :24, :], frames[1, :, :, :13]]
    updates = eventful.step(different, eventful.init_state(3))
    assert [tuple(update.tokens.shape) for update in updates] == [(10, 10, 24), (6, 10, 24), (10, 4, 24)]


def test_steps_need_no_gradient_and_work_in_inference_mode() -> None:
    vit = sam().requires_grad_(True)
    eventful = eventify(vit)
    state = eventful.init_state()
    for t, frame in enumerate(clip(4)):
        with torch.inference_mode(t % 2 == 0):
            (update,) = eventful.step(frame, state)
        assert not update.tokens.requires_grad
    eventful(clip(1)[0]).sum().backward()
    assert vit.pos_embed.grad is not None


def test_user_errors() -> None:
    with pytest.raises(UserError, match="unknown rule 'row'; known: rows, paper"):
        eventify(sam(), "row")  # type: ignore[arg-type]
    for network in (timm.create_model("resnet10t"), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="supported: timm VisionTransformerSAM, .*detectron2 ViT"):
            eventify(network)
    eventful = eventify(sam())
    with pytest.raises(UserError, match="got 2 frames for a state of 3 streams"):
        eventful.step(clip(1, streams=2)[0], eventful.init_state(3))
    with pytest.raises(UserError, match="got 1 flush flags for 2 frames"):
        eventful.step(clip(1, streams=2)[0], eventful.init_state(2), flush=[True])
    with pytest.raises(UserError, match=r"frame of shape \(1, 40, 40\).*\(3, height, width\)"):
        eventful.step([torch.zeros(1, 40, 40)], eventful.init_state())
    with pytest.raises(UserError, match=r"frame of torch.uint8.*torch.float32"):
        eventful.step([torch.zeros(3, 40, 40, dtype=torch.uint8)], eventful.init_state())
    assert isinstance(eventful, EventfulViT)
