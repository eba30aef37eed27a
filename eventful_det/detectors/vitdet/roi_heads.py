"""Region heads: detectron2's box head in parameters and numerics, on torchvision's operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from eventful_det.detectors.results import Detections
from eventful_det.detectors.vitdet.boxes import area_of, decode, encode, match, sample, set_aside
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.vitdet import STRIDES, ConvNorm
from eventful_det.gating.state import TensorTree

_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_FOREGROUND = 0.25
POOL = 7  # cells along a side of a pooled region
_POOLED_LEVELS = 4  # p2 to p5

Reader = Callable[[list[Tensor]], Tensor]  # boxes `(n, 4)` of each image to their regions `(n, C, 7, 7)`


@dataclass
class RegionOutput(TensorTree):
    """What region heads say of some proposals; K classes.

    Attributes:
        read: `(n, s, 4)` the boxes whose contents were read from the levels, those of s stages: the proposals first.
        scores: `(n, K + 1)` class probabilities, background last.
        boxes: `(n, K, 4)` refined for each class, or `(n, 1, 4)` for all of them.
    """

    read: Tensor
    scores: Tensor
    boxes: Tensor

    @property
    def proposals(self) -> Tensor:
        """`(n, 4)` xyxy in pixels."""
        return self.read[:, 0]

    def rows(self, start: int, end: int) -> RegionOutput:
        """That of some proposals in a row."""
        return self.map(lambda values: values[start:end])


def level_of(boxes: Tensor, canonical_box: float) -> Tensor:
    """The pyramid level that each box `(n, 4)` is read from, 0 for p2 to 3 for p5 (FPN, equation 1)."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return torch.floor(4 + torch.log2(sides / canonical_box + 1e-8)).clamp(2, 5).long() - 2


class BoxHead(nn.Module):
    """Convolutions and fully connected layers on a pooled region; parameters conv1.., fc1.. as in detectron2."""

    def __init__(self, channels: int, convs: int, fc: tuple[int, ...]) -> None:
        super().__init__()
        self._convs = [f"conv{i + 1}" for i in range(convs)]
        self._fcs = [f"fc{i + 1}" for i in range(len(fc))]
        for name in self._convs:
            self.add_module(name, ConvNorm(channels, channels, 3))
        width = channels * POOL**2
        for name, outputs in zip(self._fcs, fc, strict=True):
            layer = nn.Linear(width, outputs)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
            self.add_module(name, layer)
            width = outputs
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """`(n, C, 7, 7)` to `(n, width)`."""
        for name in self._convs:
            x = F.relu(getattr(self, name)(x))
        x = x.flatten(1)
        for name in self._fcs:
            x = F.relu(getattr(self, name)(x))
        return x


class BoxPredictor(nn.Module):
    """Class logits (background last) and box deltas: for each class, or `boxes` of them."""

    def __init__(self, width: int, classes: int, boxes: int | None = None) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, (classes if boxes is None else boxes) * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RoIHeads(nn.Module, ABC):
    """Classify and refine proposals: what all kinds of region heads have in common."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._dropped = [config.classes.index(name) for name in config.dropped]

    @abstractmethod
    def score(self, read: Reader, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> RegionOutput:
        """What the heads say of the proposals of all images, one image after the other.

        Args:
            read: gives the content of boxes, for example `pool` of some levels.
            proposals: of each image, `(n, 4)`.
            sizes: (height, width) of each image in pixels.
        """

    @abstractmethod
    def losses(
        self, levels: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Classification and box losses on sampled proposals."""

    def pool(self, levels: list[Tensor], proposals: list[Tensor]) -> Tensor:
        """Read each proposal from the level that suits its size, `(n, C, 7, 7)` (detectron2's ROIPooler)."""
        rois = torch.cat([F.pad(boxes.float(), (1, 0), value=float(i)) for i, boxes in enumerate(proposals)])
        level = level_of(rois[:, 1:], self.config.canonical_box)
        pooled = levels[0].new_zeros(rois.shape[0], levels[0].shape[1], POOL, POOL)
        for i in range(_POOLED_LEVELS):
            here = (level == i).nonzero().squeeze(1)
            if here.numel():
                scale = 1.0 / STRIDES[i]
                values = roi_align(levels[i].float(), rois[here], POOL, scale, sampling_ratio=0, aligned=True)
                pooled = pooled.index_copy(0, here, values.to(pooled.dtype))
        return pooled

    def detect(self, levels: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """The objects of each image, in pixels of the network's input."""
        output = self.score(partial(self.pool, levels), proposals, sizes)
        ends = list(accumulate(map(len, proposals), initial=0))
        parts = [output.rows(*ends[i : i + 2]) for i in range(len(sizes))]
        return [self.select(part, size) for part, size in zip(parts, sizes, strict=True)]

    def select(self, output: RegionOutput, size: tuple[int, int]) -> Detections:
        """The objects of one image of (height, width) `size`: threshold and suppress per class."""
        scores = output.scores[:, :-1].clone()  # (n, K)
        scores[:, self._dropped] = 0.0
        boxes = clip_boxes_to_image(output.boxes, size).expand(-1, scores.shape[1], 4)  # (n, K, 4)
        row, label = (scores > self.config.score_threshold).nonzero(as_tuple=True)
        box, score = boxes[row, label], scores[row, label]
        keep = batched_nms(box, score, label, self.config.nms_threshold)[: self.config.max_detections]
        return Detections(box[keep], score[keep], label[keep])


class SingleHead(RoIHeads):
    """One head for all proposals, with boxes for each class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.box_head = BoxHead(config.channels, config.box_convs, config.box_fc)
        self.box_predictor = BoxPredictor(self.box_head.width, len(config.classes))

    def score(self, read: Reader, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> RegionOutput:
        """What the head says of the proposals of all images; sizes do not matter."""
        logits, deltas = self._predict(read, proposals)
        every = torch.cat(proposals)
        boxes = decode(deltas, every, _WEIGHTS).unflatten(1, (-1, 4))
        return RegionOutput(every[:, None], logits.softmax(dim=1), boxes)

    def _predict(self, read: Reader, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(read(proposals)))
        return logits.float(), deltas.float()

    def losses(
        self, levels: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Classification and box losses on sampled proposals.

        Background means "none of the classes that are exhaustively labelled in this image": a class that is not may
        well be there, so what it is given costs nothing (a set-valued label, as in Zhao et al. 2020). Objects count by
        their "scores", where the targets have any; background in a region to "ignore" does not count.
        """
        boxes, labels, truth, possible, scores = [], [], [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            candidates = torch.cat([proposal, target["boxes"]])
            matched, label = match(target["boxes"], candidates, 0.5, 0.5, keep_best=False)
            if "ignore" in target:
                label = set_aside(label, candidates, target["ignore"])
            positive, negative = sample(label, self.config.region_samples, _FOREGROUND)
            score = target.get("scores", torch.ones_like(target["boxes"][:, 0]))[matched[positive]]
            scores.append(torch.cat([score, score.new_ones(len(negative))]))
            background = torch.full_like(negative, len(self.config.classes))
            boxes.append(candidates[torch.cat([positive, negative])])
            labels.append(torch.cat([target["labels"][matched[positive]], background]))
            truth.append(target["boxes"][matched[positive]])
            possible.append(self._possible(candidates[negative], target))
        logits, deltas = self._predict(partial(self.pool, levels), boxes)
        label, weight = torch.cat(labels), torch.cat(scores)
        foreground = (label < len(self.config.classes)).nonzero().squeeze(1)
        chosen = deltas.unflatten(1, (-1, 4))[foreground, label[foreground]]
        location = self._box_loss(chosen, torch.cat(boxes)[foreground], torch.cat(truth)) * weight[foreground]
        logits = _merge_possible(logits, label, torch.cat(possible))
        kind = F.cross_entropy(logits, label, reduction="none") * weight
        losses = {"loss_cls": kind, "loss_box_reg": location * self.config.box_loss_weight}
        return {name: loss.sum() / max(label.numel(), 1) for name, loss in losses.items()}

    def _possible(self, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Which classes may be in each box `(n, 4)` without a label, `(n, K)`; by default none."""
        if "exhaustive" not in target:
            return torch.zeros(len(boxes), len(self.config.classes), dtype=torch.bool, device=boxes.device)
        return ~target["exhaustive"][area_of(boxes, target["areas"])]

    def _box_loss(self, deltas: Tensor, boxes: Tensor, truth: Tensor) -> Tensor:
        """`(n,)`."""
        if self.config.box_loss == "giou":
            return generalized_box_iou_loss(decode(deltas, boxes, _WEIGHTS), truth, reduction="none")
        return F.l1_loss(deltas, encode(boxes, truth, _WEIGHTS), reduction="none").sum(dim=1)


def _merge_possible(logits: Tensor, label: Tensor, possible: Tensor) -> Tensor:
    """Give the background of background samples the probability of the classes that may be there unlabelled.

    Args:
        logits: `(n, K + 1)`, background last.
        label: `(n,)`; K = background.
        possible: `(b, K)`, the classes that may be there, of the b background samples.
    """
    background = (label == logits.shape[1] - 1).nonzero().squeeze(1)
    merged = F.pad(possible, (0, 1), value=True)
    rows = logits[background]
    total = rows.masked_fill(~merged, -torch.inf).logsumexp(dim=1, keepdim=True)
    rows = torch.cat([rows[:, :-1].masked_fill(possible, -torch.inf), total], dim=1)
    return logits.index_copy(0, background, rows)
