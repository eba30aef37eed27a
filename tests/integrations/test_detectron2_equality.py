"""Our detector against detectron2's ViTDet with the same weights; skipped where detectron2 is not installed."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from eventful_det.models.config import ModelConfig, vitdet_b_vid, vitdet_tiny
from eventful_det.models.detector import Detector

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
for name in ("detectron2.modeling", "detectron2.modeling.roi_heads"):
    pytest.importorskip(name, reason="needs detectron2, which is not installed", exc_type=ImportError)

SMALL = vitdet_tiny(
    ("a", "b", "c"), dim=48, depth=4, global_blocks=(1, 3), channels=16, box_convs=2, box_fc=(32,), rpn_convs=2
)


def detectron2_model(config: ModelConfig) -> nn.Module:
    """The model of projects/ViTDet and of the paper's `vitdet_b_vid`, with the sizes of a config."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch import GeneralizedRCNN
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads

    net = ViT(
        img_size=config.relative_size * config.patch,
        patch_size=config.patch,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        window_block_indexes=[i for i in range(config.depth) if i not in config.global_blocks],
        pretrain_img_size=config.position_grid * config.patch,
    )
    pyramid = SimpleFeaturePyramid(
        net, "last_feat", config.channels, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), norm="LN"
    )
    levels = ["p2", "p3", "p4", "p5", "p6"]
    rpn = RPN(
        in_features=levels,
        head=StandardRPNHead(in_channels=config.channels, num_anchors=3, conv_dims=[-1] * config.rpn_convs),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[size] for size in config.anchor_sizes],
            aspect_ratios=config.anchor_ratios,
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(config.nms_candidates_train, config.nms_candidates),
        post_nms_topk=(config.proposals_train, config.proposals),
        nms_thresh=0.7,
    )
    head_shape = ShapeSpec(channels=config.channels, height=7, width=7)
    roi_heads = StandardROIHeads(
        num_classes=len(config.classes),
        batch_size_per_image=config.region_samples,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=levels[:4],
        box_pooler=ROIPooler(
            output_size=7,
            scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
            canonical_box_size=config.canonical_box,
        ),
        box_head=FastRCNNConvFCHead(
            head_shape, conv_dims=[config.channels] * config.box_convs, fc_dims=config.box_fc, conv_norm="LN"
        ),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=config.box_fc[-1]),
            box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
            num_classes=len(config.classes),
            test_score_thresh=config.score_threshold,
            test_nms_thresh=config.nms_threshold,
            test_topk_per_image=config.max_detections,
            box_reg_loss_type="smooth_l1" if config.box_loss == "l1" else config.box_loss,
        ),
    )
    return GeneralizedRCNN(
        backbone=pyramid,
        proposal_generator=rpn,
        roi_heads=roi_heads,
        pixel_mean=[255 * mean for mean in config.pixel_mean],
        pixel_std=[255 * std for std in config.pixel_std],
        input_format="RGB",
    ).eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def make_pair(config: ModelConfig) -> tuple[Detector, nn.Module]:
    """Both models with the same random weights; scores are spread so that there are detections."""
    ours, theirs = Detector(config).eval(), detectron2_model(config)
    generator = torch.Generator().manual_seed(0)
    weights = theirs.state_dict()
    for key, value in weights.items():
        value.normal_(std=0.5 if "cls_score" in key else 0.1, generator=generator)
        if "norm" in key and key.endswith("weight"):
            value.add_(1)
    theirs.load_state_dict(weights)
    positions = weights.pop("backbone.net.pos_embed")
    weights["backbone.net.pos_embed"] = positions[:, 1:].unflatten(1, (14, 14))
    ours.load_state_dict({key: value for key, value in weights.items() if not key.startswith("pixel_")})
    return ours, theirs


@pytest.fixture(scope="module")
def pair() -> tuple[Detector, nn.Module]:
    return make_pair(SMALL)


@pytest.mark.parametrize("make", [vitdet_tiny, vitdet_b_vid])
def test_parameters_have_the_same_names_and_shapes(make: Any) -> None:
    config = make(("a", "b", "c"), depth=2, global_blocks=(1,))
    ours, theirs = shapes(Detector(config)), shapes(detectron2_model(config))
    side = config.position_grid
    assert ours.pop("backbone.net.pos_embed") == (1, side, side, config.dim)
    assert theirs.pop("backbone.net.pos_embed") == (1, 1 + side * side, config.dim)
    assert ours == theirs


@pytest.mark.parametrize("size", [(96, 160), (224, 224), (512, 512)])
def test_backbone_and_pyramid(pair: tuple[Detector, nn.Module], size: tuple[int, int]) -> None:
    ours, theirs = pair
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = ours.backbone.net(images), theirs.backbone.net(images)["last_feat"]
        assert (tokens - expected).norm() / expected.norm() < 1e-5
        for level, other in zip(ours.backbone(images), theirs.backbone(images).values(), strict=True):
            assert level.shape == other.shape
            assert (level - other).norm() / other.norm() < 1e-4


def test_proposals(pair: tuple[Detector, nn.Module]) -> None:
    from detectron2.structures import ImageList

    ours, theirs = pair
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    sizes = [(96, 160), (90, 150)]
    with torch.no_grad():
        levels = theirs.backbone(images)
        (expected, _) = theirs.proposal_generator(ImageList(images, sizes), levels)
        proposals, losses = ours.proposal_generator(list(levels.values()), sizes)
    assert not losses
    for boxes, instances in zip(proposals, expected, strict=True):
        assert len(boxes) > 10
        torch.testing.assert_close(boxes, instances.proposal_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_anchors(pair: tuple[Detector, nn.Module]) -> None:
    ours, theirs = pair
    levels = [torch.zeros(1, 16, 24 >> i, 40 >> i) for i in range(5)]
    expected = theirs.proposal_generator.anchor_generator(levels)
    for anchors, boxes in zip(ours.proposal_generator.anchors(levels), expected, strict=True):
        torch.testing.assert_close(anchors, boxes.tensor)


def test_detections(pair: tuple[Detector, nn.Module]) -> None:
    """Also of images that need padding, which detectron2 leaves out unless it pads to a square."""
    from detectron2.structures import ImageList

    ours, theirs = pair
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((96, 160), (75, 130))]
    with torch.no_grad():
        batch, sizes = ours._batch(images)
        torch.testing.assert_close(batch[:1], theirs.preprocess_image([{"image": 255 * images[0]}]).tensor)
        padded, levels = ImageList(batch, sizes), theirs.backbone(batch)
        expected, _ = theirs.roi_heads(padded, levels, theirs.proposal_generator(padded, levels)[0])
        found = ours(images)
    for detections, instances in zip(found, expected, strict=True):
        assert len(detections) > 10
        assert detections.labels.tolist() == instances.pred_classes.tolist()
        torch.testing.assert_close(detections.boxes, instances.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(detections.scores, instances.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_losses(box_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every anchor and proposal is sampled, so that no random choice differs."""
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    ours, theirs = make_pair(dataclasses.replace(SMALL, box_loss=box_loss, region_samples=10**5))
    monkeypatch.setattr("eventful_det.models.proposals._SAMPLES", 10**5)
    theirs.proposal_generator.batch_size_per_image = 10**5
    image = torch.rand(3, 96, 160, generator=torch.Generator().manual_seed(0))
    boxes, labels = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 20.0, 150.0, 90.0]]), torch.tensor([0, 2])
    instances = Instances((96, 160), gt_boxes=Boxes(boxes), gt_classes=labels)
    found = ours.train()([image], [{"boxes": boxes, "labels": labels}])
    with EventStorage():
        expected = theirs.train()([{"image": 255 * image, "instances": instances}])
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-6)
        assert loss > 0
