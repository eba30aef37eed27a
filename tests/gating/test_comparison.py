"""The gate on a still scene: noise and light are no changes, objects are, whatever the normalisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import sam
from torch import Tensor

from eventful_det.gating.comparison import adopt_light, compare
from eventful_det.gating.convert import EventfulViT, eventify
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.selector import Focus, GateInput, Selector
from eventful_det.gating.state import State

SELECTOR = Selector(Focus(0.5, floor=0.25, block=1, renew=0))
PATCH, SIDE = 8, 96  # of patches and frames in pixels
TOKENS = (SIDE // PATCH) ** 2


def scene(seed: int = 0) -> Tensor:
    """A picture `(3, h, w)` in grey levels, smooth as pictures are."""
    coarse = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 150 + 40
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[0].clamp(20, 220)


def noisy(picture: Tensor, level: float, seed: int) -> Tensor:
    return picture + level * torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


def patches(picture: Tensor, scale: float = 1.0) -> Tensor:
    """`(N, P)`, normalised to [-1, 1], times `scale`."""
    cut = picture.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).permute(1, 3, 0, 2, 4)
    return scale * (cut.reshape(TOKENS, -1) / 127.5 - 1)


def selected(now: Tensor, reference: Tensor, scale: float = 1.0) -> Tensor:
    """Flat indices of the tokens that a policy with a low threshold wants."""
    error, noise = compare(patches(now, scale), patches(reference, scale), channels=3, unit=1 / scale)
    (index,) = SELECTOR([GateInput(error, torch.ones(TOKENS), 1, (SIDE // PATCH,) * 2, torch.zeros(TOKENS), 0, noise)])
    return index


def gain(picture: Tensor) -> Tensor:
    return 1.2 * picture - 10


def warmer(picture: Tensor) -> Tensor:
    return picture * torch.tensor([1.12, 1.0, 0.88])[:, None, None]


def brighter(picture: Tensor) -> Tensor:
    return picture + 12


@pytest.mark.parametrize("scale", [1.0, 0.5 / 0.226])
@pytest.mark.parametrize("level", [9, 12, 20])
def test_noise_is_no_change_and_an_object_is(level: float, scale: float) -> None:
    before, now = noisy(scene(), level, 1), noisy(scene(), level, 2)
    assert len(selected(now, before, scale)) <= 0.1 * TOKENS
    now[:, 24:48, 32:56] += 70  # 3 x 3 tokens
    expected = {12 * y + x for y in range(3, 6) for x in range(4, 7)}
    assert expected <= set(selected(now, before, scale).tolist())
    assert len(selected(now, before, scale)) <= 9 + 0.1 * TOKENS


@pytest.mark.parametrize("light", [brighter, gain, warmer])
@pytest.mark.parametrize("level", [0, 12])
def test_light_is_no_change_and_an_object_is(light: Callable[[Tensor], Tensor], level: float) -> None:
    before, now = noisy(scene(), level, 1), noisy(light(scene()), level, 2)
    assert len(selected(now, before)) <= 0.1 * TOKENS
    now[:, 24:48, 32:56] = 250
    assert {12 * y + x for y in range(3, 6) for x in range(4, 7)} <= set(selected(now, before).tolist())


def test_light_is_taken_over_exactly_or_not_at_all() -> None:
    before, other = patches(scene()), patches(scene(seed=1))
    reference = before.clone()
    adopt_light(1.3 * before - 0.2, reference, 3)
    torch.testing.assert_close(reference, 1.3 * before - 0.2, rtol=1e-4, atol=1e-4)
    for now in (before, other):  # a still frame, and another scene
        reference = before.clone()
        adopt_light(now, reference, 3)
        assert torch.equal(reference, before)


def test_padding_has_no_say() -> None:
    """Tokens without structure, here half of them, tell nothing about the noise of the others."""
    before, now = (patches(noisy(scene(), 12, seed)) for seed in (1, 2))
    before[: TOKENS // 2] = now[: TOKENS // 2] = 0.0
    _, noise = compare(now, before, channels=3)
    _, whole = compare(patches(noisy(scene(), 12, 2)), patches(noisy(scene(), 12, 1)), channels=3)
    assert noise is not None and whole is not None
    assert float(noise[-1]) == pytest.approx(float(whole[-1]), rel=0.1)


def test_a_saved_state_continues_equally_under_noise_and_light(tmp_path: object) -> None:
    network: EventfulViT[RowsState] = eventify(sam(), Rows(), SELECTOR)
    frames = [
        (noisy(light(scene()), 9, i) / 127.5 - 1)[None, :, :40, :40] for i, light in enumerate([gain, warmer] * 3)
    ]
    state = network.init_state()
    for frame in frames[:3]:
        network.step(frame, state)
    path = f"{tmp_path}/state.pt"
    state.save(path)
    restored = State.load(path)
    for frame in frames[3:]:
        (ours,), (theirs,) = network.step(frame, state), network.step(frame, restored)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.changed, theirs.changed)
