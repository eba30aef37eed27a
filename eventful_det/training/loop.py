"""What all training has in common: steps in one or many processes, logs, and an exact resume after a kill."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eventful_det.errors import UserError, first_line
from eventful_det.files import written_whole
from eventful_det.training.log import Log
from eventful_det.training.optim import learning_rate, set_learning_rate
from eventful_det.training.options import FREE, TrainOptions
from eventful_det.training.precision import autocast_dtype, make_scaler

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")


class TrainingLoop(Generic[M, B]):
    """Trains a model `M` on batches `B`; the run directory holds all there is to go on from.

    Files: `checkpoint.pt` (replaced atomically), `metrics.jsonl` (one line per logged step), `tensorboard/`, and at the
    end the weights.

    Args:
        network: the model, on its device.
        objective: holds the model or is it; in training mode.
        optimizer: of its parameters.
        options: how to train.
        directory: of the run; an unfinished run in it is continued.
        on_step: called with step and its metrics after every step of the main process.
        besides: modules that are trained with the model and thrown away at the end.
    """

    def __init__(
        self,
        network: M,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: TrainOptions,
        directory: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        besides: nn.Module | None = None,
    ) -> None:
        self.network, self.objective, self.optimizer, self.besides = network, objective, optimizer, besides
        self.options, self.directory, self.on_step = options, directory, on_step
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.share, self.at_once = options.shares(self.ranks)
        self.device = next(network.parameters()).device
        self.dtype = autocast_dtype(options.amp, self.device)
        self.scaler = make_scaler(self.dtype, self.device)
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        self.step, self.best_score = 0, -1.0
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.model = DistributedDataParallel(objective) if self.ranks > 1 else objective

    def batches(self) -> Iterator[B]:
        """What is left of the endless sequence of this process's batches."""
        raise NotImplementedError

    def pieces(self, batch: B) -> Iterator[B]:
        """A batch in parts of `at_once` samples."""
        raise NotImplementedError

    def losses(self, piece: B) -> dict[str, Tensor]:
        """Losses of a part of a batch, in the precision of the training; those without a gradient are measures."""
        raise NotImplementedError

    def judge(self, log: Log) -> None:
        """Look how good the model is; called by the main process every `options.eval_every` steps."""

    def save_weights(self, name: str) -> None:
        """Write the result in a file of this name."""
        raise NotImplementedError

    @property
    def result(self) -> M:
        """The weights to use: averaged ones when there are any."""
        return self.network if self.average is None else cast(M, self.average.module)

    def train(self) -> M:
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
            metrics = self._train_step(next(batches))
            metrics["seconds"] = time.perf_counter() - began
            self.step += 1
            if log is not None:
                self._after_step(log, metrics)
        if log is not None:
            log.close()
            self.save_weights("model")
        return self.result.eval()

    def add_gradients(self, batch: B) -> dict[str, float]:
        """Forward and backward pass of a batch, piece by piece; returns its mean losses and "loss", their sum."""
        totals = {"loss": 0.0}
        pieces = self.share // self.at_once
        for i, piece in enumerate(self.pieces(batch), 1):
            with nullcontext() if i == pieces or self.ranks == 1 else self.model.no_sync():  # type: ignore[operator]
                losses = self.losses(piece)
                total = torch.stack([loss for loss in losses.values() if loss.requires_grad]).sum()
                self.scaler.scale(total / pieces).backward()
            for name, loss in {"loss": total, **losses}.items():
                totals[name] = totals.get(name, 0.0) + loss.item() / pieces
        return totals

    def _train_step(self, batch: B) -> dict[str, float]:
        options = self.options
        # All randomness of a step follows from its number: a resumed run repeats what the killed one would have done.
        torch.manual_seed((options.seed * 1_000_003 + self.step) * self.ranks + self.rank)
        rate = learning_rate(self.step, options.steps, options.lr, options.warmup, options.schedule, options.milestones)
        set_learning_rate(self.optimizer, rate)
        totals = self.add_gradients(batch)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), options.clip or float("inf")))
        # With loss scaling a gradient may overflow: the scaler then skips the step and lowers the scale.
        if not (totals["loss"] < float("inf") and (norm < float("inf") or self.scaler.is_enabled())):
            raise UserError(f"the loss is not finite at step {self.step}; lower train.lr (now {options.lr})")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.network)
        return {**totals, "grad_norm": norm, "lr": rate}

    def _after_step(self, log: Log, metrics: dict[str, float]) -> None:
        """What the main process does between two steps."""
        options, end = self.options, self.step == self.options.steps
        if self.step % options.log_every == 0 or end:
            log.write(self.step, metrics)
        if options.eval_every and (self.step % options.eval_every == 0 or end):
            self.judge(log)
        if self.step % options.checkpoint_every == 0 or end:
            self._save_checkpoint()
        if self.on_step is not None:
            self.on_step(self.step, metrics)

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "best_score": self.best_score,
            "options": json.dumps(asdict(self.options)),
            "model": self.network.state_dict(),
            "besides": None if self.besides is None else self.besides.state_dict(),
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
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.besides is not None:
                self.besides.load_state_dict(state["besides"])
            if self.average is not None and state["average"] is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.best_score = int(state["step"]), float(state["best_score"])
        except Exception as error:
            raise UserError(
                f"cannot resume from {path} ({first_line(error)}); delete it or choose another output"
            ) from error
        now = json.loads(json.dumps(asdict(self.options)))
        changed = [k for k in now if before.get(k) != now[k] and k not in FREE]
        if changed:
            raise UserError(
                f"{path} was made with other values of train.{', train.'.join(changed)}; "
                "use the same values, or choose another run directory"
            )
