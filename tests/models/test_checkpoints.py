"""Weights files: round trips, the formats of others, and clear refusals."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo_files import (
    SMALL,
    Zoo,
    official_name,
    official_tensors,
    random_tensors,
    write_training_checkpoint,
    write_zoo_pickle,
)

from eventful_det.data.classes import COCO_NAMES, IMAGENET_VID
from eventful_det.errors import UserError
from eventful_det.models.cascade import CascadeHeads
from eventful_det.models.checkpoints import load_detector, read_notes, read_weights, save_detector, save_detectron2
from eventful_det.models.config import ModelConfig, vitdet_b_vid
from eventful_det.models.detector import Detector
from eventful_det.models.key_maps import POSITIONS, from_detectron2, from_official
from eventful_det.models.recognise import config_of
from eventful_det.models.weight_files import load_exactly

PEER = os.environ.get("EVENTFUL_PEER")  # a checkout of WISION-Lab/eventful-transformer


def weights_equal(a: Detector, b: Detector) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in own.items())


def test_round_trip_is_exact_in_float32(tiny_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_detector(tiny_detector, path, torch.float32, {"training": "none"})
    loaded = load_detector(path)
    assert loaded.config == tiny_detector.config
    assert not loaded.training
    assert read_notes(path)["training"] == "none"
    assert weights_equal(loaded, tiny_detector)


def test_settings_can_be_changed_at_load(tiny_detector: Detector, tmp_path: Path) -> None:
    save_detector(tiny_detector, tmp_path / "m.safetensors")
    assert load_detector(tmp_path / "m.safetensors", proposals=7).config.proposals == 7
    with pytest.raises(UserError, match="unknown option"):
        load_detector(tmp_path / "m.safetensors", no_such=1)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_ours_to_detectron2_and_back_bit_for_bit(name: str, tiny_detector: Detector, tmp_path: Path) -> None:
    save_detectron2(tiny_detector, tmp_path / name, notes={"training": "none"})
    weights = read_weights(tmp_path / name)
    assert weights.format == "detectron2" and weights.notes["training"] == "none" and not weights.left_out
    loaded = load_detector(tmp_path / name)
    assert loaded.config == tiny_detector.config and weights_equal(loaded, tiny_detector)
    if name == "model.pth":
        inside = torch.load(tmp_path / name, weights_only=True)["model"]
        assert inside["backbone.net.pos_embed"].shape == (1, 1 + 14 * 14, 48), "with detectron2's class token"


ZOO = [
    dataclasses.replace(SMALL, masks=masks, cascade=cascade, classes=classes)
    for masks, cascade, classes in ((True, False, 80), (True, True, 80), (False, False, 30), (False, True, 7))
]


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("kind", ["zoo.pkl", "final.pth", "official.pth"])
def test_files_of_others(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    tensors = random_tensors(zoo.shapes())
    path = tmp_path / kind
    if kind == "zoo.pkl":
        write_zoo_pickle(path, tensors)
    elif kind == "final.pth":
        write_training_checkpoint(path, tensors)
    else:
        torch.save(official_tensors(tensors), path)
    weights = read_weights(path)
    assert weights.format == ("official" if kind == "official.pth" else "detectron2")
    assert set(weights.left_out) == {key for key in tensors if "mask_head" in key}
    detector = load_detector(path)
    assert isinstance(detector.roi_heads, CascadeHeads) == zoo.cascade
    own = detector.state_dict()
    assert own.keys() == tensors.keys() - set(weights.left_out)
    assert torch.equal(own.pop(POSITIONS).flatten(1, 2), tensors[POSITIONS][:, 1:])
    assert all(torch.equal(value, tensors[key]) for key, value in own.items())
    known = {80: COCO_NAMES, 30: tuple(category.name for category in IMAGENET_VID)}
    assert detector.names == known.get(zoo.classes, tuple(f"class_{i}" for i in range(zoo.classes)))
    assert detector.config.square_pad == 128
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 96, 120)])
    assert found.boxes.isfinite().all()


def test_the_zoos_models_are_recognised_by_their_shapes() -> None:
    def config(zoo: Zoo) -> ModelConfig:
        tensors = {key: torch.empty(shape, device="meta") for key, shape in zoo.shapes().items()}
        return config_of(from_detectron2(tensors))

    vid = vitdet_b_vid(tuple(category.name for category in IMAGENET_VID), square_pad=1024)
    assert config(Zoo(classes=30, masks=False)) == vid
    coco = dict(classes=COCO_NAMES, proposals=1000, region_samples=512, box_loss="l1", box_loss_weight=1.0)
    coco = dataclasses.replace(vid, **coco, short_side=1024)
    assert config(Zoo()) == coco
    assert config(Zoo(cascade=True)) == dataclasses.replace(coco, box_stages=3)
    large = config(Zoo(dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)))
    assert (large.dim, large.depth, large.heads, large.global_blocks) == (1024, 24, 16, (5, 11, 17, 23))
    assert config(Zoo(window=64)).global_blocks == (2, 5, 8, 11), "where it is not to be seen"
    with pytest.raises(UserError, match="this is an LVIS model"):
        config(Zoo(classes=1203))


def test_official_names() -> None:
    keys = list(Zoo(cascade=True).shapes())
    names = [official_name(key) for key in keys]
    assert len(set(names)) == len(names)
    assert list(from_official(dict.fromkeys(names, torch.zeros(1)))) == keys


@pytest.mark.skipif(PEER is None, reason="needs a checkout of WISION-Lab/eventful-transformer in EVENTFUL_PEER")
@pytest.mark.parametrize("zoo", [Zoo(), Zoo(cascade=True), Zoo(classes=30, masks=False)])
def test_official_names_are_those_of_the_official_code(zoo: Zoo) -> None:
    lines = (Path(str(PEER)) / "configs/convert/vitdet_b.txt").read_text().split()
    patterns = list(zip(lines[::2], lines[1::2], strict=True))
    for key in zoo.shapes():
        theirs = next((re.sub(find, name, key) for find, name in patterns if re.search(find, key)), key)
        assert official_name(key) == theirs


def test_classes_may_change_when_allowed(tmp_path: Path) -> None:
    path = write_zoo_pickle(tmp_path / "coco.pkl", random_tensors(SMALL.shapes()))
    with pytest.raises(UserError, match=r"4 of another shape \(roi_heads.box_predictor"):
        load_detector(path, classes=("a", "b"))
    detector = load_detector(path, classes=("a", "b"), allow=["roi_heads.box_predictor.*"])
    assert detector.names == ("a", "b") and detector.roi_heads.box_predictor.cls_score.weight.shape[0] == 3


def test_every_key_is_accounted_for() -> None:
    layer = torch.nn.Linear(2, 3)
    tensors = {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)}
    with pytest.raises(UserError, match=r"1 missing \(bias\); 1 unexpected \(scale\); 1 of another shape \(weight\)"):
        load_exactly(layer, tensors, "here")
    with pytest.raises(UserError, match=r"here does not fit the model: 1 unexpected \(scale\)$"):
        load_exactly(layer, tensors, "here", allow=["bias", "w*"])
    before = layer.weight.detach().clone()
    assert load_exactly(layer, tensors, "here", allow=["*"]) == ["bias", "scale", "weight"]
    assert torch.equal(layer.weight, before)
    assert load_exactly(layer, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "here", allow=["*"]) == []
    assert layer.weight.sum() == 6


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_keys_of_a_detectron2_file_too(change: str, tmp_path: Path) -> None:
    tensors = random_tensors(SMALL.shapes())
    if change == "missing":
        del tensors["backbone.simfp_2.5.norm.bias"]
    elif change == "unexpected":
        tensors["roi_heads.keypoint_head.weight"] = torch.zeros(1)
    else:
        tensors["backbone.net.blocks.2.attn.proj.weight"] = torch.zeros(48, 47)
    path = write_zoo_pickle(tmp_path / "zoo.pkl", tensors)
    with pytest.raises(UserError, match="zoo.pkl does not fit the model: 1 (missing|unexpected|of another shape)"):
        load_detector(path)
    if change == "unexpected":
        load_detector(path, allow=["roi_heads.keypoint_head.*"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch pwned",))


def test_bad_files_are_one_clear_line(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_detector(tiny_detector, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, "foreign.safetensors")
    save_detectron2(tiny_detector, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-1000])
    save_detectron2(tiny_detector, "whole.pkl")
    Path("cut.pkl").write_bytes(Path("whole.pkl").read_bytes()[:-1000])
    Path("picture.pth").write_bytes(b"\x89PNG" + bytes(100))
    torch.save({"model": {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}}, "resnet.pth")
    torch.save({"backbone.net.pos_embed": torch.zeros(1, 5, 8), "fc.bias": torch.zeros(1)}, "half.pth")
    torch.save({"model": {"a": torch.zeros(1), "b": 3}}, "numbers.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "hook": Evil()}, "evil.pth")
    Path("evil.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": Evil()}))
    for name, message in (
        ("no_such_weights", "neither a file nor one of the shipped names"),
        ("cut.safetensors", "not a readable safetensors"),
        ("foreign.safetensors", "holds no eventful_det detector"),
        ("cut.pth", "cut.pth is not a whole PyTorch file of weights"),
        ("cut.pkl", "cut.pkl is not a whole pickle of arrays"),
        ("picture.pth", "picture.pth is not a whole PyTorch file of weights"),
        ("resnet.pth", "no ViTDet of a known format, but conv1.weight, fc.bias"),
        ("half.pth", "half.pth: this is no ViTDet of detectron2: it has no backbone.net.patch_embed.proj.weight"),
        ("numbers.pth", "numbers.pth holds no named tensors: b among them is none"),
        ("list.pth", "list.pth holds a list, no named tensors"),
        ("evil.pth", r"evil.pth is refused: it asks for (os|posix).system"),
        ("evil.pkl", r"evil.pkl is refused: it asks for (os|posix).system"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_detector(name)
        assert "\n" not in str(error.value)
    assert not Path("pwned").exists()


def test_what_detectron2_cannot_read_is_not_written(tiny_detector: Detector, tmp_path: Path) -> None:
    for name, dtype, message in (
        ("m.bin", torch.float32, "give one of these names"),
        ("m.pkl", torch.bfloat16, "cannot be bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            save_detectron2(tiny_detector, tmp_path / name, dtype)
    assert not list(tmp_path.iterdir())
