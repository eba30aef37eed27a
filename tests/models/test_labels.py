"""Label maps rename and drop classes without touching what the others get."""

from pathlib import Path

import pytest
import torch

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError


@pytest.fixture
def weights(tiny_detector: Detector, tmp_path: Path) -> Path:
    torch.nn.init.normal_(tiny_detector.roi_heads.box_predictor.cls_score.weight, std=0.3)
    save_detector(tiny_detector, tmp_path / "weights.safetensors", torch.float32)
    return tmp_path / "weights.safetensors"


def test_dropped_classes_vanish_and_the_others_stay(weights: Path) -> None:
    full = load_detector(weights, score_threshold=0.01)
    old, dropped = full.names[0], full.names[1]
    ours = load_detector(weights, {old: "thing", dropped: None}, score_threshold=0.01)
    assert ours.names == ("thing", *full.names[1:])
    image = torch.rand(1, 3, 64, 96)
    (everything,), (some,) = full(image), ours(image)
    assert (everything.labels == 1).any() and (everything.labels != 1).any(), "the case is not trivial"
    keep = everything.labels != 1
    assert torch.equal(some.labels, everything.labels[keep])
    assert torch.equal(some.scores, everything.scores[keep])
    assert torch.equal(some.boxes, everything.boxes[keep])


def test_a_label_map_is_read_from_a_file(weights: Path, tmp_path: Path) -> None:
    names = load_detector(weights).names
    (tmp_path / "labels.json").write_text(f'{{"{names[0]}": "thing"}}')
    assert load_detector(weights, tmp_path / "labels.json").names[0] == "thing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a label map"),
        ("{", "not valid JSON"),
        ('{"yeti": "thing"}', "no class yeti"),
        ('{"FIRST": "SECOND"}', "two classes are called"),
        ('{"FIRST": 3}', "not a label map"),
    ],
)
def test_errors_say_what_was_expected(weights: Path, tmp_path: Path, text: str, message: str) -> None:
    first, second = load_detector(weights).names[:2]
    (tmp_path / "labels.json").write_text(text.replace("FIRST", first).replace("SECOND", second))
    with pytest.raises(UserError, match=message):
        load_detector(weights, tmp_path / "labels.json")


def test_a_missing_file(weights: Path) -> None:
    with pytest.raises(UserError, match="cannot read the label map"):
        load_detector(weights, "nowhere.json")
