"""State: typed trees of tensors that can be measured, moved, sliced, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import clip, plain, sam
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import Select, Threshold, TopK
from eventful_det.gating.state import State, TensorTree

RULES: list[tuple[Rule[Any], Select]] = [
    (Rows(), TopK(8)),
    (Rows("embedding", renew_every=3), Threshold(0.5)),
    (Paper(), TopK(8)),
    (Paper("qk"), TopK(8)),
    (Paper("tokenwise"), Threshold(0.5)),
    (Paper(pool=2, gate_before_norm=True), TopK(8)),
    (Dense(), TopK(8)),
]


@dataclass
class Leaf(TensorTree):
    value: Tensor
    number: int


@dataclass
class Tree(TensorTree):
    leaf: Leaf | None
    several: list[Tensor]
    pair: tuple[int, int]
    flag: bool
    name: str


numbers = st.integers(-(2**40), 2**40)
tensors = st.lists(st.integers(-5, 5), max_size=4).map(torch.tensor) | st.just(torch.rand(2, 3))
trees = st.builds(
    Tree,
    st.none() | st.builds(Leaf, tensors, numbers),
    st.lists(tensors, max_size=3),
    st.tuples(numbers, numbers),
    st.booleans(),
    st.text(),
)


def same(a: TensorTree, b: TensorTree) -> bool:
    leaves = list(a.tensors()), list(b.tensors())
    equal = all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*leaves, strict=True))
    strip = lambda tree: str(tree.map(lambda _: torch.zeros(0)))  # noqa: E731
    return equal and strip(a) == strip(b)


@settings(max_examples=50, deadline=None)
@given(trees)
def test_any_tree_survives_plain_and_clone(tree: Tree) -> None:
    restored = TensorTree.from_plain(tree.plain())
    assert isinstance(restored, Tree) and same(restored, tree)
    assert isinstance(restored.pair, tuple) and isinstance(restored.several, list)
    clone = tree.clone()
    assert same(clone, tree)
    for tensor in clone.tensors():
        tensor.add_(1)
    assert same(restored, tree)
    assert tree.nbytes == sum(t.numel() * t.element_size() for t in tree.tensors())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.none() | trees, max_size=3))
def test_any_state_survives_a_file(streams: list[Tree | None]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        State(streams).save(f"{directory}/state.pt")
        assert same(State.load(f"{directory}/state.pt"), State(streams))


@pytest.mark.parametrize(("rule", "selector"), RULES)
def test_a_saved_stream_goes_on_bitwise(rule: Rule[Any], selector: Select, tmp_path: Path) -> None:
    frames = clip(6, streams=2)
    eventful = eventify(sam(), rule, selector)
    state = eventful.init_state(2)
    for frame in frames[:3]:
        eventful.step(frame, state)
    state.save(tmp_path / "state.pt")
    loaded, cloned = State.load(tmp_path / "state.pt"), state.clone()
    for frame in frames[3:]:
        expected = eventful.step(frame, state)
        for other in (loaded, cloned):
            for ours, theirs in zip(eventful.step(frame, other), expected, strict=True):
                assert torch.equal(ours.tokens, theirs.tokens) and not ours.flush
    assert same(loaded, state)


@pytest.mark.parametrize(("rule", "selector"), RULES)
def test_select_shares_and_reset_forgets(rule: Rule[Any], selector: Select) -> None:
    frames = clip(3, streams=3)
    eventful = eventify(sam(), rule, selector)
    state, whole = eventful.init_state(3), eventful.init_state(3)
    eventful.step(frames[0], state)
    eventful.step(frames[0], whole)
    picked = state.select([2, 0])
    ours = eventful.step(frames[1, [2, 0]], picked)
    theirs = eventful.step(frames[1], whole)
    assert torch.equal(ours[0].tokens, theirs[2].tokens) and torch.equal(ours[1].tokens, theirs[0].tokens)
    assert same(state.select([0, 2]), whole.select([0, 2]))  # stepped through the selection
    state.reset([1])
    assert [stream is None for stream in state.streams] == [False, True, False]
    state.reset()
    assert state.nbytes == 0 and len(state) == 3
    assert all(update.flush for update in eventful.step(frames[2], state))


def test_to_moves_and_casts_but_leaves_integers() -> None:
    eventful = eventify(plain(), selector=TopK(4))
    state = eventful.init_state(2)
    eventful.step(list(clip(1, 24, 24)[0]) * 2, state)
    half = state.to(dtype=torch.float16)
    assert {t.dtype for t in half.tensors()} == {torch.float16, torch.int32}
    assert half.nbytes < state.nbytes
    assert {t.device.type for t in state.to("meta").tensors()} == {"meta"}
    assert same(state.to("cpu"), state)
    state.reset([0])
    assert state.to("cpu").streams[0] is None


@pytest.mark.parametrize(("rule", "selector"), RULES)
def test_state_is_no_part_of_the_module(rule: Rule[Any], selector: Select) -> None:
    vit = sam()
    eventful = eventify(vit, rule, selector)
    keys = list(eventful.state_dict())
    state = eventful.init_state()
    eventful.step(clip(1)[0], state)
    assert list(eventful.state_dict()) == keys == list(vit.state_dict())
    assert not list(eventful.buffers())
    shared = {t.data_ptr() for t in vit.parameters()} & {t.data_ptr() for t in state.tensors()}
    assert not shared


def test_files_that_are_no_state(tmp_path: Path) -> None:
    torch.save({"format": "other", "state": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "list.pt", "text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            State.load(tmp_path / name)
    unknown = {"kind": "State", "values": {"streams": {"kind": "Strange", "values": {}}}}
    torch.save({"format": "eventful-state/1", "state": unknown}, tmp_path / "unknown.pt")
    with pytest.raises(UserError, match="Strange"):
        State.load(tmp_path / "unknown.pt")
    wrong = {"kind": "State", "values": {"flows": {"kind": "list", "values": []}}}
    torch.save({"format": "eventful-state/1", "state": wrong}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="wrong.pt"):
        State.load(tmp_path / "wrong.pt")
