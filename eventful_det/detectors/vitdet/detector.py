"""The detector: dense training and inference, and `step` for video streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.gated import GatedDetector, GatedStream, check_frame, priced_statically
from eventful_det.detectors.hub import WEIGHTS
from eventful_det.detectors.protocol import AnyRule, InputTransform
from eventful_det.detectors.results import Detections
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.vitdet.cascade import roi_heads
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.incremental import (
    HeadsState,
    init_heads,
    refresh_proposals,
    refresh_pyramid,
    refresh_regions,
)
from eventful_det.detectors.vitdet.macs import DetectorCosts, HeadSizes, HeadWeights
from eventful_det.detectors.vitdet.rpn import ProposalGenerator
from eventful_det.detectors.vitdet.vitdet import ViTDetBackbone
from eventful_det.errors import UserError
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.state import Update
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Grid

DIVISOR = 32  # sides of the network's input are multiples of the stride of p5


def padded_size(size: tuple[int, int], config: ModelConfig) -> tuple[int, int]:
    """(height, width) of images once they are padded: multiples of `DIVISOR`, so that the pyramid can halve them."""
    height, width = (-(-max(side, config.square_pad) // DIVISOR) * DIVISOR for side in size)
    return height, width


@dataclass
class DetectorStream(GatedStream):
    """What a detector remembers of one stream.

    Attributes:
        heads: maps of the pyramid and the heads, and the last proposals.
    """

    heads: HeadsState | None = None


class Detector(GatedDetector[DetectorStream]):
    """ViTDet: a windowed ViT, a simple feature pyramid, region proposals and region heads; a `VideoDetector`.

    Parameters carry detectron2's names. Dense in `forward`; eventful in `step` and `stream`.

    Args:
        config: sizes and class names.

    Attributes:
        spec: the ViT as the update rules see it.
        head_weights: MACs of the heads at one place.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    _stream = DetectorStream

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.classes:
            raise UserError("model: classes is empty; a detector needs at least one class name")
        self.config = config
        self.backbone = ViTDetBackbone(config)
        self.proposal_generator = ProposalGenerator(config)
        self.roi_heads = roi_heads(config)
        std = sum(config.pixel_std) / len(config.pixel_std)
        self.spec = dataclasses.replace(spec_of(self.backbone.net), pixel_std=std)
        self.head_weights = HeadWeights.of(self.backbone, self.proposal_generator.rpn_head, self.roi_heads)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.classes

    @property
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, in the model's own size."""
        config = self.config
        return InputTransform(config.short_side, config.long_side, config.patch, config.pixel_mean)

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """The dense detector.

        Args:
            images: `(B, 3, h, w)` or B tensors `(3, h, w)`, RGB in [0, 1].
            targets: per image "boxes" `(n, 4)` xyxy in pixels and "labels" `(n,)` from 0; needed for training.

        Returns:
            Losses in training mode, otherwise the detections of each image.
        """
        batch, sizes = self._batch(images)
        levels = self.backbone(batch)
        if not self.training:
            proposals, _ = self.proposal_generator(levels, sizes)
            return self.roi_heads.detect(levels, proposals, sizes)
        if targets is None:
            raise UserError("Detector: training needs targets; give them or call .eval() first")
        proposals, losses = self.proposal_generator(levels, sizes, targets)
        return {**losses, **self.roi_heads.losses(levels, proposals, targets)}

    def _save_files(self, folder: Path, notes: Mapping[str, object]) -> None:
        save_detector(self, folder / WEIGHTS, self.spec.dtype, notes)

    def cost_model(self, rule: AnyRule) -> DetectorCosts:
        """What frames will cost under a rule.

        Raises:
            UserError: it is not the rows rule with the patch gate.
        """
        static = priced_statically(rule, self.device)
        return DetectorCosts(self.spec.shape, self.head_weights, self.config.proposals, static)

    def _batch(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalise and pad all images to the size of the largest."""
        for image in images:
            check_frame(image)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return torch.stack([self._prepare(image, height, width) for image in images]), sizes

    def _prepare(self, image: Tensor, height: int, width: int) -> Tensor:
        """Normalise an image `(3, h, w)`, and pad it at the bottom and right to at least `height` and `width`."""
        image = (image - self.pixel_mean).div_(self.pixel_std)
        (height, width), (_, h, w) = padded_size((height, width), self.config), image.shape
        return image if (h, w) == (height, width) else F.pad(image, (0, width - w, 0, height - h))

    def _normalised(self, frame: Tensor) -> Tensor:
        return self._prepare(frame, frame.shape[-2], frame.shape[-1])

    def _dense_macs(self, grid: Grid) -> dict[str, int]:
        backbone = dense_macs(self.spec.shape, grid).total
        return {"backbone": backbone, **self.head_weights.dense(grid, self.config.proposals)}

    def _run_heads(
        self, update: Update, stream: DetectorStream, dense: bool, watch: Stopwatch
    ) -> tuple[Detections, dict[str, int]]:
        if not dense:
            detections, sizes = self._refresh_heads(update, stream, watch)
            return detections, self.head_weights.macs(sizes)
        levels = self.backbone.pyramid(update.tokens.permute(2, 0, 1)[None])  # (1, C, h, w) each
        watch.lap("pyramid")
        proposals, _ = self.proposal_generator(levels, [stream.size])
        watch.lap("rpn")
        (detections,) = self.roi_heads.detect(levels, proposals, [stream.size])
        watch.lap("roi")
        grid = (update.tokens.shape[0], update.tokens.shape[1])
        return detections, self.head_weights.dense(grid, len(proposals[0]))

    def _refresh_heads(
        self, update: Update, stream: DetectorStream, watch: Stopwatch
    ) -> tuple[Detections, HeadSizes[int]]:
        """The heads where changed tokens reach; also at how many places they ran."""
        tokens, changed, generator = update.tokens, update.changed, self.proposal_generator
        if stream.heads is None:
            stream.heads = init_heads(self.backbone, generator, tokens)
            changed = torch.arange(len(update.work), device=tokens.device)
        heads = stream.heads
        pyramid = refresh_pyramid(self.backbone, tokens, changed, heads)
        watch.lap("pyramid")
        rpn = refresh_proposals(generator, heads, pyramid.cells)
        proposals = generator.select(heads.layout.sizes, heads.logits, heads.deltas, stream.size)
        watch.lap("rpn")
        regions, computed = refresh_regions(self.roi_heads, proposals, changed, heads, stream.size)
        detections = self.roi_heads.select(regions, stream.size)
        watch.lap("roi")
        return detections, HeadSizes(pyramid.sources, pyramid.convolved, rpn.convolved, rpn.predicted, computed)
