"""A trainer for one or many processes that resumes exactly after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

from eventful_det.data.training_set import Target, TrainingSet, training_loader
from eventful_det.errors import UserError
from eventful_det.models.checkpoints import save_detector
from eventful_det.models.detector import Detector
from eventful_det.training.optim import learning_rate, make_optimizer, set_learning_rate


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: images per step and process.
        accumulate: the batch is worked off in this many pieces, to save memory.
        lr: peak learning rate; `warmup` steps lead to it; `schedule` is "cosine" or "step" with `milestones`.
        weight_decay, layer_decay: of AdamW; the rate of a block is `layer_decay` times that of the next.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights that are written at the end; 0 = none.
        amp: bfloat16 where that is faster: on GPUs, and on CPUs with matrix units (AMX).
        checkpointing: recompute activations of the blocks in the backward pass, to save memory.
        seed: of the order, the augmentation and all sampling.
        workers: processes that read and augment.
        log_every, checkpoint_every: steps.
    """

    steps: int = 3000
    batch: int = 8
    accumulate: int = 1
    lr: float = 4e-4
    warmup: int = 100
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.89, 0.96)
    weight_decay: float = 0.05
    layer_decay: float = 0.8
    clip: float = 1.0
    ema: float = 0.998
    amp: bool = True
    checkpointing: bool = False
    seed: int = 0
    workers: int = 1
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        if self.batch % self.accumulate:
            raise UserError(f"train.accumulate ({self.accumulate}) must divide train.batch ({self.batch})")
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"train.steps and train.batch must be at least 1, got {self.steps} and {self.batch}")


class Trainer:
    """Trains a detector; the run directory holds all there is to go on from.

    Files: `checkpoint.pt` (replaced atomically), `metrics.jsonl` (one line per logged step), `tensorboard/`, and at
    the end `model.safetensors`.

    Args:
        detector: the model, on its device.
        data: training samples.
        options: how to train.
        directory: of the run; an unfinished run in it is continued.
        on_step: called with step and its metrics after every step of the main process.
        objective: gives the losses of images and targets in training mode; by default those of the detector.
    """

    def __init__(
        self,
        detector: Detector,
        data: TrainingSet,
        options: TrainOptions,
        directory: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        objective: nn.Module | None = None,
    ) -> None:
        self.detector, self.data, self.options, self.directory = detector, data, options, directory
        self.on_step = on_step
        self.objective = detector if objective is None else objective
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.device = detector.device
        detector.backbone.net.set_grad_checkpointing(options.checkpointing)
        self.optimizer = make_optimizer(detector, options.lr, options.weight_decay, options.layer_decay)
        self.average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        self.step = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def best(self) -> Detector:
        """The weights to use: averaged ones when there are any."""
        return self.detector if self.average is None else self.average.module  # type: ignore[return-value]

    def train(self) -> Detector:
        """Train to the end and return the model in evaluation mode.

        Raises:
            UserError: the loss is not finite.
        """
        options = self.options
        model = DistributedDataParallel(self.objective) if self.ranks > 1 else self.objective
        loader = training_loader(self.data, options.batch, self.step, options.workers, self.rank, self.ranks)
        log = _Log(self.directory, self.step) if self.rank == 0 else None
        batches: Iterator[tuple[Tensor, list[Target]]] = iter(loader) if self.step < options.steps else iter(())
        self.objective.train()
        while self.step < options.steps:
            began = time.perf_counter()
            metrics = self._train_step(model, *next(batches))
            metrics["seconds"] = time.perf_counter() - began
            self.step += 1
            if log is not None:
                if self.step % options.log_every == 0 or self.step == options.steps:
                    log.write(self.step, metrics)
                if self.step % options.checkpoint_every == 0 or self.step == options.steps:
                    self._save_checkpoint()
                if self.on_step is not None:
                    self.on_step(self.step, metrics)
        if log is not None:
            log.close()
            notes = {"training": json.dumps(asdict(options))}
            save_detector(self.best, self.directory / "model.safetensors", torch.float32, notes)
        return self.best.eval()

    def _train_step(self, model: nn.Module, images: Tensor, targets: list[Target]) -> dict[str, float]:
        options = self.options
        # All randomness of a step follows from its number: a resumed run repeats what the killed one would have done.
        torch.manual_seed((options.seed * 1_000_003 + self.step) * self.ranks + self.rank)
        rate = learning_rate(self.step, options.steps, options.lr, options.warmup, options.schedule, options.milestones)
        set_learning_rate(self.optimizer, rate)
        totals: dict[str, float] = {}
        piece = options.batch // options.accumulate
        for i in range(0, options.batch, piece):
            last = i + piece == options.batch
            with nullcontext() if last or self.ranks == 1 else model.no_sync():  # type: ignore[operator]
                losses = self._losses(model, images[i : i + piece], targets[i : i + piece])
                (sum(losses.values(), torch.zeros((), device=self.device)) / options.accumulate).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.item() / options.accumulate
        norm = float(nn.utils.clip_grad_norm_(self.detector.parameters(), options.clip))
        total = sum(totals.values())
        if not (total < float("inf") and norm < float("inf")):
            raise UserError(f"the loss is not finite at step {self.step}; lower train.lr (now {options.lr})")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.detector)
        return {**totals, "loss": total, "grad_norm": norm, "lr": rate}

    def _losses(self, model: nn.Module, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        images = images.to(self.device, non_blocking=True).float().div_(255)
        targets = tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), targets)
        enabled = self.options.amp and _has_fast_bfloat16(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses: dict[str, Tensor] = model(images, targets)
        return losses

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "options": json.dumps(asdict(self.options)),
            "model": self.detector.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path = self.directory / "checkpoint.pt"
        part = path.with_name("checkpoint.pt.part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def _resume(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            before = json.loads(state["options"])
            self.detector.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None and state["average"] is not None:
                self.average.load_state_dict(state["average"])
            self.step = int(state["step"])
        except Exception as error:
            raise UserError(f"cannot resume from {path} ({error}); delete it or choose another output") from error
        now = json.loads(json.dumps(asdict(self.options)))
        changed = [k for k in now if before.get(k) != now[k] and k not in ("log_every", "checkpoint_every", "workers")]
        if changed:
            raise UserError(
                f"{path} was made with other values of train.{', train.'.join(changed)}; "
                "use the same values, or choose another run directory"
            )


def _has_fast_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())


class _Log:
    """metrics.jsonl and TensorBoard; lines beyond the resumed step are dropped."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.board = SummaryWriter(directory / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.board.close()
