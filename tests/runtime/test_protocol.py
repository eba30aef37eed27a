"""A detector of another kind fits into streams, pools and evaluation without their knowing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, CostModel, InputTransform, VideoDetector
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.errors import UserError
from eventful_det.evaluation.sweep import run_methods
from eventful_det.evaluation.sweep.runs import Method
from eventful_det.evaluation.sweep.summary import rows_of
from eventful_det.gating.dense import Dense
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, GateInput, Gmacs, Select
from eventful_det.gating.state import State, TensorTree
from eventful_det.gating.windows import Grid
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.stream import Stream

CELL, MACS = 8, 1000  # pixels along a side of a token; MACs of a token


@dataclass
class ToyState(TensorTree):
    """Brightness `(H, W)` of each token when it was looked at last, and frames since then."""

    seen: Tensor
    age: Tensor
    frame: int = 0


@dataclass(frozen=True)
class ToyCosts:
    """Tokens are all that costs."""

    variable = "backbone"

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        return MACS * torch.arange(len(order) + 1)

    def everything(self, grid: Grid) -> int:
        return MACS * grid[0] * grid[1]


class Toy:
    """Finds bright tokens: no network at all."""

    names = ("dark", "bright")
    device = torch.device("cpu")
    input_transform = InputTransform(short_side=32, long_side=64, token=CELL)

    def init_state(self, batch: int = 1) -> State[ToyState]:
        return State([None] * batch)

    def step(
        self,
        frames: Sequence[Tensor],
        state: State[ToyState],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[StepResult]:
        flushes = [flush] * len(frames) if isinstance(flush, bool) else flush
        maps = [torch.nn.functional.avg_pool2d(frame.mean(0)[None], CELL)[0] for frame in frames]  # (H, W) each
        streams, gates = [], []
        for i, (cells, new) in enumerate(zip(maps, flushes, strict=True)):
            stream = state.streams[i]
            if stream is None or stream.seen.shape != cells.shape or new or rule == Dense():
                age = torch.ones(cells.numel(), dtype=torch.int32)
                state.streams[i] = stream = ToyState(torch.zeros_like(cells), age)
            else:
                error = 255 * (cells - stream.seen).abs().flatten()
                grid = (cells.shape[0], cells.shape[1])
                gates.append(GateInput(error, stream.age, stream.frame, grid, stream=i))
            streams.append(stream)
        asked = [gate.stream for gate in gates]
        chosen = dict(zip(asked, selector(gates), strict=True))
        results = []
        for i, (cells, stream) in enumerate(zip(maps, streams, strict=True)):
            index = chosen.get(i, torch.arange(cells.numel()))
            stream.age.add_(1).index_fill_(0, index, 1)
            stream.seen.view(-1)[index] = cells.flatten()[index]
            stream.frame += 1
            results.append(_result(stream.seen, index, i not in chosen, timing))
        return results

    def cost_model(self, rule: AnyRule) -> CostModel:
        if not isinstance(rule, Rows):
            raise UserError("a toy has costs for rows only")
        return ToyCosts()


def _result(seen: Tensor, index: Tensor, flush: bool, timing: bool) -> StepResult:
    y, x = (seen > 0.5).nonzero().unbind(1)
    boxes = CELL * torch.stack([x, y, x + 1, y + 1], 1).float()
    work = torch.zeros(seen.numel()).index_fill_(0, index, 1.0).view(seen.shape)
    seconds = {"backbone": 1e-3} if timing else {}
    cost = FrameCost(
        {"backbone": MACS * len(index)}, {"backbone": MACS * seen.numel()}, len(index), seen.numel(), flush, seconds
    )
    return StepResult(Detections(boxes, seen[y, x], torch.ones_like(y)), cost, work)


def film(frames: int = 6) -> list[NDArray[np.uint8]]:
    """A bright square of 16 pixels that moves 16 to the right every frame, over grey; twice the size of the input."""
    images = np.full((frames, 64, 128, 3), 60, np.uint8)
    for t, image in enumerate(images):
        image[16:32, 16 * t : 16 * t + 16] = 255
    return list(images)


def test_streams_and_pools() -> None:
    toy: VideoDetector[ToyState] = Toy()
    stream = Stream(toy, film(), scene_cuts=False, hold=1, shadow_every=2, timing=True)
    results = list(stream)
    assert [r.cost.recomputed for r in results] == [32] + [6] * 5, "two tokens that changed, and two others for each"
    for t, result in enumerate(results):
        assert result.detections.boxes.tolist() == [[16 * t, 16, 16 * t + 16, 32]] and result.token_size == (16, 16)
        assert result.names == toy.names and result.cost.latency > 0
    assert stream.drift is not None and stream.drift.frames == 3 and stream.drift.agreement == 1
    pool = StreamPool(toy, budget=Gmacs(6 * MACS / 1e9), scene_cuts=False, hold=1, options=BudgetOptions(max_age=50))
    pool.add(film(), name="one")
    pool.add(film(4), name="two")
    rounds = list(pool)
    assert [sum(r.cost.recomputed for r in round) for round in rounds[1:]] == [6, 6, 6, 6, 6]
    with pytest.raises(UserError, match="rows only"):
        Stream(toy, film(), rule=Dense(), budget=Gmacs(1))


def test_evaluation(tmp_path: Path) -> None:
    frames = []
    for t, image in enumerate(film()):
        cv2.imwrite(str(tmp_path / f"{t}.png"), image[..., ::-1])
        frames.append(Frame(t + 1, f"{t}.png", 128, 64, t, [Annotation(2, (16.0 * t, 16, 16 * t + 16, 32))]))
    data = CocoVideo([(1, "dark"), (2, "bright")], [Video(1, "film", frames)], tmp_path)
    data.renumber()
    methods = [Method("dense"), Method("gated", rule=Rows(), budget=0.25), Method("held", 2, hold=2)]
    dense, gated, held = rows_of(run_methods(Toy(), data, methods, scene_cuts=False))
    assert dense.ap50 == gated.ap50 == pytest.approx(1) and held.ap50 < 0.9
    assert gated.relative_total == pytest.approx((1 + 5 * 6 / 32) / 6) and held.relative_total == 0.5
    assert dataclasses.asdict(gated)["gmacs_heads"] == 0
