"""The rows rule: dense when everything is selected, still when nothing changes, and careful with its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import clip, dense_tokens, error, plain, randomise, run, sam
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Queries, Rows
from eventful_det.gating.selector import (
    EVERYTHING,
    GateInput,
    LargestError,
    RandomK,
    Select,
    Selector,
    Threshold,
    TopFraction,
    TopK,
)
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import most_tiles, windows_of

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "windows that need padding": (sam, 40, 40),
    "windows that divide, not square": (sam, 32, 64),
    "padding, not square, tables resized": (sam, 28, 52),
    "smaller than a window": (sam, 8, 12),
    "windows alone": (lambda: sam(global_attn_indexes=()), 40, 24),
    "global alone": (lambda: sam(window_size=0), 40, 40),
    "no relative positions": (lambda: sam(use_rel_pos=False), 40, 40),
    "no positions, no qkv bias": (lambda: sam(use_abs_pos=False, qkv_bias=False), 40, 28),
    "layer scale and windows": (lambda: sam(init_values=0.5), 40, 40),
    "class token": (plain, 24, 24),
    "class token, not square": (plain, 16, 40),
    "layer scale": (lambda: plain(init_values=0.5), 24, 24),
    "registers": (lambda: plain(reg_tokens=3, qkv_bias=False), 24, 16),
    "registers without positions": (lambda: plain(reg_tokens=3, no_embed_class=True), 24, 16),
    "no class token, no positions": (lambda: plain(class_token=False, global_pool="avg", pos_embed="none"), 24, 24),
    "no positions": (lambda: plain(pos_embed="none"), 24, 24),
}
SELECTORS: list[Select] = [
    TopK(7),
    Selector(LargestError(age_power=0.5), 7),
    TopFraction(0.3),
    Threshold(0.5),
    Threshold(0.5).within(0.1),
    Threshold(1e9),
    RandomK(5),
    TopK(0),
    TopK(10**6),
]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("gate", ["patches", "embedding"])
def test_all_selected_equals_dense(name: str, gate: str) -> None:
    make, height, width = NETWORKS[name]
    vit, frames = make(), clip(3, height, width)
    updates, _ = run(vit, Rows(gate), frames, EVERYTHING)
    for (update,), frame in zip(updates, frames, strict=True):
        assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5
        assert update.changed.sort().values.tolist() == list(range(len(update.work)))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("gate", ["patches", "embedding"])
def test_any_selection_works(selector: Select, gate: str) -> None:
    for vit, frames in [(sam(), clip(4)), (plain(), clip(4, 24, 24))]:
        updates, _ = run(vit, Rows(gate), frames, selector)
        assert all(update.tokens.isfinite().all() for (update,) in updates)
        assert [update.flush for (update,) in updates] == [True, False, False, False]


@pytest.mark.parametrize("vit", [sam(), plain()])
def test_an_identical_frame_changes_nothing(vit: nn.Module) -> None:
    frames = clip(1, 24, 24).expand(5, -1, -1, -1, -1)
    updates, _ = run(vit, Rows(), frames, Threshold(0.0))
    for (update,) in updates[1:]:
        assert torch.equal(update.tokens, updates[0][0].tokens)
        assert update.changed.numel() == 0 and not update.work.any()
        assert update.macs.products == 0 and update.macs.gate > 0
    updates, _ = run(vit, Rows(), frames, TopK(5))  # recomputes five tokens from the same inputs
    for (update,) in updates[1:]:
        assert error(update.tokens, updates[0][0].tokens) < 1e-5


def test_only_selected_tokens_change() -> None:
    updates, _ = run(sam(), Rows(), clip(5), TopK(9))
    for (before,), (update,) in zip(updates, updates[1:], strict=False):
        differs = (update.tokens != before.tokens).any(-1).flatten().nonzero().squeeze(1)
        assert set(differs.tolist()) <= set(update.changed.tolist()) and len(update.changed) == 9
        assert set(update.work.nonzero().squeeze(1).tolist()) == set(update.changed.tolist())
        assert set(update.work.tolist()) == {0.0, 1.0}


def test_the_gate_takes_the_patches_that_changed() -> None:
    frames = clip(6, changing=0.1)
    updates, _ = run(sam(), Rows(), frames, Threshold(0.0))
    for t in range(1, 6):
        differs = (frames[t] != frames[t - 1])[0].any(0).unflatten(0, (10, 4)).unflatten(2, (10, 4)).any(3).any(1)
        assert updates[t][0].changed.sort().values.tolist() == differs.flatten().nonzero().squeeze(1).tolist()


def test_a_naive_rows_rule_agrees() -> None:
    """Every block token by token on the full map: new keys and values of selected tokens, old ones of the others."""
    vit, frames = sam(global_attn_indexes=(0, 1, 2, 3)), clip(4)
    selector = TopK(12)
    updates, _ = run(vit, Rows(), frames, selector)
    spec = spec_of(vit)
    memory: list[Tensor] = []
    output = reference = torch.zeros(0)
    for t, frame in enumerate(frames):
        patches = spec.patches(frame[0])
        if t == 0:
            chosen, reference, output = torch.arange(100), patches.clone(), torch.zeros(100, 24)
        else:
            distance = (patches - reference).norm(dim=1)
            (chosen,) = selector([GateInput(distance, torch.ones(100), t)])
            reference[chosen] = patches[chosen]
        z = spec.embed(patches) + spec.positions((10, 10))  # type: ignore[misc]
        for i, block in enumerate(vit.blocks):
            qkv = block.attn.qkv(block.norm1(z)).view(100, 3, 2, 12).permute(1, 2, 0, 3)
            if t == 0:
                memory.append(qkv[1:].clone())
            else:
                memory[i][:, :, chosen] = qkv[1:, :, chosen]
            (q, (k, v)) = qkv[0], memory[i]
            scores = q @ k.mT / 12**0.5
            for axis, table in ((0, block.attn.rel_pos_h), (1, block.attn.rel_pos_w)):
                place = torch.arange(100) // 10 if axis == 0 else torch.arange(100) % 10
                scores = scores + torch.einsum("hqd,qkd->hqk", q, table[place[:, None] - place[None] + 9])
            x = (scores.softmax(-1) @ v).transpose(0, 1).reshape(100, 24)
            z = z + block.attn.proj(x)
            z = z + block.mlp(block.norm2(z))
        output[chosen] = z[chosen]
        assert error(updates[t][0].tokens.flatten(0, 1), output) < 1e-5


def test_untouched_windows_stay_bitwise() -> None:
    vit = sam(global_attn_indexes=())
    frames = clip(1).repeat(2, 1, 1, 1, 1)
    frames[1, 0, :, :16, :16] += 1  # the first window
    (first,), (second,) = run(vit, Rows(), frames, Threshold(0.0))[0]
    assert set(second.changed.tolist()) == {y * 10 + x for y in range(4) for x in range(4)}
    assert torch.equal(first.tokens[4:], second.tokens[4:]) and torch.equal(first.tokens[:, 4:], second.tokens[:, 4:])
    assert error(second.tokens, dense_tokens(vit, frames[1, 0])) < 1e-5


def test_ages_and_staleness() -> None:
    vit, seen = sam(), []

    def spy(gates: Sequence[GateInput]) -> list[Tensor]:
        (gate,) = gates
        seen.append((gate.frame, gate.age.clone()))
        return [torch.tensor([gate.frame, 50])]

    run(vit, Rows(), clip(5), spy)
    assert [frame for frame, _ in seen] == [1, 2, 3, 4]
    age = seen[-1][1]
    assert age[[1, 2, 3, 50]].tolist() == [3, 2, 1, 1] and int(age[99]) == 4 and age.dtype == torch.int32


def test_every_token_is_refreshed_while_everything_changes() -> None:
    updates, _ = run(sam(depth=1), Rows(), clip(40, changing=1.0), Selector(LargestError(age_power=0.5), 10))
    last = torch.zeros(100)
    for t, (update,) in enumerate(updates):
        last[update.changed] = t
        assert (t - last).max() <= 20  # 100 / 10 would be the least


def test_renewal() -> None:
    vit, frames = sam(), clip(7)
    updates, _ = run(vit, Rows(renew_every=3), frames, TopK(3))
    assert [len(u.changed) for (u,) in updates] == [100, 3, 3, 100, 3, 3, 100]
    assert [u.flush for (u,) in updates] == [True] + [False] * 6
    for t in (0, 3, 6):
        assert error(updates[t][0].tokens, dense_tokens(vit, frames[t, 0])) < 1e-5
    assert updates[3][0].macs == updates[0][0].macs


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("gate", ["patches", "embedding"])
def test_streams_do_not_influence_each_other(selector: Select, gate: str) -> None:
    """What is selected and what it costs not at all; values as far as larger products round differently."""
    vit, frames = sam(), clip(4, streams=3)
    together, state = run(vit, Rows(gate), frames, selector)
    for i in range(3):
        alone, own = run(vit, Rows(gate), frames[:, i : i + 1], selector)
        for t in range(4):
            torch.testing.assert_close(together[t][i].tokens, alone[t][0].tokens, rtol=1e-5, atol=1e-5)
            assert torch.equal(together[t][i].changed, alone[t][0].changed)
            assert together[t][i].macs == alone[t][0].macs
        for a, b in zip(state.select([i]).tensors(), own.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_exact_streams_do_not_influence_a_bit() -> None:
    vit = sam()
    clips = [clip(4, *size, seed=i) for i, size in enumerate([(40, 40), (20, 28), (8, 12)])]
    eventful = eventify(vit, Rows(exact=True), Threshold(0.5).within(0.4))
    state = eventful.init_state(3)
    alone = [run(vit, eventful.rule, frames, eventful.selector)[0] for frames in clips]
    for t in range(4):
        for i, update in enumerate(eventful.step([frames[t, 0] for frames in clips], state)):
            assert torch.equal(update.tokens, alone[i][t][0].tokens) and update.macs == alone[i][t][0].macs


def test_streams_of_several_sizes_step_together() -> None:
    vit = sam()
    clips = [clip(4, *size, seed=i) for i, size in enumerate([(40, 40), (20, 28), (8, 12)])]
    eventful = eventify(vit, selector=Threshold(0.5).within(0.4))
    state = eventful.init_state(3)
    alone = [run(vit, eventful.rule, frames, eventful.selector)[0] for frames in clips]
    for t in range(4):
        for i, update in enumerate(eventful.step([frames[t, 0] for frames in clips], state)):
            torch.testing.assert_close(update.tokens, alone[i][t][0].tokens, rtol=1e-5, atol=1e-5)
            assert torch.equal(update.changed, alone[i][t][0].changed)


def test_a_still_stream_beside_a_moving_one() -> None:
    vit, frames = sam(), clip(3, streams=2)
    frames[:, 1] = frames[0, 1]
    updates, _ = run(vit, Rows(), frames, Threshold(0.0))
    assert [len(update.changed) == 0 for update in updates[1]] == [False, True]
    assert updates[2][1].macs.linear == 0 and torch.equal(updates[2][1].tokens, updates[0][1].tokens)


def test_a_new_size_flushes_that_stream_alone() -> None:
    vit = sam()
    eventful = eventify(vit, selector=TopK(8))
    state, frames = eventful.init_state(2), clip(3, streams=2)
    eventful.step(frames[0], state)
    small = frames[1, 1, :, :20, :]
    updates = eventful.step([frames[1, 0], small], state)
    assert [u.flush for u in updates] == [False, True]
    assert error(updates[1].tokens, dense_tokens(vit, small)) < 1e-5
    assert [u.flush for u in eventful.step([frames[2, 0], frames[2, 1, :, :20, :]], state)] == [False, False]


def test_flush_on_request() -> None:
    vit, frames = sam(), clip(3, streams=2)
    eventful = eventify(vit, selector=TopK(8))
    state = eventful.init_state(2)
    eventful.step(frames[0], state)
    updates = eventful.step(frames[1], state, flush=[False, True])
    assert [u.flush for u in updates] == [False, True] and len(updates[1].changed) == 100
    assert error(updates[1].tokens, dense_tokens(vit, frames[1, 1])) < 1e-5
    state.reset([0])
    assert [u.flush for u in eventful.step(frames[2], state)] == [True, False]


def test_state_is_constant_and_in_place_and_linear_in_tokens() -> None:
    vit = sam(depth=2)
    eventful = eventify(vit, selector=TopFraction(0.2))
    state, frames = eventful.init_state(), clip(50)
    eventful.step(frames[0], state)
    places, nbytes = [t.data_ptr() for t in state.tensors()], state.nbytes
    for frame in frames[1:]:
        eventful.step(frame, state)
        assert places == [t.data_ptr() for t in state.tensors()] and state.nbytes == nbytes
    _, larger = run(vit, Rows(), clip(1, 160, 160))
    assert larger.nbytes < 16 * nbytes  # 16 times the tokens, and less padding


@pytest.mark.parametrize("selector", [TopK(8), Threshold(1e9), EVERYTHING])
def test_results_alias_no_buffer(selector: Select) -> None:
    vit, frames = sam(), clip(4)
    clean, _ = run(vit, Rows(), frames, selector)
    eventful = eventify(vit, Rows(), selector)
    state = eventful.init_state()
    for t, frame in enumerate(frames):
        given = frame.clone()
        (update,) = eventful.step(given, state)
        assert torch.equal(update.tokens, clean[t][0].tokens)
        for tensor in (update.tokens, update.work, given):
            tensor.fill_(torch.nan)
        update.changed.fill_(-1)


def test_order_of_a_selection_does_not_matter() -> None:
    frames = clip(4)

    def backwards(gates: Sequence[GateInput]) -> list[Tensor]:
        return [index.sort(descending=True).values for index in TopK(15)(gates)]

    for ours, theirs in zip(
        run(sam(), Rows(), frames, backwards)[0], run(sam(), Rows(), frames, TopK(15))[0], strict=True
    ):
        assert torch.equal(ours[0].tokens, theirs[0].tokens)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 8), st.integers(1, 5), st.data())
def test_any_set_of_selected_tokens_equals_a_mix_of_two_dense_passes(
    rows: int, cols: int, side: int, data: st.DataObject
) -> None:
    """One block: selected tokens see new keys at selected places and old keys elsewhere.

    Not on a single column: there torch 2.15 resizes timm's position encoding wrongly (antialias, channels last).
    """
    chosen = sorted(data.draw(st.sets(st.integers(0, rows * cols - 1))))
    vit = VisionTransformerSAM(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, window_size=side, use_rel_pos=True, neck_chans=0
    )
    vit.neck = nn.Identity()
    randomise(vit)
    frames = clip(2, 4 * rows, 4 * cols, changing=1.0)
    mixed = frames[0, 0].clone()
    for i in chosen:
        y, x = 4 * (i // cols), 4 * (i % cols)
        mixed[:, y : y + 4, x : x + 4] = frames[1, 0, :, y : y + 4, x : x + 4]
    updates, _ = run(vit, Rows(), frames, lambda gates: [torch.tensor(chosen, dtype=torch.long)])
    expected = dense_tokens(vit, mixed).flatten(0, 1)
    first, second = (update.tokens.flatten(0, 1) for (update,) in updates)
    others = [i for i in range(rows * cols) if i not in chosen]
    torch.testing.assert_close(second[chosen], expected[chosen], rtol=1e-4, atol=1e-5)
    assert torch.equal(second[others], first[others])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.data())
def test_queries_fill_tiles_of_their_windows(
    rows: int, cols: int, side: int, static: bool, data: st.DataObject
) -> None:
    windows = windows_of((rows, cols), side, torch.device("cpu"))
    chosen = data.draw(st.sets(st.integers(0, rows * cols - 1), min_size=1))
    index = windows.token[torch.tensor(sorted(windows.place[i] for i in chosen))]
    queries = Queries.of(index, (rows, cols), side, static=static)
    tiles = queries.tiles
    assert tiles is not None and torch.equal(queries.cached, windows.place[index])
    of_tile = torch.arange(windows.count) if tiles.window is None else tiles.window
    assert len(of_tile) == tiles.count and len(tiles.source) == tiles.count * tiles.size
    assert torch.equal(of_tile[tiles.place // tiles.size], windows.window[index])
    assert torch.equal(tiles.source[tiles.place], torch.arange(len(index)))
    held = torch.bincount(windows.window[index])
    needed = int((-(-held // tiles.size)).sum())
    most = most_tiles(len(index), windows.count, windows.slots)
    assert tiles.count == (most if static else needed) and needed <= most


@pytest.mark.parametrize(("make", "size"), [(sam, 40), (plain, 24)])
@pytest.mark.parametrize("selector", [TopK(9), Threshold(1e9), EVERYTHING])
@pytest.mark.parametrize("gate", ["patches", "embedding"])
def test_counts_are_what_torch_counts(make: Callable[[], nn.Module], size: int, selector: Select, gate: str) -> None:
    eventful = eventify(make(), Rows(gate), selector)
    state = eventful.init_state()
    for frame in clip(2, size, size):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            (update,) = eventful.step(frame, state)
        counts = update.macs
        assert counts.products == counter.get_total_flops() // 2
        compared = frame.numel() if gate == "patches" else 24 * update.work.numel()
        assert counts.gate == (0 if update.flush else compared)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize(("make", "size"), [(sam, 40), (plain, 24)])
def test_other_precisions(dtype: torch.dtype, limit: float, make: Callable[[], nn.Module], size: int) -> None:
    """As far from float64 as the precision is; frames may be of any floating type."""
    frames = clip(3, size, size)
    updates, state = run(make().to(dtype), Rows(), frames, EVERYTHING)
    assert updates[-1][0].tokens.dtype == dtype
    assert {t.dtype for t in state.tensors()} == {dtype, torch.int32}
    exact = dense_tokens(make().double(), frames[-1, 0].to(dtype).double())
    assert error(updates[-1][0].tokens.double(), exact) < limit


@pytest.mark.parametrize(("make", "size"), [(sam, 40), (plain, 24)])
@pytest.mark.parametrize("rule", [Rows(), Rows("embedding"), Paper(), Paper("qk"), Paper("tokenwise"), Dense()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make: Callable[[], nn.Module], size: int, rule: Any, dtype: torch.dtype) -> None:
    """The error against float32 is that of the dense network, and a few tokens can be selected."""
    vit, frames = make(), clip(4, size, size)
    exact = dense_tokens(vit, frames[1, 0])
    with torch.autocast("cpu", dtype):
        own = error(dense_tokens(vit, frames[1, 0]).float(), exact)
        updates, _ = run(vit, rule, frames[:2], EVERYTHING)
        few, state = run(vit, rule, frames, TopK(9))
    assert error(updates[1][0].tokens, exact) < 2 * own
    assert all(update.tokens.isfinite().all() for (update,) in few)
    if isinstance(rule, Rows):
        assert {cache.dtype for cache in state.streams[0].caches} == {dtype}  # type: ignore[union-attr]
    eventful = eventify(vit, rule, TopK(9))
    eventful.step(frames[0], state)  # and goes on without


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_caches(dtype: Literal["float16", "bfloat16"], limit: float) -> None:
    vit, frames = sam(), clip(6)
    exact, whole = run(vit, Rows(), frames, TopK(20))
    halved, state = run(vit, Rows(cache_dtype=dtype), frames, TopK(20))
    assert {t.dtype for t in state.streams[0].caches} == {getattr(torch, dtype)}
    caches = sum(t.nbytes for t in whole.streams[0].caches)
    assert state.nbytes == whole.nbytes - caches // 2
    for (ours,), (theirs,) in zip(halved, exact, strict=True):
        assert ours.tokens.dtype == torch.float32 and torch.equal(ours.changed, theirs.changed)
        assert 0 < error(ours.tokens, theirs.tokens) < limit


class Waits(TorchDispatchMode):
    """Notes the operators for which a host has to wait for its device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "lift_fresh", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name.startswith(("unique", "_unique")) or name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("selector", [TopK(9), Selector(LargestError(age_power=0.5), 30), TopFraction(0.3)])
@pytest.mark.parametrize("make", [sam, plain])
def test_the_host_never_waits_for_the_device(selector: Select, make: Callable[[], nn.Module]) -> None:
    frames = clip(4, 24, 24, streams=2)
    free, exact = (eventify(make(), Rows(static=static), selector) for static in (True, False))
    state, other = free.init_state(2), exact.init_state(2)
    for frame in frames:
        with Waits() as waits:
            updates = free.step(frame, state)
        assert waits.seen == []
        for ours, theirs in zip(updates, exact.step(frame, other), strict=True):
            torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours.changed, theirs.changed)


def test_waiting_would_be_noticed() -> None:
    with Waits() as waits:
        x = torch.arange(4)
        x[x > 1], int(x.sum()), x.unique(), (x > 1).nonzero(), torch.tensor(3)
    assert {"index", "_local_scalar_dense", "nonzero", "lift_fresh"} < set(waits.seen) and len(waits.seen) == 5


def test_static_shapes_depend_on_the_number_of_tokens_alone() -> None:
    counts = []
    for chosen in ([0, 1, 2, 3], [0, 9, 50, 99]):
        updates, _ = run(sam(), Rows(static=True), clip(2), lambda gates, chosen=chosen: [torch.tensor(chosen)])
        counts.append(updates[1][0].macs)
    assert counts[0] == counts[1]


def test_long_query_lists_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, frames = sam(), clip(2)
    whole, _ = run(vit, Rows(), frames, EVERYTHING)
    monkeypatch.setattr("eventful_det.gating.rows._BIAS_ELEMENTS", 1500)  # 7 queries at a time
    monkeypatch.setattr("eventful_det.gating.windows._LEAST_TILE", 4)
    monkeypatch.setattr("eventful_det.gating.rows._CACHE_ELEMENTS", 1600)  # 2 tiles at a time
    pieces, _ = run(vit, Rows(), frames, EVERYTHING)
    assert error(pieces[1][0].tokens, whole[1][0].tokens) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}])
def test_class_and_register_tokens_are_handed_on(changes: dict[str, Any]) -> None:
    vit, frames = plain(**changes), clip(3, 24, 24)
    count = 1 + changes.get("reg_tokens", 0)
    for rule in (Rows(), Paper(), Dense()):
        updates, _ = run(vit, rule, frames, EVERYTHING)
        for (update,), frame in zip(updates, frames, strict=True):
            assert update.prefix is not None and update.prefix.shape == (count, 24)
            assert error(update.prefix, vit.forward_features(frame)[0, :count]) < 1e-5
    (first,), (few,), (still,) = run(vit, Rows(), [frames[0], frames[1], frames[1]], Threshold(0.0))[0]
    assert not torch.equal(first.prefix, few.prefix) and torch.equal(few.prefix, still.prefix)  # type: ignore[arg-type]
    assert run(sam(), Rows(), clip(1))[0][0][0].prefix is None


def test_saliency_is_an_argument_of_the_step() -> None:
    eventful, frames = (
        eventify(sam(), selector=Selector(LargestError(saliency=100.0), 4)),
        clip(2, streams=2, changing=1),
    )
    state, saliency = eventful.init_state(2), torch.zeros(100)
    saliency[[3, 50, 51, 99]] = 1.0
    eventful.step(frames[0], state, saliency=[saliency, None])
    updates = eventful.step(frames[1], state, saliency=[saliency, None])
    assert updates[0].changed.sort().values.tolist() == [3, 50, 51, 99] != updates[1].changed.sort().values.tolist()


def test_user_errors() -> None:
    with pytest.raises(UserError, match="'patches' or 'embedding', got 'pixels'"):
        Rows(gate="pixels")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="renew_every"):
        Rows(renew_every=-1)
    with pytest.raises(UserError, match="got 'int8'"):
        Rows(cache_dtype="int8")  # type: ignore[arg-type]
