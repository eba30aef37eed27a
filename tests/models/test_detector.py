"""The detector as a whole: dense and eventful agree, streams, costs, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.detectors.results import Detections, StepResult
from eventful_det.detectors.vitdet.config import MODELS, ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.macs import level_sizes
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import EVERYTHING, LargestError, Selector, Threshold, TopFraction
from eventful_det.gating.state import State

AGED = Selector(LargestError(age_power=0.5), 0.3)


def frames(count: int, height: int = 96, width: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Detections, b: Detections) -> None:
    torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("size", [(96, 160), (100, 75), (33, 200)])
def test_every_token_selected_equals_dense(tiny_detector: Detector, size: tuple[int, int]) -> None:
    detector = tiny_detector
    state = detector.init_state()
    for frame in frames(3, *size):
        (result,) = detector.step(frame[None], state, selector=EVERYTHING)
        (dense,) = detector(frame[None])
        assert_same(result.detections, dense)
        assert len(dense) > 0


@pytest.mark.parametrize("given", [np.zeros((96, 160, 3), np.uint8), "a.jpg", torch.zeros(96, 160, 3)])
def test_what_is_no_frame_is_told_where_to_go(tiny_detector: Detector, given: Any) -> None:
    for images in (given, [given]):
        with pytest.raises(UserError, match=r"expected float tensors \(3, height, width\).* detector.stream\(\[array"):
            tiny_detector(images)
    with pytest.raises(UserError, match="got a Tensor of shape"):
        tiny_detector.step(torch.zeros(1, 3, 96, 160, dtype=torch.uint8), tiny_detector.init_state())


def test_dense_rule_equals_forward(tiny_detector: Detector) -> None:
    detector = tiny_detector
    (result,) = detector.step(frames(1), detector.init_state(), rule=Dense())
    assert_same(result.detections, detector(frames(1))[0])
    assert result.cost.macs["backbone"] > result.cost.dense["backbone"]  # timm computes the padding of windows
    (divisible,) = detector.step(frames(1, 128, 192), detector.init_state(), rule=Dense())
    assert divisible.cost.macs == divisible.cost.dense


def test_identical_frame_costs_only_the_comparison(tiny_detector: Detector) -> None:
    detector = tiny_detector
    state = detector.init_state()
    (first,) = detector.step(frames(1), state, selector=Threshold(0.01))
    (second,) = detector.step(frames(1), state, selector=Threshold(0.01))
    assert first.cost.flush
    assert second.cost.recomputed == 0
    assert second.cost.macs["pyramid"] == second.cost.macs["rpn"] == second.cost.macs["roi"] == 0
    assert second.cost.total < 0.01 * first.cost.total
    assert torch.equal(first.detections.boxes, second.detections.boxes)


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_identical_frame_runs_the_comparison_and_little_else(tiny_detector: Detector) -> None:
    detector = tiny_detector
    state = detector.init_state()
    detector.step(frames(1), state, selector=Threshold(0.01))
    with Operators() as operators:
        detector.step(frames(1), state, selector=Threshold(0.01))
    products = {"mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}
    assert "equal" in operators.names and not products & set(operators.names)
    assert len(operators.names) < 70  # the heads alone would run hundreds


def test_result_does_not_alias_the_state(tiny_detector: Detector) -> None:
    detector = tiny_detector
    state = detector.init_state()
    (first,) = detector.step(frames(1), state, selector=Threshold(0.01))
    kept = first.detections.boxes.clone()
    first.detections.boxes.zero_()
    (second,) = detector.step(frames(1), state, selector=Threshold(0.01))
    assert torch.equal(second.detections.boxes, kept)


def test_streams_are_isolated_bit_for_bit(tiny_detector: Detector) -> None:
    detector, rule = tiny_detector, Rows(exact=True)
    a, b = frames(4, seed=1), frames(4, 64, 96, seed=2)
    together, alone = detector.init_state(2), detector.init_state(1)
    for x, y in zip(a, b, strict=True):
        both = detector.step([x, y], together, rule=rule, selector=AGED)
        (one,) = detector.step([x], alone, rule=rule, selector=AGED)
        assert torch.equal(both[0].detections.boxes, one.detections.boxes)
        assert torch.equal(both[0].detections.scores, one.detections.scores)


def test_streams_do_not_influence_each_other(tiny_detector: Detector) -> None:
    """Which tokens are recomputed not at all; boxes and scores as far as larger products round differently."""
    detector = tiny_detector
    clips = [frames(4, seed=1), frames(4, 64, 96, seed=2), frames(4, seed=3)]
    together, alone = detector.init_state(3), [detector.init_state() for _ in clips]
    for images in zip(*clips, strict=True):
        for image, own, result in zip(images, alone, detector.step(images, together, selector=AGED), strict=True):
            (expected,) = detector.step([image], own, selector=AGED)
            assert torch.equal(result.work, expected.work) and result.cost.macs == expected.cost.macs
            assert_same(result.detections, expected.detections)


@pytest.mark.parametrize("rule", [Rows(), Dense()])
def test_times_are_measured_on_request(tiny_detector: Detector, rule: Rows | Dense) -> None:
    state = tiny_detector.init_state()
    (plain,) = tiny_detector.step(frames(1), state, rule=rule)
    (timed,) = tiny_detector.step(frames(1, seed=1), state, rule=rule, selector=EVERYTHING, timing=True)
    assert not plain.cost.seconds and plain.cost.latency == 0
    assert list(timed.cost.seconds) == ["other", "backbone", "pyramid", "rpn", "roi"] and timed.cost.latency > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_autocast(tiny_detector: Detector, dtype: torch.dtype) -> None:
    """They run, and agree with float32 as far as their precision goes: the objects' scores do."""
    for rule in (Rows(), Dense()):
        expected = [result.detections for result in _run(tiny_detector.float(), rule)]
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype=dtype):
                _assert_close(_run(tiny_detector, rule), expected)
        _assert_close(_run(tiny_detector.to(dtype), rule), expected)


def _run(detector: Detector, rule: Rows | Dense) -> list[StepResult]:
    state = detector.init_state()
    return [detector.step(frame[None], state, rule=rule, selector=AGED)[0] for frame in frames(3)]


def _assert_close(results: list[StepResult], expected: list[Detections]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert abs(float(result.detections.scores.max()) - float(other.scores.max())) < 0.05


def test_inference_mode(tiny_detector: Detector) -> None:
    """In it, and on without it."""
    state = tiny_detector.init_state()
    with torch.inference_mode():
        tiny_detector.step(frames(1), state)
        tiny_detector.step(frames(1, seed=1), state)
    tiny_detector.step(frames(1, seed=2), state)


def test_new_size_flushes_its_stream_alone(tiny_detector: Detector) -> None:
    state = tiny_detector.init_state(2)
    tiny_detector.step(frames(2), state)
    x, y = frames(2)
    results = tiny_detector.step([x, y[:, :64, :64]], state)
    assert [result.cost.flush for result in results] == [False, True]


def test_reported_macs_are_the_counted_ones(tiny_detector: Detector) -> None:
    for rule in (Dense(), Rows()):
        detector = tiny_detector
        state = detector.init_state()
        for frame in frames(2):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counted by every torch
                (result,) = detector.step(frame[None], state, rule=rule, selector=TopFraction(0.3))
            gated = 0 if rule == Dense() or result.cost.flush else frame.numel()
            assert result.cost.total == counter.get_total_flops() // 2 + gated


def test_level_sizes_are_those_of_the_pyramid(tiny_detector: Detector) -> None:
    levels = tiny_detector.backbone(torch.zeros(1, 3, 96, 160))
    assert [tuple(level.shape[-2:]) for level in levels] == level_sizes((6, 10))


def test_losses_are_finite_and_reach_every_parameter(tiny_detector: Detector) -> None:
    detector = tiny_detector
    targets = [
        {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    losses = detector.train()(frames(2), targets)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    missing = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


def test_misuse_is_explained(tiny_detector: Detector) -> None:
    with pytest.raises(UserError, match="got 2 frames for a state of 1 streams"):
        tiny_detector.step(frames(2), tiny_detector.init_state(1))
    with pytest.raises(UserError, match="needs targets"):
        tiny_detector.train()(frames(1))
    with pytest.raises(UserError, match=r"call \.eval"):
        tiny_detector.train().step(frames(1), tiny_detector.init_state())
    tiny_detector.eval()
    stream = tiny_detector.stream([np.zeros((96, 160, 3), np.uint8)] * 3)
    next(stream)
    tiny_detector.backbone.net.blocks[0].train()  # a part of it, under a live stream
    with pytest.raises(UserError, match=r"call \.eval"):
        list(stream)  # at the next key frame
    with pytest.raises(UserError, match="unknown option 'depht'"):
        ModelConfig.from_dict({"depht": 3})


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_detectron2_names(name: str) -> None:
    with torch.device("meta"):
        keys = Detector(MODELS[name](("a", "b"))).state_dict()
    assert keys["backbone.net.blocks.0.attn.rel_pos_h"].shape[0] == 2 * MODELS[name](("a",)).window - 1
    for key in ("backbone.simfp_2.4.norm.weight", "roi_heads.box_predictor.cls_score.weight"):
        assert key in keys


def test_state_can_be_copied_and_saved(tiny_detector: Detector, tmp_path: Path) -> None:
    detector = tiny_detector
    state = detector.init_state()
    for frame in frames(3):
        detector.step(frame[None], state, selector=AGED)
    state.save(tmp_path / "state.pt")
    others = [state.clone(), state.to(dtype=torch.float32), State.load(tmp_path / "state.pt")]
    nexts = frames(2, seed=5)
    expected = [detector.step(frame[None], state, selector=AGED)[0].detections.boxes for frame in nexts]
    for other in others:
        boxes = [detector.step(frame[None], other, selector=AGED)[0].detections.boxes for frame in nexts]
        assert all(torch.equal(a, b) for a, b in zip(boxes, expected, strict=True))
