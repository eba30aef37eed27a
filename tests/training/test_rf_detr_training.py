"""A small RF-DETR learns, by the losses of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import make_tree, options_of
from safetensors.torch import save_file

from eventful_det import load_detector
from eventful_det.errors import UserError
from eventful_det.training.optim import make_optimizer
from eventful_det.training.rf_detr import RFDETRObjective, init_backbone, tiny

pytest.importorskip("transformers")
pytest.importorskip("scipy")


def test_losses_are_those_of_transformers_and_fall() -> None:
    torch.manual_seed(0)
    detector = tiny(("a", "b"), side=64, queries=5, groups=2).train()
    images = torch.rand(2, 3, 64, 96)
    boxes = torch.tensor([[12.0, 8, 60, 40]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}, {"boxes": boxes[:0], "labels": torch.zeros(0).long()}]
    labels = [
        {"boxes": torch.tensor([[36 / 96, 24 / 64, 48 / 96, 32 / 64]]), "class_labels": torch.tensor([1])},
        {"boxes": boxes[:0], "class_labels": torch.zeros(0).long()},
    ]
    for module in detector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    squares = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", align_corners=False)
    for layer in detector.model.model.decoder.layers:
        layer.dropout = layer.activation_dropout = 0.0
    expected = detector.model((squares - detector.pixel_mean) / detector.pixel_std, labels=labels).loss
    optimizer = make_optimizer(detector, 1e-3, 0.05, 0.8)
    totals = []
    for _ in range(8):
        total = torch.stack(list(RFDETRObjective(detector)(images, targets).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total))
    assert totals[0] == pytest.approx(float(expected), rel=1e-4) and totals[-1] < totals[0]


def test_a_backbone_of_timm(tmp_path: Path) -> None:
    """Each part computes what timm's does, whose inputs are normalised in another way."""
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    detector, image = tiny(("a",), side=64, queries=5), torch.rand(1, 3, 64, 64)
    init_backbone(detector, tmp_path / "vit.safetensors")
    embeddings = detector.parts.backbone.get_submodule("embeddings")
    ours, theirs, tokens = detector.spec.blocks[3], vit.blocks[3], torch.rand(5, 192)
    with torch.no_grad():
        patches = embeddings.get_submodule("patch_embeddings.projection")(
            (image - detector.pixel_mean) / detector.pixel_std
        )
        torch.testing.assert_close(patches, vit.patch_embed.proj((image - 0.5) / 0.5), atol=1e-4, rtol=1e-4)
        assert torch.equal(embeddings.get_parameter("position_embeddings"), vit.pos_embed)
        assert torch.equal(embeddings.get_parameter("cls_token"), vit.cls_token)
        torch.testing.assert_close(ours.qkv(ours.norm1(tokens)).flatten(1), theirs.attn.qkv(theirs.norm1(tokens)))
        torch.testing.assert_close(ours.mlp(ours.norm2(tokens)), theirs.mlp(theirs.norm2(tokens)))
    with pytest.raises(UserError, match="holds no ViT"):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        init_backbone(detector, tmp_path / "x.safetensors")


@pytest.mark.slow
def test_train_evaluate_load(tmp_path: Path) -> None:
    import train_net

    with pytest.raises(UserError, match="queries .50. must be at most 16"):
        tiny(("a",), side=64)

    sizes = ["--width", "96", "--height", "64", "--train-videos", "1", "--train-frames", "2"]
    tree = make_tree(tmp_path / "tree", *sizes, "--val-videos", "1", "--val-frames", "2")
    options = [
        "model=rf_detr_tiny",
        "model.init=null",
        "model.side=64",
        "model.queries=9",
        f"data.root={tree}",
        f"output={tmp_path / 'run'}",
    ]
    few = ["train.steps=2", "train.batch=1", "train.workers=0", "train.checkpoint_every=1", "probe=false", "device=cpu"]
    train_net.run(options_of("train_net", *options, *few, "augment.sizes=[[64,96]]"))
    loaded = load_detector(tmp_path / "run")
    assert loaded.input_transform.short_side == 64 and loaded.names[0] == "disc"
