"""Which detector a set of tensors is: its config, from names and shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eventful_det.data.classes import COCO_NAMES, IMAGENET_VID
from eventful_det.detectors.checkpoints.key_maps import POSITIONS
from eventful_det.detectors.vitdet.config import ModelConfig, vitdet_b_vid
from eventful_det.errors import UserError

_LVIS = 1203  # classes
_COCO: dict[str, Any] = {  # what projects/ViTDet has otherwise than the model for ImageNet VID
    "proposals": 1000,
    "region_samples": 512,
    "box_loss": "l1",
    "box_loss_weight": 1.0,
    "short_side": 1024,
}


def infer_config(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config of a ViTDet of detectron2.

    What shapes do not tell is as in detectron2's projects/ViTDet or, with 30 classes, in the paper's model for
    ImageNet VID: anchors, thresholds, numbers of proposals, colours, sizes, frames padded to squares.

    Args:
        tensors: under our names.

    Raises:
        UserError: they are no such detector.
    """
    try:
        sizes = {**_backbone(tensors), **_heads(tensors)}
        stage = ".0" if sizes["box_stages"] > 1 else ""
        classes = tensors[f"roi_heads.box_predictor{stage}.cls_score.weight"].shape[0] - 1
    except KeyError as error:
        raise UserError(f"this is no ViTDet of detectron2: it has no {error.args[0]}") from None
    if classes == _LVIS:
        raise UserError("this is an LVIS model; they score with sigmoids, which is not supported")
    if classes == len(IMAGENET_VID):
        return dataclasses.replace(vitdet_b_vid(tuple(c.name for c in IMAGENET_VID)), **sizes)
    names = COCO_NAMES if classes == len(COCO_NAMES) else tuple(f"class_{i}" for i in range(classes))
    return dataclasses.replace(vitdet_b_vid(names), **_COCO, **sizes)


def _backbone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    projection, net = tensors["backbone.net.patch_embed.proj.weight"], "backbone.net.blocks"
    depth = len({key.split(".")[3] for key in tensors if key.startswith(f"{net}.")})
    tables = [tensors[f"{net}.{i}.attn.rel_pos_h"] for i in range(max(depth, 1))]
    reach = [(table.shape[0] + 1) // 2 for table in tables]  # in tokens: the window's side, or the image's
    window, image = min(reach), max(reach)
    every = max(depth // 4, 1)  # which are global is not to be seen where an image is as large as a window
    blocks = range(every - 1, depth, every) if window == image else [i for i in range(depth) if reach[i] == image]
    return {
        "dim": projection.shape[0],
        "patch": projection.shape[2],
        "depth": depth,
        "heads": projection.shape[0] // tables[0].shape[1],
        "window": window,
        "global_blocks": tuple(blocks),
        "position_grid": tensors[POSITIONS].shape[1],
        "relative_size": image,
        "channels": tensors["backbone.simfp_4.0.weight"].shape[0],
        "square_pad": image * projection.shape[2],
    }


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if tensors["proposal_generator.rpn_head.objectness_logits.weight"].shape[0] != 3:
        raise UserError("this model has other anchors than 3 per place, which is not supported")
    stages = {key.split(".")[2] for key in tensors if re.match(r"roi_heads\.box_head\.\d+\.", key)}
    head = f"roi_heads.box_head{'.0' if stages else ''}"
    fc = _numbered(tensors, rf"{re.escape(head)}\.fc(\d+)\.weight")
    return {
        "rpn_convs": len(_numbered(tensors, r"proposal_generator\.rpn_head\.conv(?:\.conv)?(\d*)\.weight")),
        "box_convs": len(_numbered(tensors, rf"{re.escape(head)}\.conv(\d+)\.weight")),
        "box_fc": tuple(weight.shape[0] for weight in fc),
        "box_stages": max(len(stages), 1),
    }


def _numbered(tensors: Mapping[str, Tensor], pattern: str) -> list[Tensor]:
    """The tensors whose key matches, in the order of the number in it."""
    found = [(int(match[1] or 0), value) for key, value in tensors.items() if (match := re.fullmatch(pattern, key))]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]
