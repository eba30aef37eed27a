"""CUDA graphs of the windows rule: what can be said of them without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import clip, error, run, sam
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eventful_det.gating.selector import RandomK
from eventful_det.gating.whole_windows import cuda_graphs
from eventful_det.gating.whole_windows.cuda_graphs import Captured, CapturedWindows
from eventful_det.gating.whole_windows.rule import Windows

WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}


class Operators(TorchDispatchMode):
    """Every operator with the shapes of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else [result]
        shapes = [one.shape for one in results if isinstance(one, Tensor)]
        self.calls.append((func.overloadpacket.__name__, shapes))
        return result


@dataclass(frozen=True)
class Watched(Windows):
    """Notes the operators of each run of the network."""

    seen: list[tuple[int, list[Any]]] = field(default_factory=list, compare=False)

    def run(self, vit: Any, tables: Any, grid: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with Operators() as operators:
            result = super().run(vit, tables, grid, inputs)
        self.seen.append((len(inputs[1]), operators.calls))
        return result


@pytest.mark.parametrize("size", [(32, 64), (40, 40)], ids=["whole windows", "padded"])
def test_the_step_has_static_shapes_and_waits_for_nothing(size: tuple[int, int]) -> None:
    rule = Watched((2, 4))
    updates, _ = run(sam(), rule, clip(6, *size), RandomK(30))
    assert len({tuple(update.changed[:4].tolist()) for (update,) in updates[1:]}) > 1, "windows differ"
    by_count: dict[int, list[Any]] = {}
    for count, calls in rule.seen:
        assert not WAITS & {name for name, _ in calls}
        assert by_count.setdefault(count, calls) == calls, "the same operators and shapes on every frame"
    assert len(by_count) == 2, "the first frame, and those after it"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """A CPU that records: a replay runs the function again on the graph's own memory, and writes there."""
    made: list[Captured] = []
    runs: list[Callable[..., Any]] = []

    class Graph:
        def replay(self) -> None:
            (own,) = (i for i, one in enumerate(made) if one.graph is self)
            for old, new in zip(made[own].outputs, runs[own](made[own].inputs), strict=True):
                old.copy_(new)

    class Recorded(Captured):
        def __init__(self, function: Any, inputs: Sequence[Tensor]) -> None:
            super().__init__(function, inputs)
            made.append(self)
            runs.append(function)

    class Stream:
        def wait_stream(self, _: Any) -> None: ...

    for name, fake in {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _, stream: nullcontext())
    monkeypatch.setattr(cuda_graphs, "_DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_graphs, "Captured", Recorded)
    return made


def test_replays_equal_the_rule_for_all_streams(recorder: list[Captured]) -> None:
    vit, frames = sam(), clip(5, streams=2)
    with torch.no_grad():
        ours, _ = run(vit, CapturedWindows((3,)), frames, RandomK(40))
        theirs, _ = run(vit, Windows((3,)), frames, RandomK(40))
    for a, b in zip(ours, theirs, strict=True):
        assert all(error(one.tokens, other.tokens) < 1e-6 for one, other in zip(a, b, strict=True))
    assert len(recorder) == 2, "one graph for each number of windows, for both streams"


def test_graphs_of_older_weights_are_dropped(recorder: list[Captured]) -> None:
    vit, rule = sam(), CapturedWindows((3,))
    with torch.no_grad():
        for _ in range(2):
            run(vit, rule, clip(3), RandomK(40))
        before = set(rule.graphs)
        *_, last = (module for module in vit.modules() if isinstance(module, torch.nn.Linear))
        last.weight.mul_(1.1)
        ours, _ = run(vit, rule, clip(3), RandomK(40))
        theirs, _ = run(vit, Windows((3,)), clip(3), RandomK(40))
    assert error(ours[-1][0].tokens, theirs[-1][0].tokens) < 1e-6
    assert len(before) == len(rule.graphs) == 2 and not before & set(rule.graphs) and len(recorder) == 4


def test_where_recording_fails_the_network_runs_as_it_is(
    recorder: list[Captured], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object, stream: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    vit, frames = sam(), clip(3)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        ours, _ = run(vit, CapturedWindows((3,)), frames, RandomK(40))
        theirs, _ = run(vit, Windows((3,)), frames, RandomK(40))
    assert torch.equal(ours[-1][0].tokens, theirs[-1][0].tokens) and not recorder
    assert len([record for record in caplog.records if "no CUDA graph" in record.message]) == 2
