"""What training with gates on minimises: the detector's losses, and the distance to the dense detector."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.data.training_set import Target
from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.vitdet.detector import DIVISOR, Detector
from eventful_det.errors import UserError
from eventful_det.gating.selector import Focus, LargestError, Policy, Selector
from eventful_det.gating.windows import Grid
from eventful_det.options import Count, NonNegative, Share, convert_fields
from eventful_det.training.eventful import gated_tokens

_SURE = 0.5  # score from which a detection of the dense detector serves as a label


@dataclass(frozen=True)
class EventfulOptions:
    """How to train with gates on.

    Attributes:
        budgets: smallest and largest share of the tokens that a frame may recompute; drawn for every clip, evenly
            in its logarithm.
        thresholds: drawn for every clip, see `LargestError`; with 0 the budget is always spent.
        policy: "threshold", which orders tokens by change x age^age_power, or "focus", to which the true boxes of the
            frame before are what it found there.
        age_power: see there.
        supervised: frames of a clip that have a loss: the first, which is dense, and others drawn at random.
        labels: whose boxes the detection losses go by: "truth", the "dense" detector's before training, or "none".
        distil: weight of the squared distance between the pyramid and that of the dense detector before training.
    """

    budgets: tuple[Share, Share] = (1 / 16, 1 / 2)
    thresholds: tuple[float, ...] = (0.0, 2.0)
    policy: Literal["threshold", "focus"] = "threshold"
    age_power: NonNegative = 0.5
    supervised: Count = 3
    labels: Literal["truth", "dense", "none"] = "truth"
    distil: NonNegative = 1.0

    def __post_init__(self) -> None:
        convert_fields(self, "eventful")
        if self.labels == "none" and not self.distil:
            raise UserError("eventful: labels=none needs distil above 0, or there is nothing to learn from")
        if not 0 < self.budgets[0] <= self.budgets[1] <= 1:
            raise UserError(f"eventful.budgets: expected 0 < smallest <= largest <= 1, got {list(self.budgets)}")
        if not self.thresholds:
            raise UserError("eventful.thresholds must not be empty")


class EventfulObjective(nn.Module):
    """Losses of a detector that runs over clips as the `rows` rule would run it.

    Args:
        detector: to be trained; what it is when the objective is made is the dense detector to learn from.
        options: how.
    """

    def __init__(self, detector: Detector, options: EventfulOptions) -> None:
        super().__init__()
        self.detector, self.options = detector, options
        self.dense = copy.deepcopy(detector).eval().requires_grad_(False)
        heads = nn.ModuleList([detector.proposal_generator, detector.roi_heads])
        heads.requires_grad_(options.labels != "none")  # else no loss reaches them

    def train(self, mode: bool = True) -> EventfulObjective:
        """Set the mode of all but the dense detector, which stays in evaluation mode."""
        super().train(mode)
        self.dense.eval()
        return self

    def forward(self, clips: Tensor, targets: list[list[Target]]) -> dict[str, Tensor]:
        """Losses of some clips.

        Args:
            clips: `(B, T, 3, h, w)` RGB in [0, 1], sides multiples of 32 pixels.
            targets: per clip and frame, as `Detector.forward` takes them.

        Raises:
            UserError: the sides are no multiples of 32.
        """
        height, width = clips.shape[-2:]
        if height % DIVISOR or width % DIVISOR:
            raise UserError(f"clips of {height}x{width} pixels: augment.sizes must be multiples of {DIVISOR}")
        clips = (clips - self.detector.pixel_mean) / self.detector.pixel_std
        chosen = [self._supervised(clips.shape[1]) for _ in clips]
        tokens = [self._tokens(*clip) for clip in zip(clips, chosen, targets, strict=True)]
        levels = self.detector.backbone.pyramid(torch.cat(tokens))
        frames = torch.cat([clip[index] for clip, index in zip(clips, chosen, strict=True)])
        sizes = [(height, width)] * len(frames)
        dense = self._dense_levels(frames) if self.options.distil or self.options.labels == "dense" else []
        losses: dict[str, Tensor] = {}
        if self.options.labels != "none":
            wanted = [target[t] for target, index in zip(targets, chosen, strict=True) for t in index.tolist()]
            if self.options.labels == "dense":
                wanted = self._dense_targets(dense, sizes)
            proposals, losses = self.detector.proposal_generator(levels, sizes, wanted)
            losses |= self.detector.roi_heads.losses(levels, proposals, wanted)
        if self.options.distil:
            distances = [F.mse_loss(a.float(), b.float()) for a, b in zip(levels, dense, strict=True)]
            losses["loss_distil"] = self.options.distil * torch.stack(distances).mean()
        return losses

    def _tokens(self, clip: Tensor, chosen: Tensor, targets: list[Target]) -> Tensor:
        """Token maps `(n, D, H, W)` of the chosen frames of a clip, under a budget drawn at random."""
        vit, options = self.detector.spec, self.options
        low, high = (math.log(budget) for budget in options.budgets)
        cap = math.exp(low + (high - low) * float(torch.rand(())))
        threshold = options.thresholds[int(torch.randint(len(options.thresholds), ()))]
        policy: Policy = LargestError(threshold, options.age_power)
        saliency = None
        if options.policy == "focus":
            policy = Focus(threshold)
            saliency = self._saliency(targets, vit.grid(clip.shape[-2], clip.shape[-1]))
        checkpointing = self.detector.backbone.net.grad_checkpointing
        tokens = gated_tokens(vit, clip, selector=Selector(policy, cap), checkpointing=checkpointing, saliency=saliency)
        return tokens[chosen].permute(0, 3, 1, 2)

    def _saliency(self, targets: list[Target], grid: Grid) -> Tensor:
        """How much each token of each frame matters `(T, N)`: where there was an object on the frame before."""
        boxes = [target["boxes"] for target in targets]
        before = [boxes[0][:0], *boxes[:-1]]
        patch = self.detector.config.patch
        return torch.stack([token_saliency(box, box.new_ones(len(box)), grid, patch) for box in before])

    def _supervised(self, length: int) -> Tensor:
        others = 1 + torch.randperm(length - 1)[: self.options.supervised - 1]
        return torch.cat([torch.zeros(1, dtype=torch.long), others.sort().values])

    @torch.no_grad()
    def _dense_levels(self, frames: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.dense.backbone(frames)
        return levels

    @torch.no_grad()
    def _dense_targets(self, levels: list[Tensor], sizes: list[tuple[int, int]]) -> list[Target]:
        """The sure detections of the dense detector as labels."""
        proposals, _ = self.dense.proposal_generator(levels, sizes)
        found = self.dense.roi_heads.detect(levels, proposals, sizes)
        sure = [detections.scores >= _SURE for detections in found]
        return [{"boxes": d.boxes[s], "labels": d.labels[s]} for d, s in zip(found, sure, strict=True)]
