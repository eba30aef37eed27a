"""detectron2's ViTDet from the zoo's own configs, with the sizes of a `ModelConfig`."""

from __future__ import annotations

from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers
from torch import Tensor, nn

from eventful_det.detectors.vitdet.config import ModelConfig

_GAINS = {"cls_score": 3.0, "anchor_deltas": 0.15}  # scores that differ, boxes that stay near their anchors


def zoo_config(config: ModelConfig, cascade: bool = False, masks: bool = False, square_pad: int = 0) -> Any:
    """The LazyConfig of projects/ViTDet's Mask R-CNN, or Cascade Mask R-CNN, in other sizes."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.pixel_mean = [255 * mean for mean in config.pixel_mean]
    model.pixel_std = [255 * std for std in config.pixel_std]
    model.backbone.update(out_channels=config.channels, square_pad=square_pad)
    model.backbone.net.update(
        img_size=config.relative_size * config.patch,
        patch_size=config.patch,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        drop_path_rate=0.0,
        window_size=config.window,
        window_block_indexes=[i for i in range(config.depth) if i not in config.global_blocks],
        pretrain_img_size=config.position_grid * config.patch,
    )
    rpn, roi = model.proposal_generator, model.roi_heads
    rpn.head.update(in_channels=config.channels, conv_dims=[-1] * config.rpn_convs)
    rpn.anchor_generator.sizes = [[size] for size in config.anchor_sizes]
    rpn.update(pre_nms_topk=(config.nms_candidates_train, config.nms_candidates))
    rpn.update(post_nms_topk=(config.proposals_train, config.proposals))
    roi.update(num_classes=len(config.classes), batch_size_per_image=config.region_samples)
    roi.box_pooler.canonical_box_size = config.canonical_box
    head: dict[str, Any] = {
        "input_shape": ShapeSpec(channels=config.channels, height=7, width=7),
        "conv_dims": [config.channels] * config.box_convs,
        "fc_dims": list(config.box_fc),
    }
    predictor: dict[str, Any] = {
        "input_shape": ShapeSpec(channels=config.box_fc[-1]),
        "test_score_thresh": config.score_threshold,
        "test_nms_thresh": config.nms_threshold,
        "test_topk_per_image": config.max_detections,
    }
    roi.box_head.update(**head)
    roi.box_predictor.update(
        **predictor,
        box_reg_loss_type="giou" if config.box_loss == "giou" else "smooth_l1",
        loss_weight={"loss_box_reg": config.box_loss_weight},
    )
    if masks:
        shape = ShapeSpec(channels=config.channels, width=14, height=14)
        roi.mask_head.update(input_shape=shape, conv_dims=[config.channels] * 5)
    else:
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            roi.pop(key)
    if cascade:
        _make_cascade(roi, head, predictor)
    return model


def _make_cascade(roi: Any, head: dict[str, Any], predictor: dict[str, Any]) -> None:
    """What projects/ViTDet/configs/COCO/cascade_mask_rcnn_vitdet_b_100ep.py changes."""
    for key in ("box_head", "box_predictor", "proposal_matcher"):
        roi.pop(key)
    weights = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    roi.update(
        _target_=CascadeROIHeads,
        box_heads=[LazyCall(FastRCNNConvFCHead)(**head, conv_norm="LN") for _ in range(3)],
        box_predictors=[
            LazyCall(FastRCNNOutputLayers)(
                **predictor,
                box2box_transform=LazyCall(Box2BoxTransform)(weights=w),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for w in weights
        ],
        proposal_matchers=[
            LazyCall(Matcher)(thresholds=[t], labels=[0, 1], allow_low_quality_matches=False) for t in (0.5, 0.6, 0.7)
        ],
    )


def zoo_model(
    config: ModelConfig, arch: type[nn.Module] = GeneralizedRCNN, options: dict[str, Any] | None = None, **changes: Any
) -> nn.Module:
    """The model of `zoo_config`, in evaluation mode, with `randomise`d weights."""
    parts = {key: instantiate(value) for key, value in zoo_config(config, **changes).items() if key != "_target_"}
    return randomise(arch(**parts, **(options or {}))).eval()


def randomise(model: nn.Module) -> nn.Module:
    """The same random weights for the same names; scores are spread so that there are detections."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = model.state_dict()
    for key, value in weights.items():
        matrix = value.dim() > 1 and "pos_" not in key
        gain = next((gain for name, gain in _GAINS.items() if name in key), 0.7)
        value.normal_(std=gain / (value.numel() / value.shape[0]) ** 0.5 if matrix else 0.1, generator=generator)
        if "norm" in key and key.endswith("weight"):
            value.add_(1)
    return model
