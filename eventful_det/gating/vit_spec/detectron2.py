"""detectron2's ViT, the backbone of ViTDet."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from eventful_det.gating.spec import Families, ViTSpec, require
from eventful_det.gating.vit_spec.parts import square_positions
from eventful_det.gating.vit_spec.timm import timm_block


def _vit(vit: Any) -> ViTSpec:
    """Windows, relative positions, no class token."""
    for block in vit.blocks:
        require(not getattr(block, "use_residual_block", False), "a residual convolution block")
    skip = int(vit.pretrain_use_cls_token)
    return ViTSpec(
        projection=vit.patch_embed.proj,
        positions=None if vit.pos_embed is None else partial(square_positions, vit, "pos_embed", skip, False),
        prefix=None,
        blocks=tuple(timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
        layout="maps",
    )


FAMILIES: Families = {("detectron2.", "ViT"): _vit}
