"""The paper's rule: dense when everything is selected, honest about what it did, careful with its state."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from networks import PATCH, clip, dense_tokens, error, plain, run, sam
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.macs import Ablation
from eventful_det.gating.paper import Paper, PaperState
from eventful_det.gating.paper.attention import ProductState, _mix, _update_scores, attend_windows
from eventful_det.gating.selector import EVERYTHING, GateInput, RandomK, Select, Threshold, TopFraction, TopK
from eventful_det.gating.spec import Block, ViTSpec, relative_table
from eventful_det.gating.state import State

ABLATIONS = ("full", "qk", "tokenwise")


def tokens(frames: Tensor, rule: Paper, selector: Select = EVERYTHING, vit: torch.nn.Module | None = None) -> Tensor:
    """Token maps `(T, B, H, W, C)`."""
    updates, _ = run(sam() if vit is None else vit, rule, frames, selector)
    return torch.stack([torch.stack([update.tokens for update in step]) for step in updates])


def close(ours: Tensor, theirs: Tensor) -> bool:
    return error(ours, theirs) < 1e-5


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("gate_before_norm", [False, True])
@pytest.mark.parametrize("stgt", [False, True])
def test_all_selected_equals_dense(ablation: Ablation, gate_before_norm: bool, stgt: bool) -> None:
    rule = Paper(ablation, gate_before_norm=gate_before_norm, stgt=stgt)
    for vit, size in ((sam(), 40), (plain(init_values=0.5), 24)):
        frames = clip(4, size, size, streams=2)
        for ours, x in zip(tokens(frames, rule, vit=vit), frames, strict=True):
            assert all(close(own, dense_tokens(vit, frame)) for own, frame in zip(ours, x, strict=True))


@pytest.mark.parametrize(("rule", "size"), [(Paper(pool=2), (40, 40)), (Paper(), (28, 52))])
def test_all_selected_equals_flush(rule: Paper, size: tuple[int, int]) -> None:
    """With pooling, and on another frame size with resized relative tables."""
    frames = clip(4, *size)
    outputs = tokens(frames, rule)
    assert outputs.shape == (4, 1, size[0] // PATCH, size[1] // PATCH, 24)
    for ours, x in zip(outputs, frames, strict=True):
        assert close(ours, tokens(x[None], rule)[0])
    assert (rule.pool > 1) != close(outputs[0, 0], dense_tokens(sam(), frames[0, 0]))


@pytest.mark.parametrize("selector", [TopK(0), TopK(7), TopFraction(0.3), Threshold(1e9), Threshold(0.5), RandomK(5)])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("pool", [1, 2])
def test_any_selection_works(selector: Select, ablation: Ablation, pool: int) -> None:
    assert tokens(clip(3), Paper(ablation, pool), selector).isfinite().all()


def positions(block: Block, q: Tensor, shape: tuple[int, int]) -> Tensor:
    """Relative positions `(heads, L, L)` of queries `(heads, L, d)` on a map, token by token."""
    y, x = (relative_table(table, size) for table, size in zip(block.tables(shape), shape, strict=True))
    places = [(i // shape[1], i % shape[1]) for i in range(q.shape[1])]
    rows = [torch.stack([y[a, c] + x[b, d] for c, d in places]) @ q[:, i, :, None] for i, (a, b) in enumerate(places)]
    return torch.stack(rows, 1).squeeze(-1)


def scores(block: Block, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """QK^T `(heads, L, L)`, scaled and with relative positions, and values `(heads, L, d)`."""
    q, k, v = qkv.unflatten(1, (3, block.heads, -1)).permute(1, 2, 0, 3)
    return q @ k.mT / q.shape[-1] ** 0.5 + positions(block, q, shape), v


def steps(selector: Select, ablation: Ablation, count: int) -> tuple[ViTSpec, PaperState]:
    """A network and the state of a stream after some frames."""
    eventful = eventify(sam(), Paper(ablation), selector)
    state = eventful.init_state()
    for x in clip(count):
        eventful.step(x, state)
    (stream,) = state.streams
    assert stream is not None
    return eventful.spec, stream


@pytest.mark.parametrize("k", [0, 9, 45, 60])
@pytest.mark.parametrize("ablation", ["full", "qk"])
def test_remembered_attention_is_that_of_the_buffered_tokens(k: int, ablation: Ablation) -> None:
    """QK^T equals that of the buffered q and k; A.V that of the references, what accumulation stands for."""
    spec, stream = steps(TopK(k), ablation, 4)
    products = stream.blocks[1].products
    assert products is not None
    expected, v = scores(spec.blocks[1], stream.blocks[1].qkv.buffer, (10, 10))
    assert close(products.scores, expected)
    if ablation == "full":
        assert products.weights is not None and products.values is not None and products.product is not None
        assert close(products.product, products.weights @ products.values)
        assert torch.equal(products.values, v)


def test_windows_attend_in_full() -> None:
    """10 x 10 tokens in windows of 4, so that those at the bottom and right are padded."""
    spec, stream = steps(TopK(9), "full", 3)
    block, qkv = spec.blocks[0], stream.blocks[0].qkv.buffer
    padding = block.padding_qkv().flatten()
    ours, padded = attend_windows(block, qkv, (10, 10)).view(10, 10, 24), padding.repeat(12, 12, 1)
    padded[:10, :10] = qkv.view(10, 10, -1)
    for top in range(0, 12, 4):
        for left in range(0, 12, 4):
            expected, v = scores(block, padded[top : top + 4, left : left + 4].reshape(16, -1), (4, 4))
            x = (expected.softmax(-1) @ v).transpose(0, 1).reshape(4, 4, 24)
            part = ours[top : top + 4, left : left + 4]
            assert close(part, x[: part.shape[0], : part.shape[1]])


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("refreshed", [1, 12, 40])
@pytest.mark.parametrize("relative", [False, True])
def test_many_updates_of_products(spread: float, refreshed: int, relative: bool) -> None:
    """Over many frames, also when the key that dominates a query comes or goes."""
    generator = torch.Generator().manual_seed(refreshed)
    heads, rows, cols, d = 2, 6, 10, 4
    length = rows * cols

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    terms, q, k, v = randn(heads, length, rows + cols), randn(0), randn(0), randn(0)
    y, x = terms.split([rows, cols], -1)
    bias = (y[..., :, None] + x[..., None, :]).flatten(-2) if relative else 0.0
    q, k, v = (torch.zeros(heads, length, d, dtype=torch.float64) for _ in range(3))
    a = torch.zeros(heads, length, length, dtype=torch.float64)
    full = ProductState(a.clone(), a.clone(), v.clone(), v.clone())
    for step in range(60):
        index = torch.randperm(length, generator=generator)[: length if step == 0 else refreshed].sort().values
        for values, scale in ((q, spread), (k, spread), (v, 1.0)):
            values[:, index] = scale * randn(heads, len(index), d)
        _update_scores(full.scores, q, k, terms if relative else None, (rows, cols), index, index)
        softmax = (q @ k.mT / d**0.5 + bias).softmax(-1)
        a[..., index] = softmax[..., index]
        assert close(full.scores.softmax(-1), softmax)
        assert close(_mix(full, v, index, flush=step == 0), a @ v)


def test_reference_follows_selected_tokens_only_unless_stgt() -> None:
    vit = sam()
    first, second = clip(2)
    for stgt in (False, True):
        eventful = eventify(vit, Paper(stgt=stgt), TopK(6))
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
    eventful = eventify(vit, Paper(), Threshold(1e-3))
    state = eventful.init_state()
    frame = clip(1)[0]
    (flushed,) = eventful.step(frame, state)
    (still,) = eventful.step(frame, state)
    assert flushed.flush and not still.flush
    assert len(flushed.changed) == 100 and len(still.changed) == 0
    assert torch.equal(flushed.tokens, still.tokens)
    assert bool((flushed.work == 1).all()) and bool((still.work == 0).all())
    assert still.macs.linear == 100 * 48 * 24  # the patch embedding, which gates do not spare


def test_changed_and_work_tell_what_happened() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(), TopK(8))
    state = eventful.init_state()
    previous = None
    for x in clip(3):
        (update,) = eventful.step(x, state)
        if previous is not None:
            differs = (update.tokens != previous).any(-1).flatten().nonzero().squeeze(1)
            assert torch.equal(update.changed, differs)
            assert update.work.shape == (100,) and update.work.min() >= 0 and update.work.max() <= 1
            dense_linear = 4 * 100 * 12 * 24**2
            assert float(update.work.mean()) * dense_linear == pytest.approx(update.macs.linear - 100 * 48 * 24)
        previous = update.tokens


def test_state_is_updated_in_place_and_never_aliased() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(), TopK(8))
    state = eventful.init_state()
    frames = clip(3)
    eventful.step(frames[0], state)
    places = [t.data_ptr() for t in state.streams[0].tensors()]
    for x in frames[1:]:
        (update,) = eventful.step(x, state)
        assert places == [t.data_ptr() for t in state.streams[0].tensors()]
        before = state.clone()
        update.tokens.fill_(torch.nan)
        assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors(), strict=True))


def test_streams_are_isolated_bit_for_bit() -> None:
    frames = clip(4, streams=3)
    for selector in (TopK(8), Threshold(0.5)):
        together = tokens(frames, Paper(), selector)
        for i in range(3):
            assert torch.equal(together[:, i : i + 1], tokens(frames[:, i : i + 1], Paper(), selector))


def test_flush_on_request_and_on_new_size() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(), TopK(8))
    state = eventful.init_state(2)
    frames = clip(2, streams=2)
    eventful.step(frames[0], state)
    updates = eventful.step(frames[1], state, flush=[True, False])
    assert [u.flush for u in updates] == [True, False]
    assert close(updates[0].tokens, dense_tokens(vit, frames[1, 0]))
    smaller = [frames[0, 0], frames[0, 1, :, :20]]
    assert [u.flush for u in eventful.step(smaller, state)] == [False, True]


def test_flush_forgets_old_weights() -> None:
    vit = sam()
    eventful = eventify(vit, Paper(), TopK(8))
    state = eventful.init_state()
    frame = clip(1)[0]
    eventful.step(frame, state)
    for parameter in vit.parameters():
        parameter.data.mul_(0.9)
    (update,) = eventful.step(frame, state, flush=True)
    assert close(update.tokens, dense_tokens(vit, frame[0]))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_saved_state_continues_the_stream(ablation: Ablation, tmp_path: object) -> None:
    vit, frames = sam(), clip(3)
    eventful = eventify(vit, Paper(ablation), TopK(8))
    state = eventful.init_state()
    for x in frames[:2]:
        eventful.step(x, state)
    path = f"{tmp_path}/state.pt"
    state.save(path)
    expected = eventful.step(frames[2], state)[0].tokens
    assert torch.equal(eventful.step(frames[2], State.load(path))[0].tokens, expected)


def test_gates_tell_selectors_no_age_but_the_frame() -> None:
    seen = []

    def spy(gates: Sequence[GateInput]) -> list[Tensor]:
        seen.extend((gate.frame, gate.age.unique().tolist(), len(gate.error)) for gate in gates)
        return EVERYTHING(gates)

    run(plain(depth=2), Paper(), clip(3, 24, 24), spy)
    assert seen == [(frame, [1], 37) for frame in (1, 2) for _ in range(2 * 3)]


def test_bfloat16_runs() -> None:
    assert tokens(clip(3), Paper(), TopK(8), sam().to(torch.bfloat16)).isfinite().all()


def test_user_errors() -> None:
    with pytest.raises(UserError, match="class or register"):
        run(plain(), Paper(pool=2), clip(1, 24, 24))
    with pytest.raises(UserError, match="9 x 10 .* not divisible by pool=2"):
        run(sam(), Paper(pool=2), clip(1, 36, 40))
    with pytest.raises(UserError, match="ablation"):
        Paper(ablation="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pool"):
        Paper(pool=0)
