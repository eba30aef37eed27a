"""Backbones of MAE, timm, Segment Anything and detectors: every key accounted for, positions as detectron2 has them."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from zoo_files import SMALL, Zoo, random_tensors, write_training_checkpoint, write_zoo_pickle

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.pretrained import init_backbone
from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC
from eventful_det.detectors.vitdet.config import vitdet_tiny
from eventful_det.detectors.vitdet.vitdet import WindowedViT
from eventful_det.errors import UserError

CONFIG = vitdet_tiny(
    ("a",), dim=48, depth=4, heads=3, window=4, global_blocks=(1, 3), relative_size=8, position_grid=14
)


def backbone(**changes: object) -> WindowedViT:
    torch.manual_seed(1)
    return WindowedViT(dataclasses.replace(CONFIG, **changes))


def resized(positions: Tensor, side: int, to: int) -> Tensor:
    """What detectron2 does with positions `(1, N, D)` of a square, `(1, to, to, D)`."""
    image = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(image, (to, to), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def mae(decoder: bool = False) -> dict[str, Tensor]:
    """Facebook's MAE: a plain ViT with a class token."""
    shapes = SMALL.backbone(prefix="", relative=False)
    shapes |= {"cls_token": (1, 1, 48), "norm.weight": (48,), "norm.bias": (48,)}
    if decoder:
        shapes |= {"mask_token": (1, 1, 32), "decoder_pos_embed": (1, 197, 32), "decoder_embed.weight": (32, 48)}
    return random_tensors(shapes)


def sam(image: int = 16) -> dict[str, Tensor]:
    """Segment Anything: an image encoder with relative positions, a neck, and other parts beside it."""
    shapes = dataclasses.replace(SMALL, image=image).backbone(prefix="image_encoder.", tokens=1)
    shapes = {key.replace("fc1", "lin1").replace("fc2", "lin2"): shape for key, shape in shapes.items()}
    shapes["image_encoder.pos_embed"] = (1, image, image, 48)
    shapes |= {"image_encoder.neck.0.weight": (16, 48, 1, 1), "mask_decoder.iou_token.weight": (1, 16)}
    return random_tensors(shapes)


@pytest.mark.parametrize("decoder", [False, True])
def test_mae(decoder: bool, tmp_path: Path) -> None:
    torch.save({"model": mae(decoder)}, tmp_path / "mae.pth")
    vit = backbone()
    init_backbone(vit, tmp_path / "mae.pth")
    own, theirs = vit.state_dict(), mae(decoder)
    assert torch.equal(own["pos_embed"].flatten(1, 2), theirs["pos_embed"][:, 1:])
    assert torch.equal(own["blocks.3.mlp.fc2.weight"], theirs["blocks.3.mlp.fc2.weight"])
    assert not own["blocks.1.attn.rel_pos_h"].any()


def test_positions_are_resized_as_detectron2_does(tmp_path: Path) -> None:
    torch.save({"model": mae()}, tmp_path / "mae.pth")
    vit = backbone(position_grid=10)
    init_backbone(vit, tmp_path / "mae.pth")
    torch.testing.assert_close(vit.pos_embed, resized(mae()["pos_embed"][:, 1:], 14, 10), check_stride=False)


@pytest.mark.parametrize(("token", "side"), [("token", 14), ("token", 12), ("", 14)])
def test_timm(token: str, side: int, tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16 * side,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=5,
        class_token=bool(token),
        global_pool="token" if token else "avg",
    )
    torch.nn.init.normal_(model.pos_embed)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "vit.safetensors")
    vit = backbone()
    init_backbone(vit, tmp_path / "vit.safetensors")
    positions = resized(model.pos_embed[:, bool(token) :], side, 14)
    torch.testing.assert_close(vit.pos_embed, positions, check_stride=False)
    assert torch.equal(vit.state_dict()["blocks.1.attn.qkv.bias"], model.blocks[1].attn.qkv.bias)


def test_segment_anything(tmp_path: Path) -> None:
    """Relative positions of another size are resized along their axis, as detectron2 does."""
    theirs = sam()
    torch.save(theirs, tmp_path / "sam.pth")
    vit = backbone(position_grid=16)
    init_backbone(vit, tmp_path / "sam.pth")
    own = vit.state_dict()
    assert torch.equal(own["pos_embed"], theirs["image_encoder.pos_embed"])
    assert torch.equal(own["blocks.2.mlp.fc1.weight"], theirs["image_encoder.blocks.2.mlp.lin1.weight"])
    assert torch.equal(own["blocks.0.attn.rel_pos_w"], theirs["image_encoder.blocks.0.attn.rel_pos_w"])
    table = theirs["image_encoder.blocks.1.attn.rel_pos_h"]
    expected = F.interpolate(table.reshape(1, 31, -1).permute(0, 2, 1), size=15, mode="linear")[0].T
    torch.testing.assert_close(own["blocks.1.attn.rel_pos_h"], expected, check_stride=False)


def test_timms_segment_anything(tmp_path: Path) -> None:
    model = timm.create_model(
        "samvit_base_patch16",
        img_size=128,
        embed_dim=48,
        depth=4,
        num_heads=3,
        window_size=4,
        global_attn_indexes=(1, 3),
    )
    torch.nn.init.normal_(model.pos_embed)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "sam.safetensors")
    vit = backbone(position_grid=8)
    init_backbone(vit, tmp_path / "sam.safetensors")
    assert torch.equal(vit.pos_embed, model.pos_embed)


@pytest.mark.parametrize("write", [write_zoo_pickle, write_training_checkpoint])
def test_backbones_of_detectors(write: object, tmp_path: Path) -> None:
    tensors = random_tensors(SMALL.shapes())
    path = write(tmp_path / ("zoo.pkl" if write is write_zoo_pickle else "zoo.pth"), tensors)  # type: ignore[operator]
    vit = backbone()
    init_backbone(vit, path)
    own = vit.state_dict()
    assert torch.equal(own["pos_embed"].flatten(1, 2), tensors["backbone.net.pos_embed"][:, 1:])
    assert torch.equal(own["blocks.1.attn.rel_pos_h"], tensors["backbone.net.blocks.1.attn.rel_pos_h"])


def test_the_backbone_of_a_shipped_detector() -> None:
    vit = WindowedViT(vitdet_tiny(("a",)))
    init_backbone(vit, SYNTHETIC)
    own, theirs = vit.state_dict(), load_detector(SYNTHETIC).backbone.net.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": mae(), "hook": Evil()}, "evil.pth")
    torch.save({"model": mae() | {"blocks.0.ls1.gamma": torch.ones(48)}}, "scaled.pth")
    torch.save({"model": {key: value for key, value in mae().items() if "blocks.2" not in key}}, "short.pth")
    torch.save({"model": random_tensors(Zoo(dim=96, depth=4, heads=3).backbone("", False))}, "wide.pth")
    torch.save({"model": mae() | {"pos_embed": torch.zeros(1, 150, 48)}}, "odd.pth")
    torch.save({"model": mae() | {"blocks.0.attn.rel_pos_h": torch.zeros(5)}}, "flat.pth")
    torch.save({"model": mae() | {"pos_embed": torch.zeros(1, 0, 0, 48)}}, "nothing.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, "resnet.pth")
    for name, message in (
        ("bare.pth", "bare.pth is refused: it asks for"),
        ("evil.pth", "evil.pth is refused: it asks for"),
        ("scaled.pth", r"1 unexpected \(blocks.0.ls1.gamma\)"),
        ("short.pth", r"12 missing \(blocks.2.attn.proj.bias, .*, \.\.\.\)"),
        ("wide.pth", "of another shape"),
        ("odd.pth", r"odd.pth: pos_embed is \(1, 150, 48\); expected"),
        ("flat.pth", "of another shape"),
        ("nothing.pth", "expected"),
        ("resnet.pth", "holds no ViT of a known kind"),
        ("nowhere.pth", "no backbone weights nowhere.pth"),
    ):
        with pytest.raises(UserError, match=message) as error:
            init_backbone(backbone(), name)
        assert "\n" not in str(error.value)
    assert not Path("pwned").exists()


def test_weights_of_timm_that_cannot_be_fetched_are_given_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm asks, and waits, for itself"))
    with pytest.raises(UserError, match=r"timm cannot .*huggingface.co/timm/vit_tiny_patch16_224.* cannot be fetched"):
        init_backbone(backbone(), "timm:vit_tiny_patch16_224")
