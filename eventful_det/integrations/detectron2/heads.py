"""detectron2's heads on a token map, in full or where changed tokens reach, and what they cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import ROIHeads, StandardROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from eventful_det.detectors.vitdet.incremental import HeadsState, init_heads, refresh_proposals, refresh_pyramid
from eventful_det.detectors.vitdet.macs import HeadSizes, HeadWeights, stage_macs
from eventful_det.detectors.vitdet.rpn import ProposalHead
from eventful_det.errors import UserError
from eventful_det.gating.state import Update
from eventful_det.gating.windows import Grid

Features = dict[str, Tensor]


def pyramid_features(pyramid: SimpleFeaturePyramid, tokens: Tensor) -> Features:
    """The levels that a `SimpleFeaturePyramid` makes of a token map `(H, W, C)`, by name, each `(1, C', h, w)`."""
    image = tokens.permute(2, 0, 1)[None]
    names, top = list(pyramid.output_shape()), pyramid.top_block
    levels = dict(zip(names, (stage(image) for stage in pyramid.stages), strict=False))
    if top is not None:
        source = {pyramid.in_feature: image, **levels}[top.in_feature]
        levels |= dict(zip(names[len(levels) :], top(source), strict=True))
    return levels


@dataclass(frozen=True)
class RegionCosts:
    """MACs of region heads; reading the regions is not counted, nor are keypoints.

    Attributes:
        box: per proposal.
        mask: per detection.
        most: that they take at most on a frame.
    """

    box: int
    mask: int
    most: int

    @staticmethod
    def of(roi_heads: ROIHeads, proposals: int) -> RegionCosts:
        """Those of `StandardROIHeads`, of others nothing."""
        if not isinstance(roi_heads, StandardROIHeads):
            return RegionCosts(0, 0, 0)
        layers = [m for part in (roi_heads.box_head, roi_heads.box_predictor) for m in part.modules()]
        convolutions = sum(m.weight.numel() for m in layers if isinstance(m, nn.Conv2d))
        linears = sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear))
        mask = stage_macs(roi_heads.mask_head.modules()) * _cells(roi_heads.mask_pooler) if roi_heads.mask_on else 0
        box = convolutions * _cells(roi_heads.box_pooler) + linears
        last = [m for m in roi_heads.box_predictor.modules() if hasattr(m, "test_topk_per_image")][-1]
        return RegionCosts(box, mask, box * proposals + mask * last.test_topk_per_image)


def _cells(pooler: Any) -> int:
    height, width = pooler.output_size
    return int(height * width)


class Heads:
    """The heads of a `GeneralizedRCNN` on the token map of a frame: detectron2's own modules and parameters.

    Args:
        pyramid: a `SimpleFeaturePyramid`.
        rpn: the proposal generator.
        roi_heads: the region heads.
        incremental: recompute pyramid and proposals where changed tokens reach, with equal results, by
            `eventful_det.detectors.vitdet.incremental`. It takes a pyramid of four stages with layer norm, and an `RPN`
            with a `StandardRPNHead` on all of its levels.

    Attributes:
        regions: costs of the region heads.
        weights: MACs of the heads at one place, those of regions being 1: regions are given in MACs. None where pyramid
            or proposal generator are of other parts: they are not counted then.

    Raises:
        UserError: `incremental`, and they are made of other parts.
    """

    def __init__(self, pyramid: SimpleFeaturePyramid, rpn: RPN, roi_heads: ROIHeads, incremental: bool) -> None:
        missing = _missing(pyramid, rpn)
        if missing and incremental:
            raise UserError(f"incremental_heads needs {', '.join(missing)}; leave incremental_heads off for this model")
        self._pyramid, self._rpn, self._roi_heads, self.incremental = pyramid, rpn, roi_heads, incremental
        self.regions = RegionCosts.of(roi_heads, rpn.post_nms_topk[False])
        self._proposals: Any = None
        self.weights: HeadWeights | None = None
        if not missing:
            self._proposals = _Proposals(_Head(rpn.rpn_head))
            weights = HeadWeights.of(pyramid, self._proposals.rpn_head, nn.Module())
            self.weights = dataclasses.replace(weights, regions=1)

    def __call__(
        self, update: Update, state: HeadsState | None, size: tuple[int, int]
    ) -> tuple[Instances, HeadsState | None, dict[str, int]]:
        """The objects on a token map, what is to be remembered until the next one, and MACs by part.

        Args:
            update: of the token map.
            state: what was remembered, updated in place; None = everything is computed.
            size: (height, width) of the frame in pixels.
        """
        sizes, image = None, ImageList(update.tokens.new_empty(0), [size])  # whose pixels no head reads
        if self.incremental:
            state, sizes = self._refresh(update, state)
            features, proposals = self._read(state, image)
        else:
            features = pyramid_features(self._pyramid, update.tokens)
            proposals, _ = self._rpn(image, features, None)
        (instances,), _ = self._roi_heads(image, features, proposals, None)
        regions = self.regions.box * len(proposals[0]) + self.regions.mask * len(instances)
        if sizes is None or self.weights is None:
            return instances, None, self.dense((update.tokens.shape[0], update.tokens.shape[1]), regions)
        return instances, state, self.weights.macs(dataclasses.replace(sizes, regions=regions))

    def dense(self, grid: Grid, regions: int | None = None) -> dict[str, int]:
        """MACs by part of the dense heads over a token grid; by default with as many regions as there can be."""
        regions = self.regions.most if regions is None else regions
        return {"roi": regions} if self.weights is None else self.weights.dense(grid, regions)

    def _refresh(self, update: Update, state: HeadsState | None) -> tuple[HeadsState, HeadSizes[int]]:
        """The maps of a frame, and at how many places the heads ran."""
        changed = update.changed
        if state is None:
            state = init_heads(self._pyramid, self._proposals, update.tokens)
            changed = torch.arange(len(update.work), device=update.tokens.device)
        pyramid = refresh_pyramid(self._pyramid, update.tokens, changed, state)
        rpn = refresh_proposals(self._proposals, state, pyramid.cells)
        return state, HeadSizes(pyramid.sources, pyramid.convolved, rpn.convolved, rpn.predicted, 0)

    def _read(self, state: HeadsState, image: ImageList) -> tuple[Features, list[Instances]]:
        """The levels by name and the proposals of a frame, as detectron2's region heads take them."""
        features = dict(zip(self._pyramid.output_shape(), state.levels, strict=True))
        anchors = self._rpn.anchor_generator(list(features.values()))
        counts = [len(level) for level in anchors]
        logits, deltas = ([level[None] for level in values.split(counts)] for values in (state.logits, state.deltas))
        return features, self._rpn.predict_proposals(anchors, list(logits), list(deltas), image.image_sizes)


@dataclass(frozen=True)
class _Proposals:
    """An `RPN` under the names of our proposal generator."""

    rpn_head: _Head


class _Head:
    """A `StandardRPNHead` read as our `ProposalHead`, whose parts have the same names."""

    convs = ProposalHead.convs
    predict = ProposalHead.predict

    def __init__(self, head: Any) -> None:
        self.conv: nn.Module = head.conv
        self.objectness_logits: nn.Conv2d = head.objectness_logits
        self.anchor_deltas: nn.Conv2d = head.anchor_deltas


def _missing(pyramid: Any, rpn: Any) -> list[str]:
    """What incremental heads need and these have not."""
    names = list(pyramid.output_shape())
    convolutions = [m for stage in pyramid.stages for m in stage if isinstance(m, nn.Conv2d)]
    wanted = {
        "scale_factors (4, 2, 1, 0.5)": tuple(pyramid.scale_factors) == (4, 2, 1, 0.5),
        'norm "LN" in the pyramid': all(isinstance(m.norm, LayerNorm) for m in convolutions),
        "LastLevelMaxPool on p5": type(pyramid.top_block) is LastLevelMaxPool and names[3] == "p5",
        "an RPN with a StandardRPNHead": isinstance(rpn, RPN) and type(rpn.rpn_head) is StandardRPNHead,
    }
    missing = [name for name, present in wanted.items() if not present]
    if not missing and list(rpn.in_features) != names:
        missing = [f"an RPN on the levels {', '.join(names)}"]
    return missing
