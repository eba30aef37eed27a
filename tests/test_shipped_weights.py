"""The shipped detector sees the shapes it was trained on, dense and gated, in videos nobody trained on."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from eventful_det import load_detector
from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.data.synthetic import SceneOptions, SyntheticFrame, render_video


def share_found(frames: list[SyntheticFrame], budget: float) -> float:
    """Share of the clearly visible objects that are found with their class at an overlap of one half."""
    detector = load_detector()
    found = []
    for frame, result in zip(frames, detector.stream([f.image for f in frames], budget=budget), strict=True):
        detections = result.detections
        for item in frame.objects:
            if item.visible_fraction > 0.6:
                label = detector.names.index(SYNTHETIC_SHAPES[item.category - 1].name)
                sure = detections.boxes[(detections.labels == label) & (detections.scores > 0.5)]
                overlaps = box_iou(torch.tensor([item.box], dtype=torch.float32), sure)
                found.append(overlaps.numel() > 0 and float(overlaps.max()) > 0.5)
    return sum(found) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25])
def test_shapes_are_found(budget: float) -> None:
    options = SceneOptions(frames=10)
    frames = [f for index in (0, 3, 5) for f in render_video(options, seed=99, index=index, split="test")]
    assert share_found(frames, budget) > 0.85
