"""Recognisers in and out of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import small_recogniser
from torch import Tensor

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.errors import UserError
from eventful_det.recognition.checkpoints import (
    is_recogniser,
    load_recogniser,
    read_recogniser,
    save_official,
    save_recogniser,
    save_tadaconv,
    start_from_image,
)
from eventful_det.recognition.config import numbered
from eventful_det.recognition.recogniser import Recogniser


def published(**changes: object) -> Recogniser:
    """Square positions and heads of 64 wide, as in all published networks."""
    sizes = {"dim": 64, "heads": 1, "temporal_heads": 1, "size": (16, 16), "position_grid": (2, 2)}
    return small_recogniser(**{**sizes, "stride": 1, "fps": 30.0, **changes})


def logits(recogniser: Recogniser) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return recogniser(torch.randn(2, 6, 3, *recogniser.config.size, generator=generator))


def test_our_own_format_keeps_everything(tmp_path: Path) -> None:
    recogniser = small_recogniser()
    notes = {"command": "test", "config": "{}", "format": "?"}
    save_recogniser(recogniser, tmp_path / "own.safetensors", torch.float32, notes)
    loaded = load_recogniser(tmp_path / "own.safetensors", temporal_views=1)
    assert loaded.config.classes == recogniser.config.classes and loaded.config.temporal_views == 1
    assert read_recogniser(tmp_path / "own.safetensors").notes["command"] == "test"
    torch.testing.assert_close(logits(loaded), logits(recogniser))
    named = load_recogniser(tmp_path / "own.safetensors", classes={"verb": ("a", "b"), "noun": ("c", "d", "e")})
    assert named.config.classes["noun"] == ("c", "d", "e")


@pytest.mark.parametrize("save", [save_official, save_tadaconv])
def test_other_formats_are_written_and_read_back(tmp_path: Path, save: Callable[..., None]) -> None:
    recogniser = published()
    save(recogniser, tmp_path / "other.pth")
    assert is_recogniser(tmp_path / "other.pth")
    loaded = load_recogniser(tmp_path / "other.pth")
    mean_std = {"mean": recogniser.config.mean, "std": recogniser.config.std}
    assert {name: getattr(loaded.config, name) for name in mean_std} == mean_std
    expected = logits(recogniser)
    ours = logits(loaded)
    assert torch.equal(next(iter(ours.values())), expected["verb"])
    if save is save_tadaconv:  # keeps the nouns
        assert torch.equal(ours["noun"], expected["noun"])


def test_an_epic_checkpoint_has_verbs_at_30_frames_per_second(tmp_path: Path) -> None:
    with torch.device("cpu"):
        recogniser = Recogniser(
            published().config.__class__(**{**vars(published().config), "classes": {"verb": numbered(97)}})
        )
    save_official(recogniser, tmp_path / "epic.pth")
    config = load_recogniser(tmp_path / "epic.pth").config
    assert (list(config.classes), config.stride, config.fps) == (["verb"], 1, 30.0)


def flax(recogniser: Recogniser) -> dict[str, Tensor]:
    """The tensors as scenic's factorised ViViT has them, nouns before verbs in one layer."""
    state, heads = recogniser.state_dict(), recogniser.config.heads
    named = {"embedding/kernel": state["embedding.conv.weight"].permute(2, 3, 4, 1, 0)}
    named["embedding/bias"] = state["embedding.conv.bias"]
    for ours, theirs in (("spatial_model", "SpatialTransformer"), ("temporal_model", "TemporalTransformer")):
        named[f"cls_{theirs}"] = state[f"{ours}.class_token"]
        encoding = state[f"{ours}.backbone.position_encoding.encoding"]
        named[f"{theirs}/posembed_input/pos_embedding"] = encoding
        named[f"{theirs}/encoder_norm/scale"] = state[f"{ours}.layer_norm.weight"]
        named[f"{theirs}/encoder_norm/bias"] = state[f"{ours}.layer_norm.bias"]
        for i in range(len(getattr(recogniser, ours).backbone.blocks)):
            block, place = f"{ours}.backbone.blocks.{i}", f"{theirs}/encoderblock_{i}"
            qkv = state[f"{block}.qkv.weight"].unflatten(0, (3, heads, -1))  # (3, heads, d, D)
            bias = state[f"{block}.qkv.bias"].unflatten(0, (3, heads, -1))
            attention = f"{place}/MultiHeadDotProductAttention_0"
            for j, name in enumerate(("query", "key", "value")):
                named[f"{attention}/{name}/kernel"] = qkv[j].permute(2, 0, 1)
                named[f"{attention}/{name}/bias"] = bias[j]
            named[f"{attention}/out/kernel"] = state[f"{block}.projection.weight"].T.unflatten(0, (heads, -1))
            named[f"{attention}/out/bias"] = state[f"{block}.projection.bias"]
            for j in (0, 1):
                named[f"{place}/MlpBlock_0/Dense_{j}/kernel"] = state[f"{block}.mlp_{j + 1}.weight"].T
                named[f"{place}/MlpBlock_0/Dense_{j}/bias"] = state[f"{block}.mlp_{j + 1}.bias"]
            for j, name in enumerate(("input_layer_norm", "mlp_layer_norm")):
                named[f"{place}/LayerNorm_{j}/scale"] = state[f"{block}.{name}.weight"]
                named[f"{place}/LayerNorm_{j}/bias"] = state[f"{block}.{name}.bias"]
    nouns = "other_classifiers.noun"
    named["output_projection/kernel"] = torch.cat([state[f"{nouns}.weight"], state["classifier.weight"]]).T
    named["output_projection/bias"] = torch.cat([state[f"{nouns}.bias"], state["classifier.bias"]])
    return {key: value.contiguous().clone() for key, value in named.items()}


def test_scenic_is_transposed_and_its_heads_are_split(tmp_path: Path) -> None:
    values = {**vars(published().config), "classes": {"verb": numbered(97), "noun": numbered(300)}}
    torch.manual_seed(0)
    recogniser = Recogniser(type(published().config)(**values)).eval()
    torch.save(flax(recogniser), tmp_path / "scenic.pth")
    loaded = load_recogniser(tmp_path / "scenic.pth")
    assert loaded.config.mean == (0.5, 0.5, 0.5)
    torch.testing.assert_close(logits(loaded), logits(recogniser))
    broken = flax(recogniser)
    broken.pop("cls_TemporalTransformer")
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(UserError, match="no cls_TemporalTransformer"):
        load_recogniser(tmp_path / "broken.pth")


@pytest.mark.parametrize("key, reason", [("vivit.layernorm.weight", "Hugging Face"), ("videomae.x.weight", "VideoMAE")])
def test_networks_without_steps_are_refused(tmp_path: Path, key: str, reason: str) -> None:
    torch.save({key: torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"{reason}.*no steps"):
        load_recogniser(tmp_path / "other.pth")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights 'nothing'"):
        load_recogniser("nothing")
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no recogniser of a known format"):
        load_recogniser(tmp_path / "a.pth")
    tensors = published().state_dict()
    tensors.pop("temporal_model.layer_norm.bias")
    torch.save({k: v for k, v in tensors.items() if "noun" not in k}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="missing .temporal_model.layer_norm.bias"):
        load_recogniser(tmp_path / "b.pth")


def test_a_still_tubelet_gives_the_token_of_its_picture(tmp_path: Path) -> None:
    recogniser = published(depth=1, mlp=128)
    timm = {
        "patch_embed.proj.weight": torch.randn(64, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(64),
        "cls_token": torch.randn(1, 1, 64),
        "pos_embed": torch.randn(1, 5, 64),
        "norm.weight": torch.randn(64),
        "norm.bias": torch.randn(64),
        "head.weight": torch.randn(10, 64),
    }
    for name, shape in {
        "attn.qkv": (192, 64),
        "attn.proj": (64, 64),
        "mlp.fc1": (128, 64),
        "mlp.fc2": (64, 128),
    }.items():
        timm |= {f"blocks.0.{name}.weight": torch.randn(shape), f"blocks.0.{name}.bias": torch.randn(shape[0])}
    for name in ("norm1", "norm2"):
        timm |= {f"blocks.0.{name}.weight": torch.randn(64), f"blocks.0.{name}.bias": torch.randn(64)}
    torch.save(timm, tmp_path / "vit.pth")
    start_from_image(recogniser, tmp_path / "vit.pth")
    picture = torch.randn(1, 1, 3, 16, 16)
    ours = recogniser.embedding(recogniser.tubelets(picture.expand(-1, 2, -1, -1, -1))[0])
    theirs = torch.conv2d(picture[0], timm["patch_embed.proj.weight"], timm["patch_embed.proj.bias"], stride=8)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no ViT of a known kind"):
        start_from_image(recogniser, _saved(tmp_path / "no.pth", {"x": torch.zeros(1)}))


def _saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def test_each_loader_points_to_the_other() -> None:
    with pytest.raises(UserError, match="load_recogniser"):
        load_detector("vivit_tiny_synthetic")
    with pytest.raises(UserError, match="load_detector"):
        load_recogniser("vitdet_tiny_vid")
