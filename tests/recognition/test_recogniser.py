from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import moving_clip, small_config, small_recogniser
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import EVERYTHING, RandomK, TopK
from eventful_det.gating.state import State
from eventful_det.recognition.clips import recognise
from eventful_det.recognition.data.views import normalise
from eventful_det.recognition.recogniser import Recogniser


def tubelets(count: int, seed: int = 0) -> list[Tensor]:
    """`(2, 3, 16, 24)` each, RGB in [0, 1]."""
    return list((moving_clip(2 * count, 16, 24, seed).float() / 255).unflatten(0, (count, 2)))


def features(recogniser: Recogniser, rule: Rule[Any], selector: Any, count: int = 6) -> Tensor:
    state = recogniser.init_state()
    steps = [recogniser.step([t], state, rule=rule, selector=selector) for t in tubelets(count)]
    return torch.stack([step.feature for (step,) in steps])


@pytest.mark.parametrize("rule", [Rows(), Rows(gate="embedding"), Paper(), Paper("qk"), Paper(keep=1), Dense()])
def test_with_every_token_each_rule_is_the_dense_network(rule: Rule[Any]) -> None:
    recogniser = small_recogniser()
    views = torch.cat(tubelets(6))[None]  # (1, 12, 3, 16, 24)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recogniser.config.mean, recogniser.config.std))
    dense = recogniser.spatial((views - mean) / std)[0]
    torch.testing.assert_close(features(recogniser, rule, EVERYTHING), dense, rtol=1e-5, atol=1e-5)


def test_a_tubelet_is_a_frame_of_six_channels() -> None:
    recogniser = small_recogniser()
    view = torch.randn(1, 6, 3, 16, 24)
    ours = recogniser.embedding(recogniser.tubelets(view)[0])  # (3, D, 2, 3)
    theirs = recogniser.embedding.conv(view.transpose(1, 2))[0]  # (D, 3, 2, 3)
    torch.testing.assert_close(ours, theirs.transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert recogniser.embedding.weight.data_ptr() == recogniser.embedding.conv.weight.data_ptr()


def test_the_class_token_is_recomputed_whenever_a_token_is() -> None:
    recogniser = small_recogniser()
    one = features(recogniser, Rows(), RandomK(1))
    assert all(not torch.equal(a, b) for a, b in zip(one, one[1:], strict=False))
    kept, gated = (features(recogniser, Paper(keep=keep), TopK(1)) for keep in (1, 0))
    assert not torch.equal(kept, gated)


def test_the_window_slides_and_the_spatial_state_goes_on() -> None:
    recogniser, state = small_recogniser(), small_recogniser().init_state()
    seen: list[Tensor] = []
    for i, tubelet in enumerate(tubelets(7)):
        (step,) = recogniser.step([tubelet], state, selector=TopK(2))
        assert step.cost.flush == (i == 0)
        assert step.cost.recomputed == (6 if i == 0 else 2)
        seen.append(step.feature)
        window = seen[-3:] + [seen[-1]] * (3 - len(seen[-3:]))
        expected = recogniser.temporal(torch.stack(window)[None])
        torch.testing.assert_close(step.logits["noun"], expected["noun"][0], rtol=1e-5, atol=1e-6)
        assert float(step.probabilities["verb"].sum()) == pytest.approx(1, abs=1e-5)
    (step,) = recogniser.step([tubelets(1)[0]], state, flush=True)
    alone = recogniser.temporal(step.feature.repeat(3, 1)[None])["verb"][0]
    torch.testing.assert_close(step.logits["verb"], alone, rtol=1e-5, atol=1e-6)


def test_streams_of_a_step_do_not_disturb_each_other() -> None:
    recogniser = small_recogniser()
    together, apart = recogniser.init_state(2), [recogniser.init_state(), recogniser.init_state()]
    for pair in zip(tubelets(5), tubelets(5, seed=1), strict=True):
        steps = recogniser.step(pair, together, selector=TopK(3))
        for i in range(2):
            (alone,) = recogniser.step([pair[i]], apart[i], selector=TopK(3))
            torch.testing.assert_close(steps[i].logits["verb"], alone.logits["verb"], rtol=1e-4, atol=1e-5)


def test_state_can_be_kept_and_does_not_grow(tmp_path: Path) -> None:
    recogniser, state = small_recogniser(), small_recogniser().init_state()
    sizes = set()
    for tubelet in tubelets(8):
        recogniser.step([tubelet], state)
        sizes.add(state.nbytes)
    assert len(sizes) == 1
    state.save(tmp_path / "state.pt")
    loaded = State.load(tmp_path / "state.pt")
    (tubelet,) = tubelets(1, seed=3)
    (a,), (b,) = recogniser.step([tubelet], state), recogniser.step([tubelet], loaded)
    assert torch.equal(a.logits["verb"], b.logits["verb"])


def test_copies_are_independent() -> None:
    recogniser = small_recogniser()
    before = features(recogniser, Rows(), EVERYTHING)
    for copied in (copy.deepcopy(recogniser), pickle.loads(pickle.dumps(recogniser))):
        for parameter in copied.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        assert torch.equal(features(recogniser, Rows(), EVERYTHING), before)
        assert not torch.equal(features(copied, Rows(), EVERYTHING), before)
    half = copy.deepcopy(recogniser).to(torch.bfloat16)
    state = half.init_state()
    for tubelet in tubelets(3):
        (step,) = half.step([tubelet.bfloat16()], state, selector=TopK(2))
    assert step.logits["verb"].isfinite().all()


def test_cost_is_what_the_parts_say() -> None:
    recogniser, state = small_recogniser(), small_recogniser().init_state()
    (flush,) = recogniser.step([tubelets(1)[0]], state, rule=Dense())
    assert flush.cost.macs == flush.cost.dense
    d, n, weights = 32, 6, 4 * 32**2 + 2 * 32 * 48
    assert flush.cost.macs["backbone"] == n * d * 384 + 2 * ((n + 1) * weights + 2 * (n + 1) ** 2 * d)
    assert flush.cost.macs["temporal"] == 4 * (4 * d**2 + 2 * d * 40) + 2 * 4**2 * d
    assert flush.cost.macs["heads"] == 5 * d


def test_views_share_tubelets_and_dense_outputs_stay() -> None:
    """Starts of 0, 4 and 8 frames are whole tubelets of 2 frames at a distance of 2."""
    recogniser, clip = small_recogniser(), moving_clip(20)
    apart = recognise(recogniser, clip, rule=Dense(), shared=False)
    shared = recognise(recogniser, clip, rule=Dense())
    assert (apart.tubelets, shared.tubelets) == (2 * 3 * 3, 2 * 5)
    torch.testing.assert_close(shared.features, apart.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.logits, apart.logits, rtol=1e-5, atol=1e-5)
    assert shared.cost.macs["backbone"] * 9 == apart.cost.macs["backbone"] * 5
    assert shared.cost.macs["temporal"] == apart.cost.macs["temporal"]


def test_a_gap_between_views_begins_anew() -> None:
    recogniser, clip = small_recogniser(temporal_views=2), moving_clip(48)
    result = recognise(recogniser, clip, selector=TopK(1))  # two views of three tubelets, far apart
    assert result.tubelets == 12
    assert result.cost.recomputed == 2 * 2 * (6 + 1 + 1)


def test_held_tubelets_cost_nothing() -> None:
    recogniser, clip = small_recogniser(temporal_views=1), moving_clip(12)
    held = recognise(recogniser, clip, rule=Dense(), hold=2)
    dense = recognise(recogniser, clip, rule=Dense())
    assert held.cost.macs["backbone"] * 3 == dense.cost.macs["backbone"] * 2
    assert torch.equal(held.features[:, 1], held.features[:, 0])
    torch.testing.assert_close(held.features[:, 2], dense.features[:, 2])


def test_a_clip_averages_logits_before_the_softmax() -> None:
    recogniser, clip = small_recogniser(), moving_clip(20)
    result = recognise(recogniser, clip, rule=Dense(), shared=False)
    each = recogniser.temporal(result.features)["verb"]
    torch.testing.assert_close(result.probabilities["verb"], each.mean(0).softmax(-1))


def test_training_reaches_every_parameter() -> None:
    recogniser = small_recogniser().train()
    view = normalise(moving_clip(6, 16, 24), recogniser.config)[None]
    torch.stack([values.square().sum() for values in recogniser(view).values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in recogniser.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": 5}, "no whole number of tubelets"),
        ({"size": (16, 20)}, "do not divide into tubelets"),
        ({"heads": 3}, "attention heads"),
        ({"std": (0.0, 1.0, 1.0)}, "above 0"),
        ({"temporal_views": 0}, "of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recogniser(small_config(**changes))


@pytest.mark.parametrize(
    "tubelet", [torch.rand(3, 3, 16, 24), torch.rand(2, 1, 16, 24), torch.zeros(2, 3, 16, 24, dtype=torch.uint8)]
)
def test_a_tubelet_of_another_kind_is_refused(tubelet: Tensor) -> None:
    recogniser = small_recogniser()
    with pytest.raises(UserError, match="got a tubelet of"):
        recogniser.step([tubelet], recogniser.init_state())


def test_other_faults_are_said() -> None:
    recogniser = small_recogniser()
    with pytest.raises(UserError, match="got 2 frames for a state of 1 streams"):
        recogniser.step(tubelets(2), recogniser.init_state())
    with pytest.raises(UserError, match="takes 3"):
        recogniser.temporal(torch.zeros(1, 4, 32))
    with pytest.raises(UserError, match="a clip is"):
        recognise(recogniser, torch.zeros(4, 3, 16, 24))
    with pytest.raises(UserError, match="square tubelets"):
        odd = small_recogniser(tubelet=(2, 8, 4), position_grid=(2, 6))
        odd.step(tubelets(1), odd.init_state())
