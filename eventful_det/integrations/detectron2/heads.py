"""detectron2's pyramid and proposal network on a token map: in full, or where changed tokens reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.update import Update
from eventful_det.models.incremental import HeadsState, init_heads, refresh_proposals, refresh_pyramid
from eventful_det.models.rpn import ProposalHead

Features = dict[str, Tensor]


def pyramid_features(pyramid: Any, tokens: Tensor) -> Features:
    """The levels that a `SimpleFeaturePyramid` makes of a token map `(H, W, C)`, by name, each `(1, C', h, w)`."""
    image = tokens.permute(2, 0, 1)[None]
    names, top = list(pyramid.output_shape()), pyramid.top_block
    levels = dict(zip(names, (stage(image) for stage in pyramid.stages), strict=False))
    if top is not None:
        source = {pyramid.in_feature: image, **levels}[top.in_feature]
        levels |= dict(zip(names[len(levels) :], top(source), strict=True))
    return levels


class IncrementalHeads:
    """The pyramid and the proposal network of a detector, recomputed where changed tokens reach.

    They are detectron2's own modules and parameters, run by `eventful_det.models.incremental`; results are equal.

    Args:
        pyramid: a `SimpleFeaturePyramid` of four stages with layer norm.
        rpn: an `RPN` with a `StandardRPNHead` on all levels of the pyramid.

    Raises:
        UserError: they are made of other parts.
    """

    def __init__(self, pyramid: Any, rpn: Any) -> None:
        _check(pyramid, rpn)
        self._pyramid, self._rpn = pyramid, rpn
        self._proposals: Any = _Proposals(_Head(rpn.rpn_head))

    def __call__(self, update: Update, state: HeadsState | None) -> HeadsState:
        """The maps of a frame: `state`, updated in place, or a new one where all is computed."""
        changed = update.changed
        if state is None:
            state = init_heads(self._pyramid, self._proposals, update.tokens)
            changed = torch.arange(len(update.work), device=update.tokens.device)
        pyramid = refresh_pyramid(self._pyramid, update.tokens, changed, state)
        refresh_proposals(self._proposals, state, pyramid.cells)
        return state

    def read(self, state: HeadsState, images: ImageList) -> tuple[Features, list[Instances]]:
        """The levels by name and the proposals of a frame, as detectron2's region heads take them."""
        features = dict(zip(self._pyramid.output_shape(), state.levels, strict=True))
        anchors = self._rpn.anchor_generator(list(features.values()))
        counts = [len(level) for level in anchors]
        logits, deltas = ([level[None] for level in values.split(counts)] for values in (state.logits, state.deltas))
        return features, self._rpn.predict_proposals(anchors, list(logits), list(deltas), images.image_sizes)


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


def _check(pyramid: Any, rpn: Any) -> None:
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
    if missing:
        raise UserError(f"incremental_heads needs {', '.join(missing)}; leave incremental_heads off for this model")
