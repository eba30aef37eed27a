"""The shipped detectors see what they were trained on, dense and gated, in videos nobody trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

import eventful_det
from eventful_det import load_detector
from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.data.coco_video import load_coco_video
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video.pictures import read_image
from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError

DAVIS = Path(__file__).parents[2] / "shared" / "data" / "davis" / "annotations.json"

Truth = list[tuple[str, tuple[float, ...]]]  # class names and boxes xyxy


def share_found(detector: Detector, images: Iterable[NDArray], truth: Sequence[Truth], budget: float) -> float:
    """Share of the objects that are found with their class at an overlap of one half."""
    found = []
    for objects, result in zip(truth, detector.stream(images, budget=budget), strict=True):
        detections = result.detections
        for name, box in objects:
            label = detector.names.index(name)
            sure: Tensor = detections.boxes[(detections.labels == label) & (detections.scores > 0.5)]
            overlaps = box_iou(torch.tensor([box], dtype=torch.float32), sure)
            found.append(overlaps.numel() > 0 and float(overlaps.max()) > 0.5)
    return sum(found) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25])
def test_shapes_are_found(budget: float) -> None:
    options = SceneOptions(frames=10)
    frames = [f for index in (0, 3, 5) for f in render_video(options, seed=99, index=index, split="test")]
    truth = [
        [(SYNTHETIC_SHAPES[item.category - 1].name, item.box) for item in frame.objects if item.visible_fraction > 0.6]
        for frame in frames
    ]
    assert share_found(load_detector(SYNTHETIC), [f.image for f in frames], truth, budget) > 0.85


@pytest.mark.slow
@pytest.mark.skipif(not DAVIS.is_file(), reason="needs held-out DAVIS sequences, which are not in the repository")
@pytest.mark.parametrize("sequence", ["dog", "car-roundabout"])
def test_real_objects_are_found_in_held_out_videos(sequence: str) -> None:
    data = load_coco_video(DAVIS)
    names = dict(data.categories)
    (video,) = (video for video in data.videos if video.name == sequence)
    frames = video.frames[::3][:12]
    truth = [[(names[a.category_id], a.box) for a in frame.annotations] for frame in frames]
    images = [read_image(str(data.image_path(frame))) for frame in frames]
    assert share_found(load_detector(), images, truth, 1.0) > 0.7


@pytest.mark.parametrize(
    "path", sorted(Path(eventful_det.__file__).parent.glob("weights/*.safetensors")), ids=lambda path: path.stem
)
def test_damage_to_shipped_weights_would_be_noticed(path: Path, tmp_path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1000] ^= 1
    damaged = tmp_path / path.name
    damaged.write_bytes(contents)
    with pytest.raises(UserError, match="damaged"):
        load_detector(str(damaged))
