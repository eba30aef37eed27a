"""Every family of networks: exact, still when the frame is, streams apart, counted, saved and restored."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFUSED, Family, Refused, refused_table, table
from networks import clip, error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.errors import UserError
from eventful_det.gating.convert import EventfulViT, eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import RowsCosts
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.selector import EVERYTHING, TopK
from eventful_det.gating.state import State

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
SIZES = ((32, 32), (48, 48), (32, 48))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.name}: {f.features}")


@pytest.fixture
def network(family: Family) -> nn.Module:
    return family.network()


def frames(height: int = 32, width: int = 32, steps: int = 4, seed: int = 0) -> list[Tensor]:
    return list(clip(steps, height, width, seed=seed))


@every_family
@pytest.mark.parametrize("rule", [Rows(), Rows("embedding"), Dense()], ids=["rows", "embedding", "dense"])
def test_equal_to_dense_when_everything_is_selected(family: Family, network: nn.Module, rule: Rows | Dense) -> None:
    eventful = eventify(network, rule, EVERYTHING)
    for size in SIZES[: 2 if family.square else 3]:
        state = eventful.init_state()
        for frame in frames(*size, steps=2):
            (update,) = eventful.step(frame, state)
            assert error(update.tokens, family.dense(network, frame)) < 1e-5


@every_family
def test_parameters_are_shared(family: Family, network: nn.Module) -> None:
    eventful = eventify(network)
    assert list(eventful.state_dict()) == list(network.state_dict())
    own = dict(eventful.named_parameters())
    assert all(own[name] is parameter for name, parameter in network.named_parameters())
    twin, (frame,) = copy.deepcopy(eventful), frames(steps=1)
    for parameter in twin.parameters():
        parameter.data.mul_(0.9)
    (ours,), (theirs,) = (one.step(frame, one.init_state()) for one in (eventful, twin))
    assert error(ours.tokens, family.dense(network, frame)) < 1e-5
    assert error(theirs.tokens, family.dense(twin.dense, frame)) < 1e-5 < error(ours.tokens, theirs.tokens)


@every_family
def test_an_identical_frame_changes_nothing(family: Family, network: nn.Module) -> None:
    eventful = eventify(network)
    state, (frame,) = eventful.init_state(), frames(steps=1)
    (first,) = eventful.step(frame, state)
    (again,) = eventful.step(frame, state)
    assert not len(again.changed) and torch.equal(again.tokens, first.tokens) and again.macs.products == 0
    if first.prefix is not None:
        assert again.prefix is not None and torch.equal(again.prefix, first.prefix)


@every_family
def test_a_gated_step_uses_what_is_cached(family: Family, network: nn.Module) -> None:
    """Tokens that are not selected keep their output; those that are come close to dense, prefix tokens too."""
    eventful = eventify(network, selector=TopK(9))
    state, (first, second) = eventful.init_state(), frames(steps=2)
    (before,) = eventful.step(first, state)
    (after,) = eventful.step(second, state)
    (dense,) = eventify(network, Dense()).step(second, State([None]))
    kept = torch.ones(64, dtype=torch.bool).index_fill_(0, after.changed, False)
    ours, old, true = (update.tokens.flatten(0, 1) for update in (after, before, dense))
    assert len(after.changed) == 9 and torch.equal(ours[kept], old[kept])
    assert error(ours[~kept], true[~kept]) < 0.7 * error(old[~kept], true[~kept])
    if after.prefix is not None and before.prefix is not None:
        assert not torch.equal(after.prefix, before.prefix)


@every_family
def test_streams_are_isolated(family: Family, network: nn.Module) -> None:
    eventful = eventify(network, Rows(exact=True), TopK(9))
    together, alone = eventful.init_state(2), eventful.init_state()
    for ours, other in zip(frames(seed=1), frames(seed=2), strict=True):
        (update,) = eventful.step(ours, alone)
        assert torch.equal(eventful.step([ours[0], other[0]], together)[0].tokens, update.tokens)


@every_family
def test_a_saved_state_goes_on(family: Family, network: nn.Module, tmp_path: Path) -> None:
    eventful = eventify(network, selector=TopK(9))
    state = eventful.init_state()
    *past, last = frames()
    for frame in past:
        eventful.step(frame, state)
    state.save(tmp_path / "state.pt")
    restored: State[RowsState] = State.load(tmp_path / "state.pt")
    assert torch.equal(eventful.step(last, state)[0].tokens, eventful.step(last, restored)[0].tokens)


def counted(eventful: EventfulViT[RowsState], frame: Tensor, state: State[RowsState]) -> tuple[int, int, Tensor]:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (update,) = eventful.step(frame, state)
    return counter.get_total_flops() // 2, update.macs.products, update.changed


@every_family
@pytest.mark.parametrize("static", [False, True])
def test_counts(family: Family, network: nn.Module, static: bool) -> None:
    eventful = eventify(network, Rows(static=static), TopK(9))
    state, costs = eventful.init_state(), RowsCosts(eventful.spec.shape, static)
    for t, frame in enumerate(frames()):
        flops, macs, changed = counted(eventful, frame, state)
        assert flops == macs
        if t:
            gate = 64 * eventful.spec.shape.pixels
            assert int(costs.macs((8, 8), changed)[-1]) == macs + gate
    dense = eventify(network, Dense())
    flops, macs, _ = counted(dense, frame, State([None]))  # type: ignore[arg-type]
    assert flops == macs


@every_family
def test_autocast_and_bfloat16(family: Family, network: nn.Module) -> None:
    first, second = frames(steps=2)
    true = family.dense(network, second)
    eventful = eventify(network, selector=EVERYTHING)
    state = eventful.init_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        own = error(family.dense(network, second).float(), true)
        eventful.step(first, state)
        (update,) = eventful.step(second, state)
    assert error(update.tokens.float(), true) < 2 * own + 0.01
    network.to(torch.bfloat16)
    state = eventful.init_state()
    eventful.step(first.bfloat16(), state)
    (update,) = eventful.step(second.bfloat16(), state)
    assert error(update.tokens.float(), true) < 2 * own + 0.05


def test_the_table_of_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert table() in text and refused_table() in text


def test_frames_become_whole_regions() -> None:
    pytest.importorskip("transformers")
    network = next(family for family in FAMILIES if family.name == "LwDetrViTBackbone").network()
    eventful = eventify(network, selector=EVERYTHING)
    (frame,) = clip(1, 29, 35)
    padded = torch.nn.functional.pad(frame, (0, 5, 0, 3))
    assert eventful.spec.grid(29, 35) == (8, 10)
    expected = torch.cat([features[0].permute(1, 2, 0) for features in network(padded).feature_maps], -1)
    assert error(eventful.step(frame, eventful.init_state())[0].tokens, expected) < 1e-5


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.part)
def test_refusals_name_the_part(refused: Refused) -> None:
    with pytest.raises(UserError, match=re.escape(f"{refused.part} is not supported")):
        eventify(refused.network())


@every_family
def test_the_paper_rule_refuses_what_it_does_not_know(family: Family, network: nn.Module) -> None:
    eventful = eventify(network, Paper(), EVERYTHING)
    (frame,) = frames(steps=1)
    spec = eventful.spec
    if spec.rope is None and spec.regions == 1 and len(spec.outputs) == 1:
        (update,) = eventful.step(frame, eventful.init_state())
        assert error(update.tokens, family.dense(network, frame)) < 1e-5
    else:
        with pytest.raises(UserError, match="the paper's rule does not support a network with .*; use the rows rule"):
            eventful.step(frame, eventful.init_state())
