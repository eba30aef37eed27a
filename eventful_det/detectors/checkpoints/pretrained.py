"""Backbones to start from: ImageNet ViTs of MAE and timm, Segment Anything's, and those of whole detectors."""

from __future__ import annotations

import os
import re

import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.checkpoints.key_maps import from_official, is_official, position_map
from eventful_det.detectors.checkpoints.weight_files import find_weights, load_exactly, matching, read_tensors, without
from eventful_det.detectors.hub import fetch
from eventful_det.detectors.vitdet.vitdet import WindowedViT
from eventful_det.errors import UserError, first_line
from eventful_det.gating.spec import resize_positions

_PATCHES = "patch_embed.proj.weight"
_NOT_BACKBONE = ("cls_token", "norm.*", "head.*", "fc_norm.*", "neck.*", "mask_token", "decoder*")


def init_backbone(vit: WindowedViT, source: str | os.PathLike[str]) -> None:
    """Start a backbone from a pretrained ViT.

    Class token, classifier, MAE's decoder and SAM's neck are dropped, and so is what is beside the backbone in SAM
    and in detectors. Position encodings with and without class token, and relative positions, are resized to the
    backbone's as detectron2 does when it runs; relative positions that the file lacks keep their initial value (zero:
    no effect). Every other key has to fit.

    Args:
        vit: the backbone to fill.
        source: a safetensors, `.pth` or `.pkl` file with the names of MAE, timm, Segment Anything or detectron2; the
            name of a shipped detector; or `timm:NAME` for weights that timm downloads.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    tensors, own = without(backbone_tensors(str(source)), _NOT_BACKBONE), vit.state_dict()
    try:
        tensors["pos_embed"] = _fit_positions(position_map(tensors["pos_embed"]), own["pos_embed"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for key in matching(own, ["*.rel_pos_?"]):
        tensors[key] = _fit_table(tensors[key], own[key]) if key in tensors else own[key]
    load_exactly(vit, tensors, str(source))


def _fit_positions(positions: Tensor, own: Tensor) -> Tensor:
    rows, cols = own.shape[1:3]
    return resize_positions(positions[0], (rows, cols), antialias=False).unflatten(0, (rows, cols))[None]


def _fit_table(table: Tensor, own: Tensor) -> Tensor:
    """A relative table `(2 n - 1, d)` for another size."""
    if table.shape[0] == own.shape[0] or table.dim() != 2:
        return table
    return F.interpolate(table.T[None], own.shape[0], mode="linear")[0].T


def backbone_tensors(source: str) -> dict[str, Tensor]:
    """The tensors of the ViT in a source, under timm's names."""
    if source.startswith("timm:"):
        named = _timm_tensors(source.removeprefix("timm:"))
    else:
        try:
            path = find_weights(source)
        except UserError as error:
            raise UserError(f"no backbone weights {source}: {error}; or give timm:MODEL_NAME") from None
        named = read_tensors(path).tensors
    if is_official(named):
        named = from_official(named)
    prefix = next((key.removesuffix(_PATCHES) for key in named if key.endswith(_PATCHES)), None)
    if prefix is None or f"{prefix}pos_embed" not in named:
        raise UserError(f"{source} holds no ViT of a known kind ({_PATCHES}, pos_embed, blocks.0...)")
    inside = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    return {re.sub(r"\.mlp\.lin([12])\.", r".mlp.fc\1.", key): value for key, value in inside.items()}


def _timm_tensors(name: str) -> dict[str, Tensor]:
    import timm

    try:
        if (config := timm.models.get_pretrained_cfg(name)) is not None and config.hf_hub_id:
            fetch(config.hf_hub_id)  # asks once; where there is no network, timm would ask for most of a minute
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # of the many layers between here and the network
        raise UserError(
            f"timm cannot give the weights {name} ({first_line(error)}); name a file of them instead"
        ) from error
