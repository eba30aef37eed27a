"""The windows rule: dense when everything is selected, static numbers of windows, and exact counts."""

from __future__ import annotations

import pytest
import torch
from networks import clip, dense_tokens, error, plain, run, sam
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import EVERYTHING, GateInput, RandomK, Threshold, TopK
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.gating.windows import windows_of

NETWORKS = {
    "padded": (sam, 40, 40),
    "divided": (sam, 32, 64),
    "resized tables": (sam, 28, 52),
    "smaller than a window": (sam, 8, 12),
    "windows alone": (lambda: sam(global_attn_indexes=()), 40, 24),
    "no relative positions": (lambda: sam(use_rel_pos=False), 40, 40),
    "layer scale": (lambda: sam(init_values=0.5), 40, 40),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_selected_equals_dense(name: str) -> None:
    make, height, width = NETWORKS[name]
    vit, frames = make(), clip(3, height, width)
    updates, _ = run(vit, Windows(), frames, EVERYTHING)
    for (update,), frame in zip(updates, frames, strict=True):
        assert error(update.tokens, dense_tokens(vit, frame[0])) < 1e-5
        assert update.changed.sort().values.tolist() == list(range(len(update.work)))


def test_windowed_blocks_are_dense_on_the_chosen_windows() -> None:
    """Without global blocks windows do not know each other: the chosen ones equal the dense network on any frame."""
    vit, frames = sam(global_attn_indexes=()), clip(4)
    updates, _ = run(vit, Windows((3,)), frames, RandomK(30))
    for (update,), frame in zip(updates, frames, strict=True):
        dense = dense_tokens(vit, frame[0]).flatten(0, 1)
        tokens = update.tokens.flatten(0, 1)
        assert error(tokens[update.changed], dense[update.changed]) < 1e-5
    assert error(tokens, dense) > 1e-2, "the others are of frames before"


def test_few_windows_approach_dense_when_the_frame_stands_still() -> None:
    vit, frames = sam(), clip(2)
    still = torch.cat([frames[:1], *[frames[1:]] * 12])
    updates, _ = run(vit, Windows((2,)), still, RandomK(20))
    dense = dense_tokens(vit, frames[1, 0])
    errors = [error(update.tokens, dense) for (update,) in updates]
    assert errors[-1] < 0.6 * errors[1]


def test_numbers_of_windows() -> None:
    rule = Windows((0.25, 0.5, 3))
    assert rule.sizes(45) == (3, 11, 22, 45)
    assert [rule.windows_for(r, 720, 45) for r in (0, 1, 55, 57, 180, 190, 360, 369, 720)] == [
        *(0, 3, 3, 3, 11, 11, 22, 45, 45),
    ]
    with pytest.raises(UserError, match="buckets"):
        Windows((0.5, 1.5))
    with pytest.raises(UserError, match="buckets"):
        Windows((0,))


def test_the_first_tokens_win_and_the_stalest_windows_fill_up() -> None:
    vit, frames = sam(), clip(3, 32, 64, changing=1.0)  # 8 x 16 tokens, 2 x 4 windows
    eventful = eventify(vit, Windows((2, 4)))
    state = eventful.init_state()
    window = windows_of((8, 16), 4, torch.device("cpu")).window
    order = [window.eq(w).nonzero().squeeze(1) for w in range(8)]

    def steps(*windows: int) -> set[int]:
        def select(gates: list[GateInput]) -> list[Tensor]:
            return [torch.cat([order[w] for w in windows])] * len(gates)

        (update,) = eventful.step(frames[1], state, selector=select)
        assert update.macs.gate == 128 * 48
        return set(window[update.changed].tolist())

    eventful.step(frames[0], state)
    assert steps(6, 3) == {3, 6}
    assert steps(7, 3, 6) == {0, 3, 6, 7}, "three fill up to four, by the stalest"
    assert steps(1, 2, 4) == {1, 2, 4, 5}


@pytest.mark.parametrize("make", [sam, lambda: sam(use_rel_pos=False), lambda: sam(global_attn_indexes=())])
def test_counts_equal_those_of_torch(make: type) -> None:
    vit = make()
    for frames in (clip(2, 32, 64), clip(2)):
        eventful = eventify(vit, Windows((3,)), TopK(20))
        state = eventful.init_state()
        for frame in frames:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted
                (update,) = eventful.step(frame, state)
            assert counter.get_total_flops() == 2 * update.macs.products


def test_still_frames_cost_nothing_but_the_gate() -> None:
    frames = clip(2, changing=0.0)
    updates, _ = run(sam(), Windows(), frames, Threshold(0.5))
    assert updates[1][0].macs.products == 0 and not len(updates[1][0].changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_equals_its_dense_network(dtype: torch.dtype) -> None:
    vit, frames = sam(), clip(3)
    exact = dense_tokens(vit, frames[2, 0])
    for kind in ("module", "autocast"):
        network = sam().to(dtype) if kind == "module" else vit
        with torch.autocast("cpu", dtype, enabled=kind == "autocast"):
            (dense,) = run(network, Dense(), frames, EVERYTHING)[0][2]
            (ours,) = run(network, Windows(), frames, EVERYTHING)[0][2]
        assert error(ours.tokens.float(), exact) < 2 * error(dense.tokens.float(), exact)


def test_networks_without_windows_are_refused() -> None:
    for vit in (plain(), sam(window_size=0)):
        with pytest.raises(UserError, match="rows rule"):
            run(vit, Windows(), clip(1, 24, 24))
