"""Training: learns, resumes exactly, refuses to mix runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.training_set import TrainingSet, training_loader
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.training.log import Log
from eventful_det.training.optim import learning_rate, make_optimizer
from eventful_det.training.options import TrainOptions
from eventful_det.training.probe import Estimate, probe
from eventful_det.training.trainer import Trainer

OPTIONS = TrainOptions(steps=6, batch=2, lr=1e-3, warmup=2, workers=0, log_every=1, checkpoint_every=2)
AUGMENTATION = Augmentation(((64, 96),))


@pytest.fixture
def data(tmp_path: Path) -> CocoVideo:
    """Four pictures of a bright square on a dark ground."""
    import cv2

    frames = []
    for i in range(4):
        image = np.full((64, 96, 3), 30, np.uint8)
        image[20:50, 10 + 10 * i : 40 + 10 * i] = 220
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        truth = Annotation(1 + i % 3, (10.0 + 10 * i, 20.0, 40.0 + 10 * i, 50.0))
        frames.append(Frame(i, f"{i}.png", 96, 64, i, [truth]))
    return CocoVideo([(1, "circle"), (2, "square"), (3, "star")], [Video(1, "v", frames)], tmp_path)


def test_interrupted_training_equals_uninterrupted(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    start = {k: v.clone() for k, v in tiny_detector.state_dict().items()}

    def train(directory: str, stop_after: int | None = None) -> Detector:
        tiny_detector.load_state_dict(start)
        trainer = Trainer(tiny_detector, TrainingSet(data, AUGMENTATION), OPTIONS, tmp_path / directory)
        if stop_after is not None:

            def stop(step: int, _: dict[str, float]) -> None:
                if step == stop_after:
                    raise InterruptedError

            trainer.on_step = stop
        return trainer.train()

    whole = {k: v.clone() for k, v in train("whole").state_dict().items()}
    with pytest.raises(InterruptedError):
        train("parts", stop_after=5)  # the last checkpoint is of step 4
    parts = train("parts").state_dict()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    saved = load_detector(tmp_path / "parts" / "model.safetensors").state_dict()
    assert all(torch.equal(whole[k], saved[k]) for k in whole)


def test_training_lowers_the_loss(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    losses: list[float] = []
    options = dataclasses.replace(OPTIONS, steps=30, ema=0.0)
    samples = TrainingSet(data, dataclasses.replace(AUGMENTATION, scale=(1.0, 1.0), colour=0.0))
    Trainer(tiny_detector, samples, options, tmp_path / "run", lambda _, m: losses.append(m["loss"])).train()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


def test_accumulation_gives_the_same_gradient(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    """Without the draws of the losses: those of the bare token map."""

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = tiny_detector

        def forward(self, images: torch.Tensor, _: object) -> dict[str, torch.Tensor]:
            return {"loss": self.detector.backbone.net(images).square().mean()}

    samples, gradients = TrainingSet(data, AUGMENTATION), []
    for at_once in (0, 2, 1):
        options = dataclasses.replace(OPTIONS, batch=4, at_once=at_once)
        trainer = Trainer(tiny_detector, samples, options, tmp_path / str(at_once), objective=Objective())
        trainer.add_gradients(next(trainer.batches()))
        gradients.append(tiny_detector.backbone.net.patch_embed.proj.weight.grad.clone())  # type: ignore[union-attr]
        trainer.optimizer.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_the_batch_is_shared_out_evenly() -> None:
    assert dataclasses.replace(OPTIONS, batch=64, at_once=4).shares(8) == (8, 4)
    assert dataclasses.replace(OPTIONS, batch=4, at_once=8).shares(2) == (2, 2)
    with pytest.raises(UserError, match="multiple of the number of processes"):
        dataclasses.replace(OPTIONS, batch=3).shares(2)
    with pytest.raises(UserError, match="must divide the 3 images"):
        dataclasses.replace(OPTIONS, batch=3, at_once=2).shares(1)


def test_the_best_weights_are_kept(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    scores = iter([0.3, 0.5, 0.4, 0.1])
    options = dataclasses.replace(OPTIONS, eval_every=2, checkpoint_every=3)
    seen: list[torch.Tensor] = []

    def judge(detector: Detector) -> dict[str, float]:
        seen.append(detector.backbone.net.pos_embed.detach().clone())
        return {"ap50": next(scores), "ap": 0.1}

    def trainer(**changes: object) -> Trainer:
        changed = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        return Trainer(tiny_detector, TrainingSet(data, AUGMENTATION), changed, tmp_path, evaluate=judge)

    trainer().train()
    assert len(seen) == 3
    best = load_detector(tmp_path / "best.safetensors").backbone.net.pos_embed
    assert torch.equal(best, seen[1])
    assert not torch.equal(best, seen[2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["val_ap50"]) for line in lines if "val_ap50" in line] == [(2, 0.3), (4, 0.5), (6, 0.4)]
    again = trainer(eval_every=1)  # how often is free to change
    assert again.best_score == 0.5
    assert again.step == 6


def test_probe_leaves_the_trainer_as_it_was(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    trainer = Trainer(tiny_detector, TrainingSet(data, AUGMENTATION), OPTIONS, tmp_path)
    before = {key: value.clone() for key, value in tiny_detector.state_dict().items()}
    estimate = probe(trainer)
    assert all(torch.equal(before[key], value) for key, value in tiny_detector.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_detector.parameters())
    assert trainer.step == 0
    assert not trainer.optimizer.state
    assert estimate.parameters == sum(p.numel() for p in tiny_detector.parameters())
    assert estimate.memory > 8 * estimate.parameters
    assert estimate.total == 6 * max(estimate.seconds, estimate.read_seconds)
    assert str(Estimate(45000, 1.0, 4.0, 2**34, 10**8)) == (
        "100.0 million parameters; 1.00 s to compute a step, 4.00 s to read its images; reading is the slower: give it "
        "more train.workers; 45000 steps: about 2.1 days; 16.0 GiB per process"
    )


def test_other_options_do_not_continue_a_run(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    samples = TrainingSet(data, AUGMENTATION)
    Trainer(tiny_detector, samples, OPTIONS, tmp_path / "run").train()
    with pytest.raises(UserError, match=r"other values of train\.lr"):
        Trainer(tiny_detector, samples, dataclasses.replace(OPTIONS, lr=1.0), tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot resume"):
        Trainer(tiny_detector, samples, OPTIONS, tmp_path / "run")


def test_a_flipped_bit_of_a_checkpoint_is_noticed(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    samples, options = TrainingSet(data, AUGMENTATION), dataclasses.replace(OPTIONS, steps=2)
    trained = Trainer(tiny_detector, samples, options, tmp_path)
    trained.train()

    def state() -> dict[str, torch.Tensor]:
        trainer = Trainer(tiny_detector, samples, options, tmp_path)
        return {
            **tiny_detector.state_dict(),
            **trainer.result.state_dict(prefix="average."),
            "step": torch.tensor(trainer.step),
        }

    path = tmp_path / "checkpoint.pt"
    before, whole = {key: value.clone() for key, value in state().items()}, path.read_bytes()
    places = torch.randint(len(whole), (12,), generator=torch.Generator().manual_seed(0)).tolist()
    noticed = 0
    for place in [*places, *range(len(whole) - 3000, len(whole), 211)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            after = state()
        except UserError as error:
            noticed += 1
            assert str(error).startswith(f"cannot resume from {path}") and "\n" not in str(error)
        else:
            assert all(torch.equal(before[key], after[key]) for key in before), "it was in no byte that counts"
    assert noticed > 10


def test_damaged_metrics_do_not_end_a_run(
    tiny_detector: Detector, data: CocoVideo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = TrainingSet(data, AUGMENTATION)
    Trainer(tiny_detector, samples, OPTIONS, tmp_path).train()
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    bad = [b"{}\n", b"[]\n", b"}\n", b'{"step": null}\n', b"\xff\xfe\n", b"3\n", b'{"step": 1' + b"0" * 5000 + b"}\n"]
    path.write_bytes(b"".join([*good[:2], *bad, *good[2:], b'{"step": 6, "loss": 0.1']))
    assert Trainer(tiny_detector, samples, OPTIONS, tmp_path).step == 6
    Trainer(tiny_detector, samples, OPTIONS, tmp_path).train()
    assert path.read_bytes().splitlines(keepends=True) == good
    assert caplog.messages == [f"{path}: damaged lines are left out: 3, 4, 5, 6, 7, ..."]


def test_metrics_are_json_whatever_they_are(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(1, {"loss": 0.1234567, "ap": math.nan})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.123457, "ap": None}


def test_samples_depend_on_their_number_alone(data: CocoVideo) -> None:
    samples = TrainingSet(data, AUGMENTATION, seed=3)
    for n in (0, 5, 1000):
        (a, ta), (b, tb) = samples[n], samples[n]
        assert torch.equal(a, b)
        assert torch.equal(ta["boxes"], tb["boxes"])
    order = [sorted(int(samples[n][1]["labels"].sum()) for n in range(e * 4, e * 4 + 4)) for e in range(2)]
    assert order[0] == order[1]  # every epoch shows every picture once


def test_ranks_share_the_samples(data: CocoVideo) -> None:
    samples = TrainingSet(data, AUGMENTATION)
    alone = next(iter(training_loader(samples, batch=4, first_step=3)))[0]
    ranks = [next(iter(training_loader(samples, 2, first_step=3, rank=r, ranks=2)))[0] for r in range(2)]
    assert torch.equal(alone, torch.cat(ranks))


def test_augmented_boxes_follow_the_picture(data: CocoVideo) -> None:
    samples = TrainingSet(data, dataclasses.replace(AUGMENTATION, colour=0.0))
    for n in range(20):
        image, target = samples[n]
        for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
            inside = image[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            assert inside.numel() == 0 or inside.float().mean() > 180


def test_learning_rate_schedules() -> None:
    def rate(step: int, kind: Literal["cosine", "step"]) -> float:
        return learning_rate(step, 100, 1.0, 10, kind, (0.8, 0.9))

    assert rate(0, "cosine") == pytest.approx(0.1)
    assert rate(9, "cosine") == 1.0
    assert rate(55, "cosine") == pytest.approx(0.5)
    assert [rate(s, "step") for s in (50, 80, 90)] == pytest.approx([1.0, 0.1, 0.01])


def test_deeper_layers_learn_slower(tiny_detector: Detector) -> None:
    optimizer = make_optimizer(tiny_detector, 1.0, 0.05, 0.5)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    net = tiny_detector.backbone.net
    rates = [rate_of[id(block.attn.qkv.weight)] for block in net.blocks]
    assert rates == sorted(rates)
    assert rate_of[id(net.pos_embed)] < rates[0]
    assert rate_of[id(tiny_detector.roi_heads.box_predictor.cls_score.weight)] == 1.0
    assert len(rate_of) == len(list(tiny_detector.parameters()))
