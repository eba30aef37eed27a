"""What training with gates on minimises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.training.objective import EventfulObjective, EventfulOptions

Clips = tuple[Tensor, list[list[dict[str, Tensor]]]]


@pytest.fixture
def clips() -> Clips:
    """Two clips of three frames in which a bright square moves."""
    images, targets = 0.1 * torch.rand(2, 3, 3, 64, 96, generator=torch.Generator().manual_seed(0)), []
    for clip in images:
        boxes = [[10.0 + 8 * t, 20.0, 40.0 + 8 * t, 50.0] for t in range(3)]
        for image, (x1, y1, x2, y2) in zip(clip, boxes, strict=True):
            image[:, int(y1) : int(y2), int(x1) : int(x2)] = 0.9
        targets.append([{"boxes": torch.tensor([box]), "labels": torch.tensor([1])} for box in boxes])
    return images, targets


def objective(detector: Detector, **options: object) -> EventfulObjective:
    return EventfulObjective(detector, EventfulOptions(**options)).train()  # type: ignore[arg-type]


def test_with_everything_recomputed_there_is_no_distance_to_dense(tiny_detector: Detector, clips: Clips) -> None:
    everything = {"budgets": (1.0, 1.0), "thresholds": (-1.0,), "labels": "none"}
    assert float(objective(tiny_detector, **everything)(*clips)["loss_distil"].detach()) < 1e-8
    gated = objective(tiny_detector, budgets=(0.05, 0.05), labels="none", thresholds=(0.0,))
    assert float(gated(*clips)["loss_distil"].detach()) > 1e-4


def test_the_dense_detector_does_not_change(tiny_detector: Detector, clips: Clips) -> None:
    gated = objective(tiny_detector, labels="none", budgets=(1.0, 1.0), thresholds=(-1.0,))
    before = {key: value.clone() for key, value in gated.dense.state_dict().items()}
    with torch.no_grad():
        for parameter in tiny_detector.backbone.parameters():
            parameter.mul_(1.1)
    losses = gated(*clips)
    losses["loss_distil"].backward()
    assert float(losses["loss_distil"].detach()) > 1e-4
    assert not gated.dense.training
    assert all(torch.equal(before[key], value) for key, value in gated.dense.state_dict().items())
    assert all(parameter.grad is None for parameter in gated.dense.parameters())


@pytest.mark.parametrize("labels", ["truth", "dense", "none"])
def test_every_trained_parameter_has_a_gradient(tiny_detector: Detector, clips: Clips, labels: str) -> None:
    """As several processes need; also where nothing is on the frames."""
    images, targets = clips
    empty = [[{"boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in target] for target in targets]
    gated = objective(tiny_detector, labels=labels)
    torch.stack(list(gated(images, empty).values())).sum().backward()
    trained = [name for name, p in gated.named_parameters() if p.requires_grad]
    assert any(name.startswith("detector.roi_heads") for name in trained) == (labels != "none")
    missing = [name for name, p in gated.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_training_brings_gated_closer_to_dense(tiny_detector: Detector, clips: Clips) -> None:
    gated = objective(tiny_detector, budgets=(0.1, 0.1), thresholds=(0.0,), labels="none", supervised=3)
    optimizer = torch.optim.AdamW(tiny_detector.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        torch.manual_seed(0)
        loss = gated(*clips)["loss_distil"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_focus_recomputes_where_the_object_was(tiny_detector: Detector, clips: Clips) -> None:
    gated, (images, targets) = objective(tiny_detector, policy="focus"), clips
    clouds = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(1))  # change everywhere, and are no noise
    images = images + F.interpolate(clouds, images.shape[-2:], mode="bilinear").unflatten(0, (2, 3))
    saliency = gated._saliency(targets[0], (4, 6))
    assert not saliency[0].any() and saliency[1].any() and not torch.equal(saliency[1], saliency[2])
    loss = gated(images, targets)["loss_distil"]
    empty = [[{"boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in target] for target in targets]
    for policy, same in (("focus", False), ("threshold", True)):
        losses = []
        for seen in (targets, empty):
            torch.manual_seed(0)
            gated = objective(tiny_detector, policy=policy, budgets=(0.1, 0.1), thresholds=(0.0,), labels="none")
            losses.append(float(gated(images, seen)["loss_distil"].detach()))
        assert (losses[0] == losses[1]) == same
    assert torch.isfinite(loss)


def test_bfloat16_gives_about_the_same_distance(tiny_detector: Detector, clips: Clips) -> None:
    gated = objective(tiny_detector, labels="none", budgets=(0.2, 0.2))
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(gated(*clips)["loss_distil"].detach()))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_labels_of_the_dense_detector_are_its_sure_detections(tiny_detector: Detector, clips: Clips) -> None:
    gated = objective(tiny_detector, labels="dense")
    gated.dense.config = dataclasses.replace(gated.dense.config, proposals=5)
    with torch.no_grad():
        gated.dense.roi_heads.box_predictor.cls_score.bias[2] = 50.0  # everything is a star
    levels = gated._dense_levels(clips[0][0])
    found = gated._dense_targets(levels, [(64, 96)] * 3)
    assert all(len(target["boxes"]) and (target["labels"] == 2).all() for target in found)
    with torch.no_grad():
        gated.dense.roi_heads.box_predictor.cls_score.bias[2] = -50.0
        gated.dense.roi_heads.box_predictor.cls_score.bias[3] = 50.0  # everything is background
    assert not any(len(target["boxes"]) for target in gated._dense_targets(levels, [(64, 96)] * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "mine"}, "labels must be"),
        ({"policy": "mine"}, "policy must be"),
        ({"labels": "none", "distil": 0.0}, "nothing to learn from"),
        ({"budgets": (0.0, 0.5)}, "budgets"),
        ({"supervised": 0}, "supervised"),
    ],
)
def test_wrong_options_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EventfulOptions(**options)  # type: ignore[arg-type]


def test_clips_need_whole_strides(tiny_detector: Detector, clips: Clips) -> None:
    with pytest.raises(UserError, match="multiples of 32"):
        objective(tiny_detector)(clips[0][..., :50], clips[1])
