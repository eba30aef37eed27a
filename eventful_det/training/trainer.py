"""A trainer of detectors for one or many processes that resumes exactly after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eventful_det.data.training_set import Labels, Samples, training_loader
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.training.log import Log
from eventful_det.training.loop import TrainingLoop
from eventful_det.training.optim import make_optimizer
from eventful_det.training.options import TrainOptions

Batch = tuple[Tensor, list[Labels]]
SCORE = "ap50"  # the entry of an evaluation by which the best weights are kept


class Trainer(TrainingLoop[Detector | EventfulRFDETR, Batch]):
    """Trains a detector, see `TrainingLoop`.

    Files besides: `best.safetensors` where it is evaluated while training, and at the end `model.safetensors`. Weights
    of RF-DETR lie in folders as `transformers` writes them: `best`, and at the end the run directory.

    Args:
        detector: the model, on its device.
        data: training samples.
        options: how to train.
        directory: of the run; an unfinished run in it is continued.
        on_step: called with step and its metrics after every step of the main process.
        objective: gives the losses of images and targets in training mode; by default those of the detector.
        evaluate: gives numbers of a detector, "ap50" among them; called every `options.eval_every` steps.
    """

    def __init__(
        self,
        detector: Detector | EventfulRFDETR,
        data: Samples,
        options: TrainOptions,
        directory: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        objective: nn.Module | None = None,
        evaluate: Callable[[Detector | EventfulRFDETR], dict[str, float]] | None = None,
    ) -> None:
        self.data, self.evaluate = data, evaluate
        if isinstance(detector, Detector):
            detector.backbone.net.set_grad_checkpointing(options.checkpointing)
        elif options.checkpointing:
            raise UserError("train.checkpointing is for ViTDet; RF-DETR is trained without")
        optimizer = make_optimizer(detector, options.lr, options.weight_decay, options.layer_decay)
        super().__init__(detector, detector if objective is None else objective, optimizer, options, directory, on_step)

    def batches(self) -> Iterator[Batch]:
        """See `TrainingLoop`."""
        options = self.options
        return iter(training_loader(self.data, self.share, self.step, options.workers, self.rank, self.ranks))

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """See `TrainingLoop`."""
        images, targets = batch
        for i in range(0, len(images), self.at_once):
            yield images[i : i + self.at_once], targets[i : i + self.at_once]

    def losses(self, piece: Batch) -> dict[str, Tensor]:
        """Losses of some images `(b, 3, h, w)` uint8 (or clips of them), in the precision of the training."""
        images, targets = piece
        images = images.to(self.device, non_blocking=True).float().div_(255)
        targets = tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), targets)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def judge(self, log: Log) -> None:
        """Evaluate, and keep the best weights."""
        if self.evaluate is None:
            return
        scores = self.evaluate(self.result)
        log.write(self.step, {f"val_{name}": value for name, value in scores.items()}, "val")
        if scores[SCORE] > self.best_score:
            self.best_score = scores[SCORE]
            self.save_weights("best")

    def save_weights(self, name: str) -> None:
        """See `TrainingLoop`."""
        notes = {"training": json.dumps(asdict(self.options)), "step": str(self.step)}
        result = self.result
        if isinstance(result, Detector):
            save_detector(result, self.directory / f"{name}.safetensors", torch.float32, notes)
        else:
            model: Any = result.model  # of transformers
            model.save_pretrained(self.directory if name == "model" else self.directory / name)
