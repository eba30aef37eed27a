"""Weights files: round trips, ImageNet backbones, and clear refusals."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from eventful_det.errors import UserError
from eventful_det.models.checkpoints import init_backbone, load_detector, load_exactly, read_notes, save_detector
from eventful_det.models.detector import Detector


def test_round_trip_is_exact_in_float32(tiny_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_detector(tiny_detector, path, torch.float32, {"training": "none"})
    loaded = load_detector(path)
    assert loaded.config == tiny_detector.config
    assert not loaded.training
    assert read_notes(path)["training"] == "none"
    for key, value in tiny_detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_settings_can_be_changed_at_load(tiny_detector: Detector, tmp_path: Path) -> None:
    save_detector(tiny_detector, tmp_path / "m.safetensors")
    assert load_detector(tmp_path / "m.safetensors", proposals=7).config.proposals == 7
    with pytest.raises(UserError, match="unknown option"):
        load_detector(tmp_path / "m.safetensors", no_such=1)


def test_bad_files_are_one_clear_line(tiny_detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor one of the shipped names"):
        load_detector("no_such_weights")
    save_detector(tiny_detector, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_detector(cut)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="holds no eventful_det detector"):
        load_detector(tmp_path / "foreign.safetensors")


def test_every_key_is_accounted_for() -> None:
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"1 missing \(bias\); 1 unexpected \(scale\); 1 of another shape \(weight\)"):
        load_exactly(layer, {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)}, "here")


def test_imagenet_backbone_gives_its_weights(tiny_detector: Detector, tmp_path: Path) -> None:
    config = tiny_detector.config
    vit = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=config.dim, depth=config.depth, num_heads=config.heads, num_classes=5
    )
    torch.nn.init.normal_(vit.pos_embed)
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()}, tmp_path / "vit.safetensors")
    init_backbone(tiny_detector.backbone.net, tmp_path / "vit.safetensors")
    own = tiny_detector.backbone.net.state_dict()
    assert torch.equal(own["blocks.1.mlp.fc1.weight"], vit.blocks[1].mlp.fc1.weight)
    assert torch.equal(own["pos_embed"].flatten(1, 2), vit.pos_embed[:, 1:])


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_pickles_are_not_executed(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UserError, match="cannot read backbone weights"):
        init_backbone(tiny_detector.backbone.net, tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
