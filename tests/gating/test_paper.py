"""The paper's rule: dense when everything is selected, honest about what it did, careful with its state."""

from __future__ import annotations

import pytest
import torch
from networks import randomise
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import anatomy_of
from eventful_det.gating.convert import eventify
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import GateInput, RandomK, Threshold, TopFraction, TopK, select_all
from eventful_det.gating.state import State

ABLATIONS = ("full", "qk", "tokenwise")


def sam(**kwargs: object) -> nn.Module:
    """Windows of 4 on 10 x 10 tokens, so they need padding; relative positions; blocks 1 and 3 global."""
    sizes = {"img_size": 40, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "window_size": 4}
    vit = VisionTransformerSAM(**sizes, global_attn_indexes=(1, 3), use_rel_pos=True, **kwargs)
    vit.neck = nn.Identity()
    return randomise(vit)


def plain() -> nn.Module:
    return randomise(VisionTransformer(img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=2, init_values=0.5))


def dense_tokens(vit: nn.Module, frames: Tensor) -> Tensor:
    """`(B, H, W, C)` by timm's own forward."""
    if isinstance(vit, VisionTransformerSAM):
        return vit.forward_features(frames).permute(0, 2, 3, 1)
    tokens = vit.forward_features(frames)[:, vit.num_prefix_tokens :]
    return tokens.unflatten(1, (frames.shape[-2] // 4, frames.shape[-1] // 4))


def clip(steps: int, streams: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """`(T, B, 3, h, w)` frames of which a part changes."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(steps, streams, 3, height, width, generator=generator)
    keep = torch.rand(steps, streams, 1, height // 4, width // 4, generator=generator) < 0.7
    keep = keep.repeat_interleave(4, -1).repeat_interleave(4, -2)
    for t in range(1, steps):
        frames[t] = torch.where(keep[t], frames[t - 1], frames[t])
    return frames


def run(vit: nn.Module, rule: Paper, frames: Tensor) -> Tensor:
    """Token maps `(T, B, H, W, C)`."""
    eventful = eventify(vit, rule)
    state = eventful.init_state(frames.shape[1])
    return torch.stack([torch.stack([u.tokens for u in eventful.step(x, state)]) for x in frames])


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() / theirs.norm() < 1e-5)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("gate_before_norm", [False, True])
@pytest.mark.parametrize("stgt", [False, True])
def test_all_selected_equals_dense_with_windows(ablation: str, gate_before_norm: bool, stgt: bool) -> None:
    vit, frames = sam(), clip(4, 2)
    outputs = run(vit, Paper(select_all, ablation, gate_before_norm=gate_before_norm, stgt=stgt), frames)
    for ours, x in zip(outputs, frames, strict=True):
        assert close(ours, dense_tokens(vit, x))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_all_selected_equals_dense_with_class_token(ablation: str) -> None:
    vit, frames = plain(), clip(4, 2, 24, 24)
    for ours, x in zip(run(vit, Paper(select_all, ablation), frames), frames, strict=True):
        assert close(ours, dense_tokens(vit, x))


def test_all_selected_equals_flush_with_pooling() -> None:
    vit, frames = sam(), clip(4, 1)
    outputs = run(vit, Paper(select_all, pool=2), frames)
    for ours, x in zip(outputs, frames, strict=True):
        assert close(ours, run(vit, Paper(pool=2), x[None])[0])
    assert not close(outputs[0], run(vit, Paper(), frames[:1])[0])


def test_other_frame_size_and_resized_relative_tables() -> None:
    vit, frames = sam(), clip(2, 1, 28, 52)
    outputs = run(vit, Paper(select_all), frames)
    assert outputs.shape == (2, 1, 7, 13, 24)
    for ours, x in zip(outputs, frames, strict=True):
        assert close(ours, run(vit, Paper(), x[None])[0])


@pytest.mark.parametrize("policy", [TopK(0), TopK(7), TopFraction(0.3), Threshold(1e9), Threshold(0.5), RandomK(k=5)])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("pool", [1, 2])
def test_any_selection_works(policy: object, ablation: str, pool: int) -> None:
    outputs = run(sam(), Paper(policy, ablation, pool), clip(3, 1))
    assert outputs.isfinite().all()


def test_buffered_products_are_those_of_the_buffered_tokens() -> None:
    """QK^T equals that of the buffered q and k; A.V equals that of the references (what accumulation stands for)."""
    vit = sam()
    eventful = eventify(vit, Paper(TopK(9)))
    state = eventful.init_state()
    for x in clip(4, 1):
        eventful.step(x, state)
    block = state.streams[0].blocks[1]
    q, k, _ = block.qkv.buffer.view(100, 3, 2, 12).permute(1, 2, 0, 3)
    assert close(block.products.scores, q @ k.mT / 12**0.5)
    mixture = block.products.mixture
    assert close(mixture.product, mixture.weights @ mixture.values)


def test_reference_follows_selected_tokens_only_unless_stgt() -> None:
    vit = sam()
    first, second = clip(2, 1)
    for stgt in (False, True):
        eventful = eventify(vit, Paper(TopK(6), stgt=stgt))
        state = eventful.init_state()
        eventful.step(first, state)
        reference = state.streams[0].blocks[0].qkv.reference
        before = reference.clone()
        eventful.step(second, state)
        assert int((reference != before).any(1).sum()) == (6 if not stgt else _changed_patches(first, second))


def _changed_patches(first: Tensor, second: Tensor) -> int:
    return int((first != second).any(1)[0, ::4, ::4].sum())


def test_static_scene_changes_nothing_and_computes_no_linear_layers() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(Threshold(1e-3)))
    state = eventful.init_state()
    frame = clip(1, 1)[0]
    (flushed,) = eventful.step(frame, state)
    (still,) = eventful.step(frame, state)
    assert flushed.flush and not still.flush
    assert len(flushed.changed) == 100 and len(still.changed) == 0
    assert torch.equal(flushed.tokens, still.tokens)
    assert bool((flushed.work == 1).all()) and bool((still.work == 0).all())
    assert still.counts.linear == 100 * 48 * 24  # the patch embedding, which gates do not spare


def test_changed_and_work_tell_what_happened() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(TopK(8)))
    state = eventful.init_state()
    previous = None
    for x in clip(3, 1):
        (update,) = eventful.step(x, state)
        if previous is not None:
            differs = (update.tokens != previous).any(-1).flatten().nonzero().squeeze(1)
            assert torch.equal(update.changed, differs)
            assert update.work.shape == (100,) and update.work.min() >= 0 and update.work.max() <= 1
            dense_linear = 4 * 100 * 12 * 24**2
            assert float(update.work.mean()) * dense_linear == pytest.approx(update.counts.linear - 100 * 48 * 24)
        previous = update.tokens


def test_state_is_updated_in_place_and_never_aliased() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(TopK(8)))
    state = eventful.init_state()
    frames = clip(3, 1)
    eventful.step(frames[0], state)
    places = [t.data_ptr() for t in state.streams[0].tensors()]
    for x in frames[1:]:
        (update,) = eventful.step(x, state)
        assert places == [t.data_ptr() for t in state.streams[0].tensors()]
        before = state.clone()
        update.tokens.fill_(torch.nan)
        assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors(), strict=True))


def test_streams_are_isolated_bit_for_bit() -> None:
    vit, frames = sam(), clip(4, 3)
    for policy in (TopK(8), Threshold(0.5)):
        together = run(vit, Paper(policy), frames)
        for stream in range(3):
            assert torch.equal(
                together[:, stream : stream + 1], run(vit, Paper(policy), frames[:, stream : stream + 1])
            )


def test_flush_on_request_and_on_new_size() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(TopK(8)))
    state = eventful.init_state(2)
    frames = clip(2, 2)
    eventful.step(frames[0], state)
    updates = eventful.step(frames[1], state, flush=[True, False])
    assert [u.flush for u in updates] == [True, False]
    assert close(updates[0].tokens, dense_tokens(vit, frames[1])[0])
    smaller = [frames[0, 0], frames[0, 1, :, :20]]
    assert [u.flush for u in eventful.step(smaller, state)] == [False, True]


def test_flush_forgets_old_weights() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(TopK(8)))
    state = eventful.init_state()
    frame = clip(1, 1)[0]
    eventful.step(frame, state)
    for parameter in vit.parameters():
        parameter.data.mul_(0.9)
    (update,) = eventful.step(frame, state, flush=True)
    assert close(update.tokens, dense_tokens(vit, frame)[0])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_saved_state_continues_the_stream(ablation: str, tmp_path: object) -> None:
    vit, frames = sam(), clip(3, 1)
    eventful = eventify(vit, Paper(TopK(8), ablation))
    state = eventful.init_state()
    for x in frames[:2]:
        eventful.step(x, state)
    path = f"{tmp_path}/state.pt"
    state.save(path)
    expected = eventful.step(frames[2], state)[0].tokens
    assert torch.equal(eventful.step(frames[2], State.load(path))[0].tokens, expected)


def test_gates_tell_policies_no_age_but_the_frame() -> None:
    seen = []

    def spy(gate: GateInput) -> Tensor:
        seen.append((gate.frame, gate.age.unique().tolist(), len(gate.error)))
        return select_all(gate)

    run(plain(), Paper(spy), clip(3, 1, 24, 24))
    assert seen == [(frame, [1], 37) for frame in (1, 2) for _ in range(2 * 3)]


def test_bfloat16_runs() -> None:
    vit = sam().to(torch.bfloat16)
    assert run(vit, Paper(TopK(8)), clip(3, 1).to(torch.bfloat16)).isfinite().all()


def test_user_errors() -> None:
    with pytest.raises(UserError, match="class or register"):
        Paper(pool=2).init_stream(anatomy_of(plain()), (6, 6))
    with pytest.raises(UserError, match="9 x 10 .* not divisible by pool=2"):
        Paper(pool=2).init_stream(anatomy_of(sam()), (9, 10))
    with pytest.raises(UserError, match="ablation"):
        Paper(ablation="all")
    with pytest.raises(UserError, match="pool"):
        Paper(pool=0)
