"""Incremental heads equal the dense heads on the same token map, whatever changed."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.incremental import (
    HeadsState,
    init_heads,
    refresh_proposals,
    refresh_pyramid,
    refresh_regions,
)
from eventful_det.detectors.vitdet.macs import HeadSizes
from eventful_det.gating.selector import TopFraction

shared = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense_levels(detector: Detector, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    levels = detector.backbone.pyramid(tokens.permute(2, 0, 1)[None])
    logits, deltas = zip(*(detector.proposal_generator.rpn_head(level) for level in levels), strict=True)
    return levels, torch.cat(logits, dim=1)[0], torch.cat(deltas, dim=1)[0]


def assert_equals_dense(detector: Detector, tokens: Tensor, state: HeadsState) -> None:
    levels, logits, deltas = dense_levels(detector, tokens)
    for own, level in zip(state.levels, levels, strict=True):
        torch.testing.assert_close(own, level, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.deltas, deltas, atol=1e-5, rtol=1e-5)
    layout = state.layout
    for maps in (state.inner, state.feature, *state.hidden):
        assert not maps[~layout.inside[: len(maps)]].any(), "borders are zero padding"


def refresh(detector: Detector, tokens: Tensor, changed: Tensor, state: HeadsState) -> int:
    """Returns the MACs that ran."""
    pyramid = refresh_pyramid(detector.backbone, tokens, changed, state)
    rpn = refresh_proposals(detector.proposal_generator, state, pyramid.cells)
    sizes = HeadSizes(pyramid.sources, pyramid.convolved, rpn.convolved, rpn.predicted, 0)
    return sum(detector.head_weights.macs(sizes).values())


def filled(detector: Detector, tokens: Tensor) -> HeadsState:
    state = init_heads(detector.backbone, detector.proposal_generator, tokens)
    refresh(detector, tokens, torch.arange(tokens.shape[0] * tokens.shape[1]), state)
    return state


def awake(detector: Detector) -> Detector:
    """Heads whose outputs differ from place to place: the initial weights are nearly zero."""
    for name, parameter in detector.named_parameters():
        if "rpn_head" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return detector


@shared
@given(st.integers(2, 9), st.integers(2, 9), st.lists(st.floats(0, 1, exclude_max=True), max_size=8), st.integers(0, 9))
@torch.no_grad()
def test_random_updates(tiny_detector: Detector, rows: int, cols: int, places: list[float], seed: int) -> None:
    detector = awake(tiny_detector)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, cols, detector.config.dim, generator=generator)
    state = filled(detector, tokens)
    assert_equals_dense(detector, tokens, state)
    changed = torch.tensor(sorted({int(place * rows * cols) for place in places}), dtype=torch.long)
    tokens.view(rows * cols, -1)[changed] = torch.randn(len(changed), detector.config.dim, generator=generator)
    macs = refresh(detector, tokens, changed, state)
    assert_equals_dense(detector, tokens, state)
    assert (macs == 0) == (len(changed) == 0)


@torch.no_grad()
def test_two_proposal_convolutions() -> None:
    torch.manual_seed(0)
    config = ModelConfig(("a",), dim=32, depth=1, heads=1, global_blocks=(), channels=8, rpn_convs=2, box_fc=(8,))
    detector = awake(Detector(config).eval())
    tokens = torch.randn(6, 7, 32)
    state = filled(detector, tokens)
    tokens[2, 3] += 1
    refresh(detector, tokens, torch.tensor([2 * 7 + 3]), state)
    assert_equals_dense(detector, tokens, state)


@pytest.mark.parametrize("stages", [1, 3])
@torch.no_grad()
def test_regions_are_reused_only_when_nothing_they_see_changed(tiny_detector: Detector, stages: int) -> None:
    torch.manual_seed(0)
    detector = Detector(dataclasses.replace(tiny_detector.config, box_stages=stages)).eval()
    heads, size = detector.roi_heads, (128, 128)
    tokens = torch.randn(8, 8, detector.config.dim)
    state = filled(detector, tokens)
    near, far = [4.0, 4.0, 30.0, 30.0], [80.0, 80.0, 120.0, 125.0]
    assert refresh_regions(heads, torch.tensor([near, far]), torch.arange(64), state, size)[1] == 2
    tokens[0, 0] += 1
    refresh_pyramid(detector.backbone, tokens, torch.tensor([0]), state)
    moved = [81.0, 80.0, 120.0, 125.0]
    proposals = torch.tensor([far, near, moved])
    output, computed = refresh_regions(heads, proposals, torch.tensor([0]), state, size)
    assert computed == 2  # the touched one and the new one
    expected = heads.score(partial(heads.pool, state.levels), [proposals], [size])
    for ours, dense in zip(output.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_a_cascade_looks_at_the_boxes_of_all_stages(tiny_detector: Detector) -> None:
    """A proposal far from the change is computed anew when its second stage reads where something changed."""
    detector = Detector(dataclasses.replace(tiny_detector.config, box_stages=3)).eval()
    heads, size, proposals = detector.roi_heads, (128, 128), torch.tensor([[80.0, 80.0, 120.0, 125.0]])
    tokens = torch.randn(8, 8, detector.config.dim)
    state = filled(detector, tokens)
    for shift, recomputed in ((0.0, 0), (-10 * 2.0, 1)):
        torch.nn.init.zeros_(heads.box_predictor[0].bbox_pred.weight)
        heads.box_predictor[0].bbox_pred.bias.data = torch.tensor([shift, shift, 0.0, 0.0])  # 2 of its sides away
        refresh_regions(heads, proposals, torch.arange(64), state, size)
        tokens[0, 0] += 1
        refresh_pyramid(detector.backbone, tokens, torch.tensor([0]), state)
        assert refresh_regions(heads, proposals, torch.tensor([0]), state, size)[1] == recomputed


@pytest.mark.parametrize("size", [(96, 160), (75, 130)])
def test_a_gated_stream_equals_dense_heads_on_its_token_map(tiny_detector: Detector, size: tuple[int, int]) -> None:
    detector = awake(tiny_detector)
    state = detector.init_state()
    frame = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    nbytes = set()
    for t in range(8):
        frame[:, 10 * t % 60 : 10 * t % 60 + 20, 20:50] = torch.rand(3, 1, 1)
        (result,) = detector.step(frame[None], state, selector=TopFraction(0.2))
        (stream,) = state.streams
        tokens = stream.backbone.streams[0].output.unflatten(0, stream.backbone.streams[0].grid)
        with torch.no_grad():
            levels, _, _ = dense_levels(detector, tokens)
            proposals, _ = detector.proposal_generator(levels, [size])
            (dense,) = detector.roi_heads.detect(levels, proposals, [size])
        torch.testing.assert_close(result.detections.boxes, dense.boxes, atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(result.detections.scores, dense.scores, atol=1e-4, rtol=1e-4)
        nbytes.add(stream.backbone.nbytes + stream.heads.nbytes - stream.heads.regions.nbytes)
        assert result.cost.flush == (t == 0)
        assert t == 0 or result.cost.macs["pyramid"] < result.cost.dense["pyramid"]
    assert len(nbytes) == 1
