"""A cascade of region heads, each on the boxes of the one before (Cai and Vasconcelos 2018), as in detectron2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from eventful_det.detectors.vitdet.boxes import decode
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.roi_heads import BoxHead, BoxPredictor, Reader, RegionOutput, RoIHeads, SingleHead
from eventful_det.errors import UserError

_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of each stage's deltas


def roi_heads(config: ModelConfig) -> RoIHeads:
    """The region heads of a config."""
    return SingleHead(config) if config.box_stages == 1 else CascadeHeads(config)


class CascadeHeads(RoIHeads):
    """Three heads in turn; boxes are the same for all classes, scores the mean of the stages'. For inference only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        heads = [BoxHead(config.channels, config.box_convs, config.box_fc) for _ in _WEIGHTS]
        self.box_head = nn.ModuleList(heads)
        self.box_predictor = nn.ModuleList(BoxPredictor(head.width, len(config.classes), 1) for head in heads)

    def score(self, read: Reader, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> RegionOutput:
        """What the stages say of the proposals of all images, each of the boxes of the one before."""
        counts = [len(image) for image in proposals]
        boxes, scores = [torch.cat(proposals)], []
        for head, predictor, weights in zip(self.box_head, self.box_predictor, _WEIGHTS, strict=True):
            logits, deltas = predictor(head(read(list(boxes[-1].split(counts)))))
            scores.append(logits.float().softmax(dim=1))
            decoded = decode(deltas.float(), boxes[-1], weights).split(counts)
            boxes.append(torch.cat([clip_boxes_to_image(*image) for image in zip(decoded, sizes, strict=True)]))
        return RegionOutput(torch.stack(boxes[:-1], dim=1), torch.stack(scores).mean(dim=0), boxes[-1][:, None])

    def losses(
        self, levels: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Not available.

        Raises:
            UserError: always.
        """
        raise UserError("a cascade of region heads is for inference; train it in detectron2 (docs/detectron2.md)")
