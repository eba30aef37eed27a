"""Region proposals: detectron2's RPN in parameters and numerics, on torchvision's operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from eventful_det.detectors.vitdet.boxes import (
    area_of,
    cell_anchors,
    decode,
    encode,
    grid_anchors,
    match,
    sample,
    set_aside,
)
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.vitdet import STRIDES
from eventful_det.gating.windows import Grid

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_NMS = 0.7
_SAMPLES, _FOREGROUND = 256, 0.5


@lru_cache(maxsize=64)
def _anchors(
    sides: tuple[int, ...], ratios: tuple[float, ...], sizes: tuple[Grid, ...], device: torch.device
) -> Tensor:
    """Anchors of all levels; they depend on shapes alone, and are the same on every frame of a stream."""
    levels = zip(sides, sizes, STRIDES, strict=True)
    return torch.cat(
        [grid_anchors(cell_anchors(side, ratios).to(device), *size, stride) for side, size, stride in levels]
    )


class ProposalHead(nn.Module):
    """Objectness and box deltas of every anchor of every level."""

    def __init__(self, channels: int, convs: int, anchors: int) -> None:
        super().__init__()
        if convs == 1:
            self.conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.conv = nn.Sequential()
            for i in range(convs):
                self.conv.add_module(f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1))
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(cast(nn.Parameter, module.bias))

    @property
    def convs(self) -> list[nn.Module]:
        """The 3x3 convolutions, each followed by a ReLU."""
        return list(self.conv) if isinstance(self.conv, nn.Sequential) else [self.conv]

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """A level `(B, C, h, w)` to logits `(B, h * w * A)` and deltas `(B, h * w * A, 4)`."""
        for conv in self.convs:
            feature = F.relu(conv(feature))
        return self.predict(feature)

    def predict(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The last layers of `forward`, after the convolutions."""
        logits = self.objectness_logits(feature).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(feature).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        return logits.float(), deltas.float()


class ProposalGenerator(nn.Module):
    """The region proposal network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rpn_head = ProposalHead(config.channels, config.rpn_convs, len(config.anchor_ratios))

    def anchors(self, sizes: Sequence[Grid], device: torch.device) -> Tensor:
        """Anchors of levels p2 to p6 of these cells (rows, columns), `(n, 4)` xyxy in pixels, level after level."""
        return _anchors(self.config.anchor_sizes, self.config.anchor_ratios, tuple(sizes), device)

    def forward(
        self, levels: list[Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose regions.

        Args:
            levels: pyramid levels `(B, C, h, w)`.
            sizes: (height, width) in pixels of each image without its padding.
            targets: ground truth while training.

        Returns:
            Per image its proposals `(n, 4)` xyxy, best first; and the losses (empty without targets).
        """
        cells = [(level.shape[2], level.shape[3]) for level in levels]
        predictions = zip(*(self.rpn_head(level) for level in levels), strict=True)
        logits, deltas = (torch.cat(list(values), dim=1) for values in predictions)
        losses = {} if targets is None else self._losses(self.anchors(cells, logits.device), logits, deltas, targets)
        with torch.no_grad():
            proposals = [
                self.select(cells, logits[i].detach(), deltas[i].detach(), size) for i, size in enumerate(sizes)
            ]
        return proposals, losses

    def select(self, cells: Sequence[Grid], logits: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
        """The proposals of one image: the best of each level, then non-maximum suppression within levels.

        Args:
            cells: (rows, columns) of the levels p2 to p6.
            logits: `(n,)` of the anchors, level after level.
            deltas: `(n, 4)` of the same.
            size: (height, width) in pixels without padding.
        """
        config, logits, deltas = self.config, logits.float(), deltas.float()
        candidates = config.nms_candidates_train if self.training else config.nms_candidates
        keep = config.proposals_train if self.training else config.proposals
        ratios = len(config.anchor_ratios)
        levels = logits.split([rows * cols * ratios for rows, cols in cells])
        tops = [logit.topk(min(candidates, len(logit))) for logit in levels]
        starts = accumulate((len(logit) for logit in levels), initial=0)
        index = torch.cat([top + start for (_, top), start in zip(tops, starts, strict=False)])
        score = torch.cat([score for score, _ in tops])
        level = torch.cat([torch.full_like(top, i) for i, (_, top) in enumerate(tops)])
        box = decode(deltas[index], self.anchors(cells, logits.device)[index], _WEIGHTS)
        box = clip_boxes_to_image(box, size)
        solid = remove_small_boxes(box, 1e-5)
        return _suppress(box[solid], score[solid], level[solid], keep)

    def _losses(
        self,
        anchors: Tensor,
        logit: Tensor,
        delta: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        objectness, location = logit.sum() * 0, delta.sum() * 0  # parameters have a gradient even without objects
        for i, target in enumerate(targets):
            matched, label = match(target["boxes"], anchors, 0.3, 0.7, keep_best=True)
            if "ignore" in target:
                label = set_aside(label, anchors, target["ignore"])
            positive, negative = sample(label, _SAMPLES, _FOREGROUND)
            chosen = torch.cat([positive, negative])
            wanted = label[chosen].to(logit.dtype)
            loss = F.binary_cross_entropy_with_logits(logit[i, chosen], wanted, reduction="none")
            trust = _trust(anchors[chosen], target, logit[i, chosen], wanted)
            if "scores" in target:
                trust[: len(positive)] = target["scores"][matched[positive]]
            objectness = objectness + (loss * trust).sum()
            if positive.numel():
                goal = encode(anchors[positive], target["boxes"][matched[positive]], _WEIGHTS)
                location = location + F.l1_loss(delta[i, positive], goal, reduction="sum")
        scale = 1.0 / (_SAMPLES * len(targets))
        return {"loss_rpn_cls": objectness * scale, "loss_rpn_loc": location * scale}


def _suppress(boxes: Tensor, scores: Tensor, levels: Tensor, keep: int) -> Tensor:
    """The `keep` best boxes `(n, 4)` that non-maximum suppression within levels leaves, best first.

    Whether a box is suppressed depends on better ones alone, so only as many as are needed are looked at.
    """
    order = scores.argsort(descending=True, stable=True)
    count = 2 * keep
    while True:
        best = order[:count]
        kept = batched_nms(boxes[best], scores[best], levels[best], _NMS)
        if len(kept) >= keep or count >= len(order):
            return boxes[best[kept[:keep]]]
        count *= 2


def _trust(anchors: Tensor, target: dict[str, Tensor], logit: Tensor, wanted: Tensor) -> Tensor:
    """How far each sampled anchor `(n, 4)` can be trusted to be what it is labelled, `(n,)` in 0 to 1.

    Where only some classes are labelled, an unmatched anchor that looks like an object may well be one, of a class
    that is not: it counts as background by the share of classes that are.
    """
    if "exhaustive" not in target:
        return torch.ones_like(logit)
    share = target["exhaustive"].float().mean(dim=1)[area_of(anchors, target["areas"])]
    return torch.where((wanted == 0) & (logit > 0), share, 1.0)
