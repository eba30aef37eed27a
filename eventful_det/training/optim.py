"""Optimiser groups with layer-wise decay, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.detector import Detector

_BLOCK = re.compile(r"\blayer\.(\d+)\.")


def make_optimizer(
    detector: Detector | EventfulRFDETR, lr: float, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW; the deeper a parameter lies below the heads, the smaller its learning rate (ViTDet, appendix).

    Every group holds its share of the learning rate as "lr_scale"; norms, biases and position encodings have no
    weight decay.
    """
    if isinstance(detector, Detector):
        groups: list[dict[str, Any]] = list(
            param_groups_layer_decay(
                detector.backbone.net,
                weight_decay=weight_decay,
                no_weight_decay_list=("pos_embed", "rel_pos_h", "rel_pos_w"),
                layer_decay=layer_decay,
            )
        )
    else:
        groups = _groups(detector.parts.backbone, weight_decay, layer_decay)
    inside = {id(parameter) for group in groups for parameter in group["params"]}
    heads = [p for p in detector.parameters() if id(p) not in inside and p.requires_grad]
    groups.append({"params": [p for p in heads if p.ndim > 1], "weight_decay": weight_decay, "lr_scale": 1.0})
    groups.append({"params": [p for p in heads if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0})
    return torch.optim.AdamW([{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups], lr=lr)


def _groups(vit: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of a ViT of transformers, by depth: embeddings, then blocks, then the last norm."""
    blocks = {name: int(found[1]) for name, _ in vit.named_parameters() if (found := _BLOCK.search(name))}
    last = max(blocks.values()) + 2
    groups = []
    for name, parameter in vit.named_parameters():
        depth = blocks[name] + 1 if name in blocks else 0 if name.startswith("embeddings.") else last
        decay = weight_decay if parameter.ndim > 1 and not name.endswith(("embeddings", "token")) else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": layer_decay ** (last - depth)})
    return groups


def learning_rate(
    step: int, steps: int, lr: float, warmup: int, schedule: Literal["cosine", "step"], milestones: Sequence[float]
) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to zero, or a tenth after each milestone.

    Args:
        step: from 0.
        steps: of the whole training.
        lr: peak rate.
        warmup: steps of warm-up.
        schedule: "cosine" or "step".
        milestones: shares of `steps` at which the "step" schedule drops.
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if schedule == "cosine":
        share = max(0, step - warmup) / max(1, steps - warmup)
        return lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return lr * rise * 0.1 ** sum(step >= milestone * steps for milestone in milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
