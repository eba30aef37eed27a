"""The paper's rule: dense when everything is selected, honest about what it did, careful with its state."""

from __future__ import annotations

import pytest
import torch
from networks import randomise
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Block, anatomy_of, relative_table
from eventful_det.gating.convert import eventify
from eventful_det.gating.paper import Paper, PaperState
from eventful_det.gating.paper_attention import attend_windows
from eventful_det.gating.paper_products import accumulate, empty_mixture, empty_products, multiply
from eventful_det.gating.paper_scores import Scores
from eventful_det.gating.policy import GateInput, Policy, RandomK, Threshold, TopFraction, TopK, select_all
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


def positions(block: Block, q: Tensor, shape: tuple[int, int]) -> Tensor:
    """Relative positions `(heads, L, L)` of queries `(heads, L, d)` on a map, token by token."""
    y, x = (relative_table(table, size) for table, size in zip(block.rel_pos, shape, strict=True))
    places = [(i // shape[1], i % shape[1]) for i in range(q.shape[1])]
    rows = [torch.stack([y[a, c] + x[b, d] for c, d in places]) @ q[:, i, :, None] for i, (a, b) in enumerate(places)]
    return torch.stack(rows, 1).squeeze(-1)


def scores(block: Block, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """QK^T `(heads, L, L)`, scaled and with relative positions, and values `(heads, L, d)`."""
    q, k, v = qkv.unflatten(1, (3, block.heads, -1)).permute(1, 2, 0, 3)
    return q @ k.mT / q.shape[-1] ** 0.5 + positions(block, q, shape), v


def steps(policy: Policy, ablation: str, count: int) -> tuple[Anatomy, PaperState]:
    """A network and the state of a stream after some frames."""
    vit = sam()
    eventful = eventify(vit, Paper(policy, ablation))
    state = eventful.init_state()
    for x in clip(count, 1):
        eventful.step(x, state)
    return eventful.anatomy, state.streams[0]


@pytest.mark.parametrize("k", [0, 9, 45, 60])
def test_remembered_attention_is_that_of_the_buffered_tokens(k: int) -> None:
    """The softmax equals that of the buffered q and k; A.V that of the references, what accumulation stands for."""
    anatomy, stream = steps(TopK(k), "full", 4)
    mixture, block = stream.blocks[1].products, anatomy.blocks[1]
    expected, v = scores(block, stream.blocks[1].qkv.buffer, (10, 10))
    assert close(mixture.base + mixture.sums.log(), expected.logsumexp(-1))
    assert close(mixture.product, mixture.weights.mT @ mixture.values)
    assert torch.equal(mixture.values, v)
    _, stream = steps(TopK(k), "qk", 4)
    products = stream.blocks[1].products
    expected, _ = scores(block, stream.blocks[1].qkv.buffer, (10, 10))
    assert close(products.weights, (expected - products.base[..., None]).exp().mT)


@pytest.mark.parametrize("policy", [TopK(2), TopK(30), Threshold(3.0)])
def test_skipped_windows_hold_the_attention_of_their_tokens(policy: Policy) -> None:
    """10 x 10 tokens in windows of 4, so that those at the bottom and right are padded."""
    anatomy, stream = steps(policy, "full", 5)
    for block, state in zip(anatomy.blocks, stream.blocks, strict=True):
        if not block.window:
            assert state.attended is None
            continue
        for window, qkv in enumerate(state.qkv.buffer.unflatten(0, (9, 16))):
            expected, v = scores(block, qkv, (4, 4))
            x = (expected.softmax(-1) @ v).transpose(0, 1).reshape(4, 4, 24)
            top, left = window // 3 * 4, window % 3 * 4
            ours = state.attended.view(10, 10, 24)[top : top + 4, left : left + 4]
            assert close(ours, x[: ours.shape[0], : ours.shape[1]])


def test_windows_without_a_refreshed_token_are_neither_touched_nor_computed() -> None:
    anatomy, stream = steps(TopK(9), "full", 1)
    block, state = anatomy.blocks[0], stream.blocks[0]
    before = state.attended.clone()
    state.qkv.buffer.normal_()
    counts = attend_windows(block, state.qkv.buffer, state.attended, torch.tensor([0, 3, 99]), (10, 10))
    changed = (state.attended != before).any(1).view(10, 10)
    assert bool(changed[:4, :4].all()) and bool(changed[8:, 8:].all()) and int(changed.sum()) == 16 + 4
    assert counts.matmul == 2 * 144 * 16 * 24 and counts.einsum == 144 * 24 * 8
    assert counts.macs == (counts.matmul + counts.einsum) * 20 // 144
    nothing = attend_windows(block, state.qkv.buffer.normal_(), state.attended, torch.tensor([]).long(), (10, 10))
    assert nothing.macs == 0 and nothing.official == counts.official


@pytest.mark.parametrize(("spread", "dtype"), [(0.5, torch.float32), (3.0, torch.float32), (20.0, torch.float64)])
@pytest.mark.parametrize("refreshed", [1, 12, 40])
@pytest.mark.parametrize("relative", [False, True])
def test_many_updates_of_products(spread: float, dtype: torch.dtype, refreshed: int, relative: bool) -> None:
    """Over many frames, also when the key that dominates a query comes or goes."""
    generator = torch.Generator().manual_seed(refreshed)
    heads, rows, cols, d = 2, 6, 10, 4
    length = rows * cols
    terms = [torch.randn(heads, n, length, generator=generator, dtype=dtype) for n in (rows, cols)] if relative else []
    bias = (terms[0][:, :, None] + terms[1][:, None]).flatten(1, 2).mT if relative else torch.zeros(1)
    like = torch.zeros(1, dtype=dtype)
    mixture, products = (empty(like, heads, length, length, d, ()) for empty in (empty_mixture, empty_products))
    q, k, v = (torch.zeros(heads, length, d, dtype=dtype) for _ in range(3))
    a, ran = torch.zeros(heads, length, length, dtype=dtype), 0
    for step in range(60):
        index = torch.randperm(length, generator=generator)[: length if step == 0 else refreshed].sort().values
        for x, scale in ((q, spread), (k, spread), (v, 1.0)):
            x[:, index] = scale * torch.randn(heads, len(index), d, generator=generator, dtype=dtype)
        current = Scores(q, k, terms)
        macs = accumulate(mixture, current, v, index, index)
        ran = max(ran, macs) if step else 0
        softmax = (q @ k.mT / d**0.5 + bias).softmax(-1)
        a[..., index] = softmax[..., index]
        assert close(mixture.product, a @ v)
        assert close(multiply(products, current, v, index, index)[0], softmax @ v)
    if refreshed == 1:
        assert (ran > 5 * length) == (spread > 1)  # more than the rows and columns: denominators computed anew


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
