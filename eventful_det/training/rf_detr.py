"""Training of an RF-DETR with the losses of `transformers`, and a small one to train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.checkpoints.pretrained import backbone_tensors
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import random_model
from eventful_det.errors import UserError
from eventful_det.gating.spec import resize_positions

TINY = "rf_detr_tiny"
_PRETRAINED = 0.5  # mean and standard deviation of the inputs of timm's ViTs; RF-DETR's are `Parts.mean` and `.std`


def tiny(
    classes: Sequence[str], *, init: str | None = None, side: int = 256, queries: int = 50, groups: int = 4
) -> EventfulRFDETR:
    """An RF-DETR of ViT-Ti widths, about 2 GMACs on 256 x 256 pixels.

    Args:
        classes: names.
        init: what the backbone starts from, see `init_backbone`; None = random weights.
        side: of the square input in pixels, a multiple of 32.
        queries: object queries.
        groups: of queries, while it is trained (Group DETR, Chen et al. 2022).

    Raises:
        UserError: the side is no multiple of 32, there are more queries than tokens, or `init` cannot be used.
    """
    if side % 32:
        raise UserError(f"model: side must be a multiple of 32 pixels, got {side}")
    if queries > (side // 16) ** 2:
        raise UserError(f"model: queries ({queries}) must be at most {(side // 16) ** 2}, the tokens of {side} pixels")
    model = random_model(
        "rf-detr-nano",
        config={
            "id2label": dict(enumerate(classes)),
            "num_labels": len(classes),
            "num_queries": queries,
            "group_detr": groups,
            "d_model": 192,
            "decoder_layers": 3,
            "decoder_ffn_dim": 512,
            "decoder_self_attention_heads": 6,
            "decoder_cross_attention_heads": 12,
        },
        backbone={"hidden_size": 192, "num_attention_heads": 3, "image_size": side},
    )
    detector = EventfulRFDETR(model)
    if init:
        init_backbone(detector, init)
    return detector


def init_backbone(detector: EventfulRFDETR, source: str | os.PathLike[str]) -> None:
    """Start the backbone of an RF-DETR of `transformers` from a ViT of timm's kind, as `models.pretrained` reads it.

    Windows need no weights. Relative positions of the source are dropped; class token and layer scales keep their
    initial values where the source has none. Its patch embedding is made to take RF-DETR's normalisation.

    Raises:
        UserError: the source cannot be read or does not fit.
    """
    tensors = backbone_tensors(str(source))
    parameters = dict(detector.parts.backbone.get_submodule("embeddings").named_parameters())
    weight = tensors["patch_embed.proj.weight"]  # (D, 3, p, p)
    mean, std = (values.to(weight.dtype).view(1, 3, 1, 1) for values in (detector.pixel_mean, detector.pixel_std))
    shift = (weight * (mean - _PRETRAINED) / _PRETRAINED).sum((1, 2, 3))
    positions = tensors["pos_embed"].flatten(0, -2)  # (N, D), with or without the class token's
    side = int(len(positions) ** 0.5)
    grid = int((parameters["position_embeddings"].shape[1] - 1) ** 0.5)
    patches = positions[len(positions) - side**2 :].unflatten(0, (side, side)).float()
    patches = resize_positions(patches, (grid, grid), antialias=False)
    first = positions[:1] if len(positions) > side**2 else parameters["position_embeddings"][0, :1]
    pairs = [
        (parameters["patch_embeddings.projection.weight"], weight * std / _PRETRAINED),
        (parameters["patch_embeddings.projection.bias"], tensors["patch_embed.proj.bias"] + shift),
        (parameters["position_embeddings"], torch.cat([first, patches])[None]),
    ]
    if "cls_token" in tensors:
        pairs.append((parameters["cls_token"], tensors["cls_token"]))
    for i, block in enumerate(detector.spec.blocks):
        layers = [*zip(("attn.proj", "mlp.fc1", "mlp.fc2"), (*block.layers[1], *block.layers[2]), strict=True)]
        for kind in ("weight", "bias"):
            split = tensors[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            pairs += zip((getattr(layer, kind) for layer in block.layers[0]), split, strict=True)
            for name, layer in [*layers, ("norm1", block.norm1), ("norm2", block.norm2)]:
                pairs.append((getattr(layer, kind), tensors[f"blocks.{i}.{name}.{kind}"]))
    with torch.no_grad():
        for parameter, value in pairs:
            if parameter.shape != value.shape:
                raise UserError(
                    f"{source} does not fit the backbone: {tuple(value.shape)}, not {tuple(parameter.shape)}"
                )
            parameter.copy_(value)


class RFDETRObjective(nn.Module):
    """The losses of `transformers`, weighted as its config says: of classes, boxes and overlaps.

    Args:
        detector: around a model of `transformers`.
    """

    def __init__(self, detector: EventfulRFDETR) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of some images.

        Args:
            images: `(B, 3, h, w)`, RGB in [0, 1]; stretched to the detector's square.
            targets: per image "boxes" `(n, 4)` xyxy in pixels and "labels" `(n,)`. What else they hold is not used:
                every object has to be labelled.
        """
        detector = self.detector
        model: Any = detector.model
        if type(model).__name__ != "RfDetrForObjectDetection":
            raise UserError("only RF-DETR of transformers can be trained here; the package rfdetr trains its own")
        height, width = images.shape[2:]
        size = detector.input_transform.short_side
        frames = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        found = model.model((frames - detector.pixel_mean) / detector.pixel_std)
        logits, boxes = model.predict_class_and_boxes(
            found.intermediate_hidden_states, found.intermediate_reference_points
        )  # (layers, B, groups x Q, K) and (..., 4)
        proposed = model.predict_encoder_class_logits(found.enc_outputs_class)
        truth = [
            {"class_labels": target["labels"], "boxes": _relative(target["boxes"], width, height)} for target in targets
        ]
        config = model.config
        with torch.autocast(images.device.type, enabled=False):  # logarithms of scores that bfloat16 rounds to 1
            logits, boxes, proposed = logits.float(), boxes.float(), proposed.float()
            _, parts, _ = model.loss_function(
                logits[-1], truth, images.device, boxes[-1], config, logits, boxes, proposed,
                found.enc_outputs_coord_logits.float(),
            )  # fmt: skip
        weights = {
            "ce": config.class_loss_coefficient,
            "bbox": config.bbox_loss_coefficient,
            "giou": config.giou_loss_coefficient,
        }
        return {
            name: weight * torch.stack([loss for key, loss in parts.items() if key.startswith(f"loss_{name}")]).sum()
            for name, weight in weights.items()
        }


def _relative(boxes: Tensor, width: int, height: int) -> Tensor:
    """Corners `(n, 4)` in pixels as centres and sizes, 0 to 1."""
    first, second = (boxes / boxes.new_tensor([width, height, width, height])).split(2, 1)
    return torch.cat([(first + second) / 2, second - first], 1)
