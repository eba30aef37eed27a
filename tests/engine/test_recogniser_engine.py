"""A compiled recogniser: the features and logits of PyTorch under the same choice of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.engine.backends import Torch
from eventful_det.engine.export import export_engine, graphs_of
from eventful_det.engine.recogniser import CompiledRecogniser
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import EVERYTHING, Gmacs, RandomK, Selector, Threshold, TopK
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.recogniser import Recogniser

SIZE, BUCKETS = (32, 48), (6, 12)  # 4 x 6 tokens


def make_recogniser() -> Recogniser:
    """Small and random; its positions are resized, and outputs differ."""
    torch.manual_seed(0)
    config = RecogniserConfig(
        {"verb": ("take", "put"), "noun": ("tap", "pan", "cup")},
        dim=32,
        depth=3,
        heads=2,
        mlp=48,
        temporal_depth=1,
        temporal_heads=4,
        temporal_mlp=40,
        tubelet=(2, 8, 8),
        frames=6,
        size=SIZE,
        position_grid=(3, 3),
        stride=1,
        fps=10.0,
    )
    recogniser = Recogniser(config).eval().requires_grad_(False)
    for parameter in recogniser.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25)
    return recogniser


def tubelets(count: int) -> list[Tensor]:
    """A still picture over which a block moves."""
    still, clip = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)), []
    for t in range(2 * count):
        clip.append(still.clone())
        clip[-1][:, 8:20, 2 * t : 2 * t + 12] = 0.1 * t
    return list(torch.stack(clip).unflatten(0, (count, 2)))


def assert_same(recogniser: Recogniser, engine: Recogniser, selector: Selector, dense: bool = False) -> None:
    rule = Dense() if dense else Rows()
    ours, theirs = recogniser.init_state(), engine.init_state()
    for tubelet in tubelets(5):
        (a,) = recogniser.step([tubelet], ours, rule=rule, selector=selector)
        (b,) = engine.step([tubelet], theirs, rule=rule, selector=selector)
        torch.testing.assert_close(a.feature, b.feature, rtol=1e-3, atol=1e-3)
        for head, logits in a.logits.items():
            torch.testing.assert_close(logits, b.logits[head], rtol=1e-3, atol=1e-3)
        assert torch.equal(a.work, b.work) and a.cost.macs == b.cost.macs and a.cost.dense == b.cost.dense
        assert a.cost.flush == b.cost.flush


def in_torch(recogniser: Recogniser) -> CompiledRecogniser:
    return CompiledRecogniser(recogniser.config, BUCKETS, Torch(graphs_of(recogniser, SIZE)))


def test_the_graphs_compute_what_the_recogniser_does() -> None:
    recogniser = make_recogniser()
    engine = in_torch(recogniser)
    for selector in (RandomK(6), TopK(12), EVERYTHING, Threshold(1e9)):
        assert_same(recogniser, engine, selector)
    assert_same(recogniser, engine, EVERYTHING, dense=True)
    views = torch.randn(2, 6, 3, *SIZE)
    for head, logits in recogniser(views).items():
        torch.testing.assert_close(engine(views)[head], logits, rtol=1e-4, atol=1e-4)


def test_selections_are_filled_up_and_budgets_kept() -> None:
    engine = in_torch(make_recogniser())
    film = [(255 * frame.permute(1, 2, 0)).byte().numpy() for tubelet in tubelets(5) for frame in tubelet]
    counts = [result.cost.recomputed for result in engine.stream(film, budget=4, scene_cuts=False)]
    assert counts == [24, 6, 6, 0, 6], "4 tokens, the stalest up to what is compiled, and 4 a step on average"
    prices = engine.cost_model(Rows()).macs(engine.config.grid, torch.arange(24))
    assert prices[0] < prices[1] == prices[6] < prices[7] == prices[12] < prices[13] == prices[24]
    results = list(engine.stream(film, budget=Gmacs(float(prices[12]) / 1e9), scene_cuts=False))
    assert all(0 < result.cost.total <= prices[12] for result in results[1:])


@pytest.mark.parametrize(("format", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_a_folder_is_a_recogniser(format: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    if format == "onnx":
        pytest.importorskip("onnx")
    recogniser, folder = make_recogniser(), tmp_path / "engine"
    export_engine(recogniser, folder, format=format, buckets=BUCKETS)  # type: ignore[arg-type]
    engine = load_recogniser(folder, spatial_views=1)
    assert isinstance(engine, CompiledRecogniser) and engine.config.spatial_views == 1
    assert engine.config.classes == recogniser.config.classes
    assert_same(recogniser, engine, RandomK(6))
    assert_same(recogniser, engine, EVERYTHING, dense=True)
    with pytest.raises(UserError, match="open it with load_recogniser"):
        load_detector(folder)
    with pytest.raises(UserError, match="cannot be renamed"):
        load_recogniser(folder, {"verb": ("a", "b")})
    with pytest.raises(UserError, match="cannot follow Paper"):
        engine.step(tubelets(1), engine.init_state(), rule=Paper())
    with pytest.raises(UserError, match="in an engine for"):
        engine.step([torch.zeros(2, 3, 16, 24)], engine.init_state())
    with pytest.raises(UserError, match="takes views of"):
        export_engine(recogniser, folder, size=(16, 24))
