"""Training of recognisers: end to end, or the temporal model and the heads alone on cached spatial outputs.

The paper trains in two stages: the gated spatial model runs once over all clips (`cache_features`), and temporal
model and heads learn from what it gave (`FeatureClips`). Losses are of logits; the official code takes a
softmax of a softmax.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.recognition.checkpoints import save_recogniser
from eventful_det.recognition.clips import recognise
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segments
from eventful_det.recognition.data.synthetic_actions import ActionClip, ActionOptions, mirrored, render_action
from eventful_det.recognition.data.views import frame_indices, normalise
from eventful_det.recognition.evaluation import Way
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.training.log import Log
from eventful_det.training.optim import learning_rate, set_learning_rate
from eventful_det.training.precision import autocast_dtype, make_scaler

Labels = dict[str, int]
Sample = tuple[Tensor, Labels, Tensor | None]
Batch = tuple[Tensor, dict[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class RecogniserTraining:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: clips per step, of all processes together.
        lr: peak learning rate; `warmup` steps lead to it, a cosine ends it.
        layer_decay: the rate of a spatial block is `layer_decay` times that of the next; the temporal model has all.
        frozen: spatial blocks, from the first on, that stay as they are, and the embedding with them.
        weight_decay: of AdamW; not of norms, biases, class tokens and positions.
        clip: largest norm of the gradient; 0 = any.
        ema: decay of the averaged weights that are written at the end; 0 = none.
        smoothing: of labels.
        amp: type of the products, see `training.precision.autocast_dtype`.
        seed: of all sampling.
        workers: processes that read, for each training process.
        seconds: stop after so many, as if all steps were done; the rate falls with the time; 0 = no limit.
        log_every, checkpoint_every: steps.
    """

    steps: int = 3000
    batch: int = 8
    lr: float = 3e-4
    warmup: int = 100
    layer_decay: float = 0.8
    frozen: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    smoothing: float = 0.0
    amp: str = "auto"
    seed: int = 0
    workers: int = 0
    seconds: float = 0.0
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"train.steps and train.batch must be at least 1, got {self.steps} and {self.batch}")


class Samples(Protocol):
    """What to learn from: an endless sequence, of which sample n follows from n alone."""

    def sample(self, n: int) -> Sample:
        """A view `(t, c, h, w)` normalised, or features `(V, T', D)`; its labels; and hints, if there are any.

        Hints `(T', K)` in [0, 1] are what a linear layer, which is thrown away, shall read from the spatial outputs.
        """


class SyntheticClips:
    """Synthetic actions: one view of `config.size` each, mirrored anew along random axes each time.

    A clip is rendered when it is first asked for, and kept in memory. Hints say where objects are.

    Args:
        recogniser: whose views they are.
        options: what they are like.
        seed: of clips and order.
        split: of the clips.
        count: of different clips.
    """

    def __init__(
        self, recogniser: Recogniser, options: ActionOptions, seed: int = 0, split: str = "train", count: int = 6000
    ) -> None:
        config = recogniser.config
        if options.frames < config.span:
            raise UserError(f"clips of {options.frames} frames are too short for views that span {config.span}")
        self.config, self.options, self.seed, self.split, self.count = config, options, seed, split, count
        self.rendered: dict[int, ActionClip] = {}

    def sample(self, n: int) -> Sample:
        """See `Samples`. The order is drawn anew for each round."""
        index = int(np.random.default_rng([self.seed, n // self.count]).permutation(self.count)[n % self.count])
        if index not in self.rendered:
            frames = range(0, self.config.span, self.config.stride)
            self.rendered[index] = render_action(self.options, self.seed, index, self.split, frames)
        rng = np.random.default_rng([self.seed, n, 7])
        clip = mirrored(self.rendered[index], *(axis for axis in ("x", "y", "time") if rng.random() < 0.5))
        view = normalise(torch.from_numpy(clip.frames).permute(0, 3, 1, 2), self.config)
        hints = torch.from_numpy(clip.coverage).unflatten(0, (self.config.steps, -1)).mean(1).flatten(1)
        return centre(view, self.config.size), {next(iter(self.config.classes)): clip.label}, hints


class VideoClips:
    """Views of segments of videos, at a random moment and place; in an order drawn anew for each round."""

    def __init__(self, recogniser: Recogniser, segments: Segments, seed: int = 0) -> None:
        self.config, self.segments, self.seed = recogniser.config, segments, seed

    def sample(self, n: int) -> Sample:
        """See `Samples`. A segment that cannot be read gives way to the next."""
        count = len(self.segments)
        order = np.random.default_rng([self.seed, n // count]).permutation(count)
        rng = np.random.default_rng([self.seed, n, 11])
        chosen = [self.segments.items[order[(n + i) % count]] for i in range(min(count, 20))]
        for segment, clip in read_clips(chosen, self.config, shared=False):
            if isinstance(clip, UserError):
                continue
            start = int(rng.integers(max(1, self.config.temporal_views)))
            numbers = frame_indices(len(clip), self.config)[start]
            frames = normalise(clip[numbers], self.config)
            top, left = (
                int(rng.integers(outer - inner + 1))
                for outer, inner in zip(frames.shape[-2:], self.config.size, strict=True)
            )
            view = frames[..., top : top + self.config.size[0], left : left + self.config.size[1]]
            return view, dict(segment.labels), None
        raise UserError(f"20 segments in a row cannot be read, {chosen[0].video} the first of them")


class FeatureClips:
    """Cached spatial outputs, written by `cache_features`; in an order drawn anew for each round."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.seed = seed
        if not self.files:
            raise UserError(f"no cached features in {folder}; write them first")

    def sample(self, n: int) -> Sample:
        """See `Samples`."""
        count = len(self.files)
        order = np.random.default_rng([self.seed, n // count]).permutation(count)
        return *read_features(self.files[order[n % count]]), None


def centre(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The central crop of frames `(..., H, W)`."""
    top, left = (frames.shape[-2] - size[0]) // 2, (frames.shape[-1] - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]


def cache_features(
    recogniser: Recogniser,
    segments: Segments,
    folder: Path,
    way: Way,
    on_clip: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """The first stage: run the spatial model over all clips and write what it gives, a file for each.

    Files that are there already are kept, so that an interrupted run goes on. Each holds `spatial (V, T', D)` in half
    precision and a label for each head.

    Args:
        recogniser: in evaluation mode.
        segments: labelled clips.
        folder: of the files.
        way: how the spatial model runs; train with the one that will be used.
        on_clip: told how many clips are done.

    Returns:
        Segments that could not be read, and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    waiting = [(i, segment) for i, segment in enumerate(segments.items) if not (folder / f"{i:06d}.npz").is_file()]
    clips = read_clips((segment for _, segment in waiting), recogniser.config, way.shared)
    for (i, _), (segment, clip) in zip(waiting, clips, strict=True):
        if isinstance(clip, UserError):
            failed[segment.name] = str(clip)
        else:
            result = recognise(recogniser, clip, rule=way.rule, selector=way.selector, shared=way.shared, hold=way.hold)
            features = result.features.to(torch.float16).cpu().numpy()
            with written_whole(folder / f"{i:06d}.npz") as part, part.open("wb") as file:
                labels = {f"label_{head}": np.array(label) for head, label in segment.labels.items()}
                np.savez(file, allow_pickle=False, spatial=features, **labels)
        if on_clip is not None:
            on_clip(i + 1)
    return failed


def read_features(path: Path) -> tuple[Tensor, Labels]:
    """A file of `cache_features`, or of the official code's `spatial` scripts: `(V, T', D)`, and labels."""
    try:
        with np.load(path, allow_pickle=False) as data:
            features = torch.from_numpy(data["spatial"]).float()
            labels = {key.removeprefix("label_"): int(data[key]) for key in data.files if key.startswith("label_")}
            if "label" in data.files:
                labels[""] = int(data["label"])  # of the first head
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds no cached features ({error})") from None
    return features, labels


class _Loss(nn.Module):
    """Losses of each head from views `(B, t, c, h, w)`, or from features `(B, V, T', D)` averaged over the views."""

    def __init__(self, recogniser: Recogniser, smoothing: float, hints: int) -> None:
        super().__init__()
        self.recogniser, self.smoothing = recogniser, smoothing
        self.hint = nn.Linear(recogniser.config.dim, hints).to(recogniser.device) if hints else None

    def forward(self, x: Tensor, labels: Mapping[str, Tensor], hints: Tensor | None) -> dict[str, Tensor]:
        losses = {}
        if x.dim() == 5:
            features = self.recogniser.spatial(x)
            logits = self.recogniser.temporal(features)
            if self.hint is not None and hints is not None:
                losses["hints"] = F.binary_cross_entropy_with_logits(self.hint(features).float(), hints)
        else:
            each = self.recogniser.temporal(x.flatten(0, 1))
            logits = {head: values.unflatten(0, x.shape[:2]).mean(1) for head, values in each.items()}
        for head, label in labels.items():
            losses[head] = F.cross_entropy(logits[head].float(), label, ignore_index=-1, label_smoothing=self.smoothing)
        main, label = next(iter(labels.items()))
        losses["right"] = (logits[main].argmax(-1) == label).float().mean().detach()
        return losses


class RecogniserTrainer:
    """Trains a recogniser; the run directory holds all there is to go on from.

    Files: `checkpoint.pt` (replaced whole), `metrics.jsonl`, `tensorboard/` where it is installed, and at the end
    `model.safetensors`. Runs in one process or, under torch.distributed, in many.

    Args:
        recogniser: on its device.
        samples: views to train end to end; features to train the temporal model and the heads alone.
        options: how.
        directory: of the run; an unfinished run in it is continued.
        on_step: told the step and its metrics after every step of the main process.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        samples: Samples,
        options: RecogniserTraining,
        directory: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recogniser, self.samples, self.options, self.directory = recogniser, samples, options, directory
        self.on_step = on_step
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if options.batch % self.ranks:
            raise UserError(f"train.batch ({options.batch}) must be a multiple of the {self.ranks} processes")
        self.device = recogniser.device
        self.dtype = autocast_dtype(options.amp, self.device)
        self.scaler = make_scaler(self.dtype, self.device)
        if isinstance(samples, FeatureClips):
            recogniser.embedding.requires_grad_(False)
            recogniser.spatial_model.requires_grad_(False)
        if options.frozen:
            below = [recogniser.embedding, recogniser.spatial_model.backbone.position_encoding]
            for module in [*below, *recogniser.spatial_model.backbone.blocks[: options.frozen]]:
                module.requires_grad_(False)
            recogniser.spatial_model.class_token.requires_grad_(False)
        hints = samples.sample(0)[2]
        loss = _Loss(recogniser, options.smoothing, 0 if hints is None else hints.shape[-1])
        groups = parameter_groups(recogniser, options)
        if loss.hint is not None:
            groups.append({"params": list(loss.hint.parameters()), "lr": options.lr, "weight_decay": 0.0})
        self.hint = loss.hint
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.average = (
            AveragedModel(recogniser, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        )
        self.step, self.spent = 0, 0.0
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.loss: nn.Module = DistributedDataParallel(loss) if self.ranks > 1 else loss

    @property
    def result(self) -> Recogniser:
        """The weights to use: averaged ones when there are any."""
        return self.recogniser if self.average is None else self.average.module  # type: ignore[return-value]

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or, where there is a limit, by time."""
        by_time = self.spent / self.options.seconds if self.options.seconds else 0.0
        return min(1.0, max(self.step / self.options.steps, by_time))

    def train(self) -> Recogniser:
        """Train to the end and return the model in evaluation mode.

        Raises:
            UserError: the loss is not finite.
        """
        log = Log(self.directory, self.step) if self.rank == 0 else None
        batches = self._batches()
        self.loss.train()
        while self.progress < 1:
            began = time.perf_counter()
            metrics = self._train_step(*next(batches))
            metrics["seconds"] = time.perf_counter() - began
            self.step, self.spent = self.step + 1, self.spent + metrics["seconds"]
            if log is not None:
                self._after_step(log, metrics)
        if log is not None:
            log.close()
            save_recogniser(self.result, self.directory / "model.safetensors")
        return self.result.eval()

    def _batches(self) -> Iterator[Batch]:
        """What is left of the endless sequence of this process's batches."""
        share = self.options.batch // self.ranks
        data = _Indexed(self.samples, tuple(self.recogniser.config.classes), self.step, share, self.rank, self.ranks)
        return iter(DataLoader(data, batch_size=None, num_workers=self.options.workers))

    def _train_step(self, x: Tensor, labels: dict[str, Tensor], hints: Tensor | None) -> dict[str, float]:
        options = self.options
        # All randomness of a step follows from its number: a resumed run repeats what the killed one would have done.
        torch.manual_seed((options.seed * 1_000_003 + self.step) * self.ranks + self.rank)
        place = int(self.progress * options.steps)
        set_learning_rate(self.optimizer, learning_rate(place, options.steps, options.lr, options.warmup, "cosine", ()))
        x, labels = x.to(self.device), {head: label.to(self.device) for head, label in labels.items()}
        # On CPUs the fused attention's backward pass takes longer than all the rest, sequences being short.
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        mixed = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with attention, mixed:
            losses = self.loss(x, labels, None if hints is None else hints.to(self.device))
        right = losses.pop("right")
        total = torch.stack(list(losses.values())).sum()
        if not total.isfinite():
            raise UserError(f"the loss of step {self.step} is {float(total)}; lower train.lr")
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.recogniser.parameters(), options.clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.recogniser)
        return {f"loss_{head}": loss.item() for head, loss in losses.items()} | {"right": right.item()}

    def _after_step(self, log: Log, metrics: dict[str, float]) -> None:
        if self.step % self.options.log_every == 0 or self.progress >= 1:
            log.write(self.step, metrics)
        if self.step % self.options.checkpoint_every == 0 or self.progress >= 1:
            with written_whole(self._checkpoint) as part:
                torch.save(self._state(), part)
        if self.on_step is not None:
            self.on_step(self.step, metrics)

    @property
    def _checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def _state(self) -> dict[str, object]:
        return {
            "step": self.step,
            "spent": self.spent,
            "options": asdict(self.options),
            "model": self.recogniser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "hint": None if self.hint is None else self.hint.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def _resume(self) -> None:
        if not self._checkpoint.is_file():
            return
        try:
            saved = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
            free = {"log_every", "checkpoint_every", "workers"}
            changed = [k for k, v in asdict(self.options).items() if k not in free and saved["options"].get(k) != v]
            if changed:
                raise UserError(
                    f"{self._checkpoint} was trained with another {changed[0]}; give it the same, or start anew"
                )
            self.recogniser.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.hint is not None:
                self.hint.load_state_dict(saved["hint"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.step, self.spent = int(saved["step"]), float(saved["spent"])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._checkpoint} cannot be continued ({type(error).__name__}); remove it") from error


class _Indexed(Dataset[Batch]):
    """Batches of samples by their number, from a step on."""

    def __init__(self, samples: Samples, heads: tuple[str, ...], first: int, share: int, rank: int, ranks: int) -> None:
        self.samples, self.heads = samples, heads
        self.first, self.share, self.rank, self.ranks = first, share, rank, ranks

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, i: int) -> Batch:
        begin = ((self.first + i) * self.ranks + self.rank) * self.share
        views, labels, hints = zip(*(self.samples.sample(begin + j) for j in range(self.share)), strict=True)
        named = [{(head or self.heads[0]): label for head, label in each.items()} for each in labels]
        known = [head for head in self.heads if any(head in each for each in named)]
        together = None if hints[0] is None else torch.stack(hints)
        return torch.stack(views), {h: torch.tensor([each.get(h, -1) for each in named]) for h in known}, together


def parameter_groups(recogniser: Recogniser, options: RecogniserTraining) -> list[dict[str, object]]:
    """Parameters by learning rate and weight decay; each group holds its share of the rate as "lr_scale"."""
    depth = len(recogniser.spatial_model.backbone.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in recogniser.named_parameters():
        if not parameter.requires_grad:
            continue
        below = depth + 1  # blocks above the parameter, the embedding below them all
        if name.startswith("spatial_model.backbone.blocks."):
            below = depth - int(name.split(".")[3])
        elif not name.startswith(("embedding.", "spatial_model.")) or name.startswith("spatial_model.layer_norm"):
            below = 0
        decays = parameter.ndim > 1 and not name.endswith(("class_token", "encoding"))
        key = options.layer_decay**below, options.weight_decay * decays
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": options.lr * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
