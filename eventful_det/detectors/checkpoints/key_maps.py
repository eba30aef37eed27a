"""Names of the same weights elsewhere: detectron2's ViTDet, and the official eventful code's conversion of it.

Our names are detectron2's. What differs is the position encoding: ours is `(1, H, W, D)`, detectron2's `(1, N, D)`
with or without a class token in front, which it never uses. The official names come from the patterns in
configs/convert/vitdet_b.txt of WISION-Lab/eventful-transformer; its heads are detectron2's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from eventful_det.errors import UserError

POSITIONS = "backbone.net.pos_embed"
NOT_BOXES = (  # keys of detectron2's checkpoints that a detector of boxes has no use for
    "roi_heads.mask_head.*",
    "proposal_generator.anchor_generator.cell_anchors.*",
    "pixel_mean",
    "pixel_std",
)

_OFFICIAL_BLOCK = {
    "input_layer_norm": "norm1",
    "qkv": "attn.qkv",
    "relative_position.y_embedding": "attn.rel_pos_h",
    "relative_position.x_embedding": "attn.rel_pos_w",
    "projection": "attn.proj",
    "mlp_layer_norm": "norm2",
    "mlp_1": "mlp.fc1",
    "mlp_2": "mlp.fc2",
}
_CONVOLUTIONS_FROM = (4, 1, 0, 1)  # place in each stage of the pyramid where convolution, norm, convolution, norm begin


def is_official(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the official eventful code."""
    return "embedding.conv.weight" in tensors


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the official eventful code's names, under detectron2's."""
    return {_official_name(key): value for key, value in tensors.items()}


def from_detectron2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with detectron2's names, as ours: positions become a map, without the class token.

    Raises:
        UserError: the positions are not those of a square.
    """
    return {**tensors, POSITIONS: position_map(tensors[POSITIONS])}


def to_detectron2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as detectron2's ViT takes them by default: positions as a list, after those of a class token (zero).

    Raises:
        UserError: the positions are not those of a square.
    """
    positions = tensors[POSITIONS]
    if positions.shape[1] != positions.shape[2]:
        raise UserError(f"detectron2 stores positions of squares, these are {tuple(positions.shape[1:3])} tokens")
    token = positions.new_zeros(1, 1, positions.shape[3])
    return {**tensors, POSITIONS: torch.cat([token, positions.flatten(1, 2)], dim=1)}


def position_map(positions: Tensor) -> Tensor:
    """A position encoding `(1, N, D)`, `(1, 1 + N, D)` or `(1, H, W, D)` as a map `(1, H, W, D)`, N = H * W.

    Raises:
        UserError: it is of another shape.
    """
    if positions.dim() == 4 and positions.shape[0] == 1 and positions.numel():
        return positions
    if positions.dim() == 3 and positions.shape[0] == 1:
        for tokens in (0, 1):
            side = math.isqrt(positions.shape[1] - tokens)
            if side * side == positions.shape[1] - tokens > 0:
                return positions[:, tokens:].unflatten(1, (side, side))
    raise UserError(
        f"pos_embed is {tuple(positions.shape)}; expected (1, N, D) or (1, 1 + N, D) of a square of N tokens"
    )


def _official_name(key: str) -> str:
    if key == "backbone.position_encoding.encoding":
        return POSITIONS
    if key.startswith("embedding.conv."):
        return key.replace("embedding.conv.", "backbone.net.patch_embed.proj.")
    block = re.fullmatch(r"backbone\.blocks\.(\d+)\.(.+?)(\.weight|\.bias)?", key)
    if block and block[2] in _OFFICIAL_BLOCK:
        return f"backbone.net.blocks.{block[1]}.{_OFFICIAL_BLOCK[block[2]]}{block[3] or ''}"
    layer = re.fullmatch(r"pyramid\.stages\.([0-3])\.(\d+)\.(weight|bias)", key)
    if layer:
        stage, place = int(layer[1]), int(layer[2])
        beyond = place - _CONVOLUTIONS_FROM[stage]
        name = str(place) if beyond < 0 else f"{place - beyond + beyond // 2}{'.norm' * (beyond % 2)}"
        return f"backbone.simfp_{stage + 2}.{name}.{layer[3]}"
    return key
