"""Weights files: round trips, the formats of others, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_bytes
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
from eventful_det.detectors.checkpoints.files import load_detector, read_weights
from eventful_det.detectors.checkpoints.infer_config import infer_config
from eventful_det.detectors.checkpoints.key_maps import POSITIONS, from_detectron2, from_official
from eventful_det.detectors.checkpoints.saving import FORMAT, save_detector, save_detectron2
from eventful_det.detectors.checkpoints.weight_files import load_exactly, read_tensors
from eventful_det.detectors.vitdet.cascade import CascadeHeads
from eventful_det.detectors.vitdet.config import ModelConfig, vitdet_b_vid
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError

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
    assert read_weights(path).notes["training"] == "none"
    assert weights_equal(loaded, tiny_detector)


def test_settings_can_be_changed_at_load(tiny_detector: Detector, tmp_path: Path) -> None:
    save_detector(tiny_detector, tmp_path / "m.safetensors")
    assert load_detector(tmp_path / "m.safetensors", proposals=7).config.proposals == 7
    with pytest.raises(UserError, match="unknown option"):
        load_detector(tmp_path / "m.safetensors", no_such=1)
    with pytest.raises(UserError, match=r"by \.to\('cuda'\)"):
        load_detector(tmp_path / "m.safetensors", device="cuda")


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
        return infer_config(from_detectron2(tensors))

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


def test_other_classes_start_the_last_layer_anew(
    tiny_detector: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco = write_zoo_pickle(tmp_path / "coco.pkl", random_tensors(SMALL.shapes()))
    save_detector(tiny_detector, tmp_path / "ours.safetensors", torch.float32)
    for path, names in ((coco, ("a", "b")), (tmp_path / "ours.safetensors", ("bolt", "nut", "washer", "screw"))):
        caplog.clear()
        detector, before = load_detector(path, classes=names), load_detector(path).state_dict()
        (line,) = caplog.messages
        assert re.match(
            rf"{path.name}: the last layer starts anew, for {len(names)} classes \({names[0]}, {names[1]}", line
        )
        assert detector.names == names and not detector.config.dropped
        after = detector.state_dict()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert changed and all(key.startswith("roi_heads.box_predictor.") for key in changed)
    assert load_detector(path, classes=("star", "square", "circle")).names == ("star", "square", "circle")
    assert len(caplog.messages) == 2, "as many classes, but in another order"
    load_detector(path, classes=tiny_detector.names)
    load_detector(coco, classes=[f"mine {i}" for i in range(80)])  # as many, and the file does not know their names
    assert len(caplog.messages) == 2


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
        ("foreign.safetensors", "foreign.safetensors: no ViTDet of a known format, but x"),
        ("cut.pth", "cut.pth is not a whole file of weights"),
        ("cut.pkl", "cut.pkl is not a whole file of weights"),
        ("picture.pth", "picture.pth is not a whole file of weights"),
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


@pytest.mark.parametrize("kind", ["archive", "legacy"])
def test_files_of_pytorch_are_read_as_pytorch_reads_them(kind: str, tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        "whole": base,
        "column": base[:, 3],
        "turned": base[1:4].T,
        "half": base.half(),
        "brain": base.bfloat16(),
        "parameter": torch.nn.Parameter(base + 1),
        "count": torch.tensor(7),
        "flags": base > 0,
        "empty": torch.zeros(0, 4),
        "wide": torch.ones(1).expand(5, 2),
    }
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    rest = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 3, "type": torch.float16}
    rest |= {
        "layer": layer.state_dict(),
        "device": torch.device("cpu"),
        "names": ("a", ["b"], {"c"}),
        "shape": base.shape,
    }
    torch.save({"model": state, **rest}, tmp_path / "file", _use_new_zipfile_serialization=kind == "archive")
    expected = torch.load(tmp_path / "file", weights_only=True)["model"]
    contents = read_tensors(tmp_path / "file")
    assert list(contents.tensors) == list(expected)
    assert all(torch.equal(value, expected[key].float()) for key, value in contents.tensors.items())
    assert contents.others["epoch"] == 3 and contents.others["shape"] == (6, 8)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pkl"])
def test_the_content_says_what_a_file_is_not_its_name(name: str, tiny_detector: Detector, tmp_path: Path) -> None:
    (save_detector if name.endswith("safetensors") else save_detectron2)(tiny_detector, tmp_path / name, torch.float32)
    (tmp_path / name).rename(tmp_path / "pytorch_model.bin")
    assert weights_equal(load_detector(tmp_path / "pytorch_model.bin"), tiny_detector)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_flipped_bit_is_noticed(name: str, tiny_detector: Detector, tmp_path: Path) -> None:
    """In the numbers, and wherever else a detector could be another one after it."""
    path = tmp_path / name
    (save_detector if name.endswith("safetensors") else save_detectron2)(tiny_detector, path, torch.float32)
    before, whole = load_detector(path), path.read_bytes()
    steps = torch.randint(len(whole), (25,), generator=torch.Generator().manual_seed(0)).tolist()
    noticed = 0
    for place in [*steps, *range(8, 1500, 97), *range(len(whole) - 400, len(whole), 23)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            after = load_detector(path)
        except UserError as error:
            noticed += 1
            assert name in str(error) and "\n" not in str(error)
        else:
            assert weights_equal(after, before) and after.config == before.config
    assert noticed > 25


def test_numbers_that_are_none_are_refused(tiny_detector: Detector, tmp_path: Path) -> None:
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        with torch.no_grad():
            tiny_detector.backbone.net.pos_embed[0, i, 0, 0] = value
        save_detector(tiny_detector, tmp_path / "a.safetensors")
        save_detectron2(tiny_detector, tmp_path / "a.pth")
        save_detectron2(tiny_detector, tmp_path / "a.pkl")
        for name in ("a.safetensors", "a.pth", "a.pkl"):
            with pytest.raises(UserError, match=rf"{name} holds NaN or infinite numbers in backbone.net.pos_embed"):
                load_detector(tmp_path / name)


def header(tensors: object, metadata: dict[str, str]) -> bytes:
    """A safetensors file without a number."""
    text = json.dumps({"__metadata__": metadata, **tensors}).encode()  # type: ignore[dict-item]
    return len(text).to_bytes(8, "little") + text


def test_headers_that_claim_more_than_there_is(tiny_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    config = dataclasses.asdict(tiny_detector.config)
    whole = {key: value.contiguous() for key, value in tiny_detector.state_dict().items()}
    nothing = {"a": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}
    for change in (
        {"depth": 10**9},
        {"depth": 100, "dim": 65536, "heads": 1, "channels": 65536},
        {"box_fc": [65536] * 16},
        {"box_fc": [1] * 10**6},
        {"relative_size": 4096, "position_grid": 4096},
        {"depth": "4"},
        {"dim": 1e400},
        {"dim": None},
        {"heads": 0},
        {"classes": "abc"},
        {"classes": ["a", "a", "b"]},
        {"classes": [1, 2, 3]},
        {"score_threshold": float("nan")},
        {"global_blocks": [7]},
        {"proposals": 10**12},
        {"no_such": 1},
    ):
        text = json.dumps({**config, **change})
        notes = {"format": FORMAT, "config": text}
        for data in (header(nothing, notes), save_bytes(whole, notes)):
            path.write_bytes(data)
            began = time.process_time()
            with pytest.raises(UserError, match=r"bomb\.safetensors") as error:
                load_detector(path)
            assert time.process_time() - began < 5 and "\n" not in str(error.value) and len(str(error.value)) < 800
    for data in (
        (2**62).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little") + b"{" * 1000,
        b"\x02" + bytes(7) + b"{}",
        header({}, {"format": FORMAT, "config": "[" * 10**6}),
        header(nothing, {"format": FORMAT}),
        header(nothing, {"format": FORMAT, "config": "[]"}),
        header(nothing, {"format": FORMAT, "config": "{"}),
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, {"format": FORMAT}),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bomb\.safetensors") as error:
            load_detector(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_archives_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(300_000)}}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    torch.save({"model": {"a": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "wide.pth")
    for name in ("packed.pth", "wide.pth"):
        with pytest.raises(UserError, match="claims? more than it holds"):
            read_tensors(tmp_path / name)


def test_what_detectron2_cannot_read_is_not_written(tiny_detector: Detector, tmp_path: Path) -> None:
    for name, dtype, message in (
        ("m.bin", torch.float32, "give one of these names"),
        ("m.pkl", torch.bfloat16, "cannot be bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            save_detectron2(tiny_detector, tmp_path / name, dtype)
    assert not list(tmp_path.iterdir())
