"""Mixed precision: close to float32, and safe against overflow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.training_set import TrainingSet
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.training.options import TrainOptions
from eventful_det.training.precision import autocast_dtype
from eventful_det.training.trainer import Trainer

OPTIONS = TrainOptions(steps=8, batch=2, lr=1e-3, warmup=2, workers=0, log_every=1, checkpoint_every=100, ema=0.0)


@pytest.fixture
def samples(tmp_path: Path) -> TrainingSet:
    import cv2

    image = np.full((64, 96, 3), 30, np.uint8)
    image[20:50, 20:50] = 220
    cv2.imwrite(str(tmp_path / "0.png"), image)
    frame = Frame(1, "0.png", 96, 64, 0, [Annotation(2, (20.0, 20.0, 50.0, 50.0))])
    data = CocoVideo([(1, "circle"), (2, "square"), (3, "star")], [Video(1, "v", [frame])], tmp_path)
    return TrainingSet(data, Augmentation(((64, 96),), scale=(1.0, 1.0), flip=0.0, colour=0.0))


def train(detector: Detector, samples: TrainingSet, directory: Path, amp: str) -> list[float]:
    losses: list[float] = []
    options = dataclasses.replace(OPTIONS, amp=amp)
    Trainer(detector, samples, options, directory, lambda _, metrics: losses.append(metrics["loss"])).train()
    return losses


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_half_precision_trains_like_float32(
    tiny_detector: Detector, samples: TrainingSet, tmp_path: Path, amp: str
) -> None:
    """bfloat16 is what CPUs with AMX and GPUs train in; autocast gives the same types on any CPU."""
    start = {key: value.clone() for key, value in tiny_detector.state_dict().items()}
    whole = train(tiny_detector, samples, tmp_path / "whole", "float32")
    tiny_detector.load_state_dict(start)
    half = train(tiny_detector, samples, tmp_path / "half", amp)
    assert half != whole  # it did compute in another type
    assert half[0] == pytest.approx(whole[0], rel=0.02)
    assert np.mean(half[-3:]) == pytest.approx(np.mean(whole[-3:]), rel=0.15)
    assert np.mean(half[-3:]) < 0.9 * half[0]
    assert all(value.dtype == torch.float32 for value in tiny_detector.state_dict().values())


class PyramidLoss(torch.nn.Module):
    """A loss without draws and choices, which tiny differences of the proposals would decide."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, _: object) -> dict[str, Tensor]:
        return {"loss": torch.stack([level.float().relu().mean() for level in self.detector.backbone(images)]).sum()}


def test_gradients_of_half_precision_point_the_same_way(
    tiny_detector: Detector, samples: TrainingSet, tmp_path: Path
) -> None:
    gradients = {}
    for amp in ("float32", "bfloat16", "float16"):
        options = dataclasses.replace(OPTIONS, amp=amp)
        trainer = Trainer(tiny_detector, samples, options, tmp_path / amp, objective=PyramidLoss(tiny_detector))
        trainer.add_gradients(next(trainer.batches()))
        trainer.scaler.unscale_(trainer.optimizer)
        parameters = [p for p in tiny_detector.backbone.parameters() if p.grad is not None]
        gradients[amp] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        trainer.optimizer.zero_grad()
    for amp, least in (("bfloat16", 0.995), ("float16", 0.999)):
        assert not torch.equal(gradients[amp], gradients["float32"])
        assert float(torch.cosine_similarity(gradients[amp], gradients["float32"], 0)) > least


def test_an_overflow_skips_the_step(tiny_detector: Detector, samples: TrainingSet, tmp_path: Path) -> None:
    trainer = Trainer(tiny_detector, samples, dataclasses.replace(OPTIONS, steps=1, amp="float16"), tmp_path / "run")
    before = tiny_detector.backbone.net.pos_embed.clone()
    trainer.scaler._init_scale = 2.0**60
    trainer.train()
    assert torch.equal(tiny_detector.backbone.net.pos_embed, before)
    assert trainer.scaler.get_scale() < 2.0**60


def test_the_type_follows_the_device() -> None:
    cpu = torch.device("cpu")
    expected = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    assert autocast_dtype("auto", cpu) == expected
    assert autocast_dtype("float16", cpu) == torch.float16
    with pytest.raises(UserError, match=r"train\.amp"):
        dataclasses.replace(OPTIONS, amp="int8")  # type: ignore[arg-type]
