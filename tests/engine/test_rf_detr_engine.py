"""A compiled RF-DETR: the detections of PyTorch under the same choice of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import random_model
from eventful_det.engine.backends import Format, Torch
from eventful_det.engine.export import export_engine, graphs_of, in_engine
from eventful_det.engine.rf_detr import CompiledRFDETR
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import EVERYTHING, RandomK, Selector, Threshold

SIDE, BUCKETS = 128, (16, 0.5)  # 8 x 8 tokens in 2 x 2 windows


def make_detector() -> EventfulRFDETR:
    """A narrow RF-DETR with random weights, whose scores differ."""
    narrow = {"decoder_ffn_dim": 48, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 4}
    model = random_model(
        "rf-detr-nano",
        config={"num_queries": 20, "d_model": 32, **narrow},
        backbone={"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "out_indices": [2, 4]},
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "bbox_embed" in name or "class_embed" in name:
            parameter.normal_(std=0.1, generator=generator)
    return EventfulRFDETR(model, min_score=0.0, side=SIDE)


def assert_same(detector: EventfulRFDETR, engine: CompiledRFDETR, selector: Selector, dense: bool = False) -> None:
    """The same detections, but for the order of those whose scores are as good as equal."""
    states, rule = (detector.init_state(), engine.init_state()), Dense() if dense else engine.rule
    frame = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for t in range(3):
        frame[:, 16 * t : 16 * t + 32, 32:80] = 0.2 * t
        (ours,) = detector.step([frame], states[0], rule=rule, selector=selector)
        (theirs,) = engine.step([frame], states[1], rule=rule, selector=selector)
        a, b = ours.detections, theirs.detections
        assert len(a) == len(b) == 20 and (a.scores - b.scores).abs().max() < 1e-3
        matched = (torch.cdist(a.boxes, b.boxes) < 1e-3) & (a.labels[:, None] == b.labels)
        assert matched.any(1).all()
        assert torch.equal(ours.work, theirs.work) and ours.cost.dense == theirs.cost.dense
        assert engine.cost_model(engine.rule).everything(engine.grid) >= theirs.cost.total or dense


def test_the_graphs_compute_what_the_detector_does() -> None:
    detector = make_detector()
    engine = in_engine(detector, (SIDE, SIDE), BUCKETS, Torch(graphs_of(detector, (SIDE, SIDE))))
    assert isinstance(engine, CompiledRFDETR) and engine.rows.sizes == (16, 32, 64)
    for selector in (RandomK(16), RandomK(32), EVERYTHING, Threshold(1e9)):
        assert_same(detector, engine, selector)
    assert_same(detector, engine, EVERYTHING, dense=True)
    for side in (64, 192):
        with pytest.raises(UserError, match="this engine takes 128"):
            engine.stream([], short_side=side)
    state = engine.init_state()
    for t in range(3):
        (result,) = engine.step([torch.full((3, SIDE, SIDE), 0.1 * t)], state, selector=RandomK(20))
    assert result.cost.recomputed == 32, "20 tokens, and the stalest up to the next number that is compiled"


@pytest.mark.parametrize(("format", "packages"), [("openvino", ["openvino"]), ("onnx", ["onnx", "onnxruntime"])])
def test_a_folder_is_a_detector(format: Format, packages: list[str], tmp_path: Path) -> None:
    for package in packages:
        pytest.importorskip(package)
    detector = make_detector()
    with pytest.raises(UserError, match="squares"):
        export_engine(detector, tmp_path, size=(SIDE, 2 * SIDE))
    export_engine(detector, tmp_path, format=format, size=(SIDE, SIDE), buckets=(16,))
    engine = load_detector(tmp_path)
    assert isinstance(engine, CompiledRFDETR) and engine.names == detector.names
    assert_same(detector, engine, RandomK(16))
    assert_same(detector, engine, EVERYTHING, dense=True)
