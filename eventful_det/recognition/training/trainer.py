"""The trainer of recognisers. Losses are of logits; the official code takes a softmax of a softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from eventful_det.recognition.checkpoints import save_recogniser
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.training.features import FeatureClips
from eventful_det.recognition.training.samples import Samples
from eventful_det.training.loop import TrainingLoop
from eventful_det.training.options import TrainOptions

Batch = tuple[Tensor, dict[str, Tensor], Tensor | None]


class RecogniserTrainer(TrainingLoop[Recogniser, Batch]):
    """Trains a recogniser, see `TrainingLoop`.

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
        options: TrainOptions,
        directory: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.samples = samples
        if isinstance(samples, FeatureClips):
            recogniser.embedding.requires_grad_(False)
            recogniser.spatial_model.requires_grad_(False)
        hints = samples.sample(0)[2]
        loss = _Loss(recogniser, 0 if hints is None else hints.shape[-1])
        groups = parameter_groups(recogniser, options)
        if loss.hint is not None:
            groups.append({"params": list(loss.hint.parameters()), "lr": options.lr, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=options.lr)
        super().__init__(recogniser, loss, optimizer, options, directory, on_step, besides=loss.hint)

    def batches(self) -> Iterator[Batch]:
        """See `TrainingLoop`."""
        heads = tuple(self.network.config.classes)
        data = _Indexed(self.samples, heads, self.step, self.share, self.rank, self.ranks)
        return iter(DataLoader(data, batch_size=None, num_workers=self.options.workers))

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """See `TrainingLoop`."""
        x, labels, hints = batch
        for i in range(0, len(x), self.at_once):
            part = slice(i, i + self.at_once)
            own = {head: label[part] for head, label in labels.items()}
            yield x[part], own, None if hints is None else hints[part]

    def losses(self, piece: Batch) -> dict[str, Tensor]:
        """Losses of some views `(b, t, c, h, w)` or features `(b, V, T', D)`, and the share that is right."""
        x, labels, hints = piece
        labels = {head: label.to(self.device) for head, label in labels.items()}
        # On CPUs the fused attention's backward pass takes longer than all the rest, sequences being short.
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        mixed = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with attention, mixed:
            losses: dict[str, Tensor] = self.model(
                x.to(self.device), labels, None if hints is None else hints.to(self.device)
            )
        return losses

    def save_weights(self, name: str) -> None:
        """See `TrainingLoop`."""
        save_recogniser(self.result, self.directory / f"{name}.safetensors")


class _Loss(nn.Module):
    """Losses of each head from views `(B, t, c, h, w)`, or from features `(B, V, T', D)` averaged over the views."""

    def __init__(self, recogniser: Recogniser, hints: int) -> None:
        super().__init__()
        self.recogniser = recogniser
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
            losses[head] = F.cross_entropy(logits[head].float(), label, ignore_index=-1)
        main, label = next(iter(labels.items()))
        found = {f"loss_{name}": loss for name, loss in losses.items()}
        return found | {"right": (logits[main].argmax(-1) == label).float().mean()}


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


def parameter_groups(recogniser: Recogniser, options: TrainOptions) -> list[dict[str, object]]:
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
