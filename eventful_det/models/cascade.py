"""A cascade of region heads, each on the boxes of the one before (Cai and Vasconcelos 2018), as in detectron2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from eventful_det.errors import UserError
from eventful_det.models.boxes import decode
from eventful_det.models.config import ModelConfig
from eventful_det.models.roi_heads import BoxHead, BoxPredictor, Detections, Reader, RegionHeads, Regions

_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of each stage's deltas


def region_heads(config: ModelConfig) -> Regions:
    """The region heads of a config."""
    return RegionHeads(config) if config.box_stages == 1 else CascadeHeads(config)


class CascadeHeads(Regions):
    """Three heads in turn; boxes are the same for all classes, scores the mean of the stages'. For inference only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        heads = [BoxHead(config.channels, config.box_convs, config.box_fc) for _ in _WEIGHTS]
        self.box_head = nn.ModuleList(heads)
        self.box_predictor = nn.ModuleList(BoxPredictor(head.width, len(config.classes), 1) for head in heads)

    def score(self, read: Reader, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Class probabilities `(n, K + 1)`, and the boxes `(n, 12)` after each stage, of all images' proposals."""
        counts = [len(image) for image in proposals]
        boxes, scores, refined = torch.cat(proposals), [], []
        for head, predictor, weights in zip(self.box_head, self.box_predictor, _WEIGHTS, strict=True):
            logits, deltas = predictor(head(read(list(boxes.split(counts)))))
            scores.append(logits.float().softmax(dim=1))
            decoded = decode(deltas.float(), boxes, weights).split(counts)
            boxes = torch.cat([clip_boxes_to_image(*image) for image in zip(decoded, sizes, strict=True)])
            refined.append(boxes)
        return torch.stack(scores).mean(dim=0), torch.cat(refined, dim=1)

    def select(self, proposals: Tensor, scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> Detections:
        """The objects of one image of (height, width) `size`, from class probabilities and the last stage's boxes."""
        scores = scores[:, :-1].clone()
        return self.choose(scores, boxes[:, None, -4:].expand(-1, scores.shape[1], 4), size)

    def regions(self, proposals: Tensor, boxes: Tensor) -> list[Tensor]:
        """The proposals, and the boxes after the first and the second stage."""
        return [proposals, *boxes[:, :-4].split(4, dim=1)]

    def losses(
        self, levels: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Not available.

        Raises:
            UserError: always.
        """
        raise UserError("a cascade of region heads is for inference; train it in detectron2 (docs/detectron2.md)")
