"""A trainer for one or many processes that resumes exactly after a kill."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

from eventful_det.data.training_set import Labels, Samples, training_loader
from eventful_det.detectors.checkpoints.files import save_detector
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.training.log import Log
from eventful_det.training.optim import learning_rate, make_optimizer, set_learning_rate
from eventful_det.training.options import FREE, TrainOptions
from eventful_det.training.precision import autocast_dtype, make_scaler

Batch = tuple[Tensor, list[Labels]]
SCORE = "ap50"  # the entry of an evaluation by which the best weights are kept


class Trainer:
    """Trains a detector; the run directory holds all there is to go on from.

    Files: `checkpoint.pt` (replaced atomically), `metrics.jsonl` (one line per logged step), `tensorboard/`,
    `best.safetensors` where it is evaluated while training, and at the end `model.safetensors`. Weights of RF-DETR lie
    in folders as `transformers` writes them: `best`, and at the end the run directory.

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
        self.detector, self.data, self.options, self.directory = detector, data, options, directory
        self.on_step, self.evaluate = on_step, evaluate
        self.objective = detector if objective is None else objective
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.share, self.at_once = options.shares(self.ranks)
        self.device = detector.device
        self.dtype = autocast_dtype(options.amp, self.device)
        self.scaler = make_scaler(self.dtype, self.device)
        if isinstance(detector, Detector):
            detector.backbone.net.set_grad_checkpointing(options.checkpointing)
        elif options.checkpointing:
            raise UserError("train.checkpointing is for ViTDet; RF-DETR is trained without")
        self.optimizer = make_optimizer(detector, options.lr, options.weight_decay, options.layer_decay)
        self.average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        self.step, self.best_score = 0, -1.0
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.model = DistributedDataParallel(self.objective) if self.ranks > 1 else self.objective

    @property
    def result(self) -> Detector | EventfulRFDETR:
        """The weights to use: averaged ones when there are any."""
        return self.detector if self.average is None else self.average.module  # type: ignore[return-value]

    def batches(self) -> Iterator[Batch]:
        """What is left of the endless sequence of this process's batches."""
        options = self.options
        return iter(training_loader(self.data, self.share, self.step, options.workers, self.rank, self.ranks))

    def train(self) -> Detector | EventfulRFDETR:
        """Train to the end and return the model in evaluation mode.

        Raises:
            UserError: the loss is not finite.
        """
        options = self.options
        log = Log(self.directory, self.step) if self.rank == 0 else None
        batches = self.batches() if self.step < options.steps else iter(())
        self.objective.train()
        while self.step < options.steps:
            began = time.perf_counter()
            metrics = self._train_step(*next(batches))
            metrics["seconds"] = time.perf_counter() - began
            self.step += 1
            if log is not None:
                self._after_step(log, metrics)
        if log is not None:
            log.close()
            self._save_weights("model")
        return self.result.eval()

    def losses(self, images: Tensor, targets: list[Labels]) -> dict[str, Tensor]:
        """Losses of some images `(b, 3, h, w)` uint8 (or clips of them), in the precision of the training."""
        images = images.to(self.device, non_blocking=True).float().div_(255)
        targets = tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), targets)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def add_gradients(self, images: Tensor, targets: list[Labels]) -> dict[str, float]:
        """Forward and backward pass of a batch, piece by piece; returns its mean losses."""
        totals: dict[str, float] = {}
        pieces = self.share // self.at_once
        for i in range(0, self.share, self.at_once):
            last = i + self.at_once == self.share
            with nullcontext() if last or self.ranks == 1 else self.model.no_sync():  # type: ignore[operator]
                losses = self.losses(images[i : i + self.at_once], targets[i : i + self.at_once])
                self.scaler.scale(torch.stack(list(losses.values())).sum() / pieces).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.item() / pieces
        return totals

    def _train_step(self, images: Tensor, targets: list[Labels]) -> dict[str, float]:
        options = self.options
        # All randomness of a step follows from its number: a resumed run repeats what the killed one would have done.
        torch.manual_seed((options.seed * 1_000_003 + self.step) * self.ranks + self.rank)
        rate = learning_rate(self.step, options.steps, options.lr, options.warmup, options.schedule, options.milestones)
        set_learning_rate(self.optimizer, rate)
        totals = self.add_gradients(images, targets)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.detector.parameters(), options.clip or float("inf")))
        total = sum(totals.values())
        # With loss scaling a gradient may overflow: the scaler then skips the step and lowers the scale.
        if not (total < float("inf") and (norm < float("inf") or self.scaler.is_enabled())):
            raise UserError(f"the loss is not finite at step {self.step}; lower train.lr (now {options.lr})")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.detector)
        return {**totals, "loss": total, "grad_norm": norm, "lr": rate}

    def _after_step(self, log: Log, metrics: dict[str, float]) -> None:
        """What the main process does between two steps."""
        options, end = self.options, self.step == self.options.steps
        if self.step % options.log_every == 0 or end:
            log.write(self.step, metrics)
        if self.evaluate is not None and options.eval_every and (self.step % options.eval_every == 0 or end):
            scores = self.evaluate(self.result)
            log.write(self.step, {f"val_{name}": value for name, value in scores.items()}, "val")
            if scores[SCORE] > self.best_score:
                self.best_score = scores[SCORE]
                self._save_weights("best")
        if self.step % options.checkpoint_every == 0 or end:
            self._save_checkpoint()
        if self.on_step is not None:
            self.on_step(self.step, metrics)

    def _save_weights(self, name: str) -> None:
        notes = {"training": json.dumps(asdict(self.options)), "step": str(self.step)}
        result = self.result
        if isinstance(result, Detector):
            save_detector(result, self.directory / f"{name}.safetensors", torch.float32, notes)
        else:
            model: Any = result.model  # of transformers
            model.save_pretrained(self.directory if name == "model" else self.directory / name)

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "best_score": self.best_score,
            "options": json.dumps(asdict(self.options)),
            "model": self.detector.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with written_whole(self.directory / "checkpoint.pt") as part:
            torch.save(state, part)

    def _resume(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            with zipfile.ZipFile(path) as archive:  # PyTorch writes a checksum for each tensor, but does not look at it
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is damaged")
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            before = json.loads(state["options"])
            self.detector.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average is not None and state["average"] is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.best_score = int(state["step"]), float(state["best_score"])
        except Exception as error:
            reason = (str(error) or repr(error)).split("\n")[0]
            raise UserError(f"cannot resume from {path} ({reason}); delete it or choose another output") from error
        now = json.loads(json.dumps(asdict(self.options)))
        changed = [k for k in now if before.get(k) != now[k] and k not in FREE]
        if changed:
            raise UserError(
                f"{path} was made with other values of train.{', train.'.join(changed)}; "
                "use the same values, or choose another run directory"
            )
