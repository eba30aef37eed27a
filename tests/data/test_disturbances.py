"""Disturbances of synthetic video: seeded, of the same size, boxes with their objects, and each does something."""

from __future__ import annotations

import json
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from running import script_main

from eventful_det.data.synthetic import SceneOptions, SyntheticFrame, render_video
from eventful_det.data.synthetic.disturbances import DISTURBANCES, disturb
from eventful_det.errors import UserError

STILL = next(render_video(SceneOptions(width=192, height=128, frames=1, noise=0), seed=3))
FRAMES = 10


@pytest.mark.parametrize("name", DISTURBANCES)
def test_every_disturbance_changes_pictures_and_keeps_frames_whole(name: str) -> None:
    frames = list(disturb(repeat(STILL, FRAMES), name, seed=1))
    again = list(disturb(repeat(STILL, FRAMES), name, seed=1))
    assert len(frames) == FRAMES
    changes = [float(np.abs(f.image.astype(int) - STILL.image).mean()) for f in frames]
    assert 0 < max(changes) < 80
    for frame, same in zip(frames, again, strict=True):
        assert frame.image.shape == STILL.image.shape and frame.image.dtype == np.uint8
        assert np.array_equal(frame.image, same.image) and frame.objects == same.objects
        for one in frame.objects:
            x1, y1, x2, y2 = one.box
            assert 0 <= x1 < x2 <= 192 and 0 <= y1 < y2 <= 128


@pytest.mark.parametrize("name", ["camera_shake", "ptz"])
def test_boxes_move_with_the_camera(name: str) -> None:
    image = np.zeros((128, 192, 3), np.uint8)
    image[40:80, 60:120] = 255
    box = next(one for one in STILL.objects)
    marked = SyntheticFrame(image, [type(box)(0, 1, (60, 40, 120, 80), False, 1.0)])
    for frame in disturb(repeat(marked, FRAMES), name, seed=1):
        rows, columns = (np.flatnonzero((frame.image[..., 0] > 127).any(axis)) for axis in (1, 0))
        seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.allclose(frame.objects[0].box, seen, atol=1.5)


def test_a_data_set_can_be_disturbed_and_says_so(tmp_path: Path) -> None:
    make = script_main("make_synthetic_vid.py")
    tiny = ["--width", "96", "--height", "64", "--train-videos", "0", "--val-videos", "1", "--val-frames", "2"]
    for name in ("plain", "night"):
        extra = ["--disturbance", name] if name == "night" else []
        assert make(["--output", str(tmp_path / name), "--workers", "1", *tiny, *extra]) == 0
    options = [json.loads((tmp_path / name / "synthetic.json").read_text())["options"] for name in ("plain", "night")]
    assert "disturbance" not in options[0] and options[1]["disturbance"] == "night"
    pictures = [next((tmp_path / name).rglob("*.JPEG")).read_bytes() for name in ("plain", "night")]
    assert pictures[0] != pictures[1]


def test_unknown_names_are_told() -> None:
    with pytest.raises(UserError, match="did you mean night"):
        disturb([STILL], "nigth", seed=0)
