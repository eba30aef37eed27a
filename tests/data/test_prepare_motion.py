"""datasets/prepare_motion.py: labelled stills become clips in which labels follow what they are on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from running import script_main

from eventful_det.data.coco_video import load_coco_video

RED = (0, 0, 255)  # OpenCV's order


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """Two pictures with a red square each, one wide and one square, the second searched for one class alone."""
    images, annotations = [], []
    for i, (width, height) in enumerate([(360, 200), (200, 200)], start=1):
        picture = np.random.default_rng(i).integers(0, 90, (height, width, 3), dtype=np.uint8)
        picture[70:130, 80:140] = RED
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"id": i, "image_id": i, "category_id": 7, "bbox": [80, 70, 60, 60]})
    images[1]["labelled_category_ids"] = [7]
    categories = [{"id": 3, "name": "disc"}, {"id": 7, "name": "square"}]
    path = tmp_path / "stills.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def run(*args: object) -> tuple[int, str]:
    main, err = script_main("prepare_motion.py"), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        return main([str(arg) for arg in args]), err.getvalue()


def test_labels_follow_the_camera(stills: Path, tmp_path: Path) -> None:
    options = ("--clips", 2, "--frames", 5, "--sprites", 0, "--noise", 0, "--pan", 0.04, "--scale", 1.15, 1.2)
    for output in ("one", "two"):
        assert run(stills, "--output", tmp_path / output, *options) == (0, "")
    data, again = (load_coco_video(tmp_path / output / "annotations/val.json") for output in ("one", "two"))
    assert [video.frames for video in data.videos] == [video.frames for video in again.videos], "same seed, same clips"
    assert [len(video.frames) for video in data.videos] == [5, 5]
    shapes = {(frame.height, frame.width): frame.exhaustive for frame in data.frames}
    assert shapes == {(320, 576): None, (320, 320): {7}}, "frames are shaped as the picture, classes stay unknown"
    places = set()
    for frame in data.frames:
        (object_,) = frame.annotations
        picture = cv2.imread(str(data.image_path(frame))).astype(int)
        ys, xs = np.nonzero(picture[..., 2] - picture[..., 0] > 150)
        assert object_.category_id == 7
        assert object_.box == pytest.approx((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), abs=2.5)
        places.add(object_.box)
    assert len(places) == 10, "the camera moves on every frame"


def test_what_cannot_be_done_is_said_in_one_line(stills: Path, tmp_path: Path) -> None:
    for options, message in ((("--frames", 1), "length must be a whole number"),):
        status, told = run(stills, "--output", tmp_path / "out", *options)
        assert status == 2 and message in told and told.count("\n") == 1
    assert run(stills, "--output", tmp_path / "out", "--clips", 2, "--frames", 3)[0] == 0
    status, told = run(tmp_path / "out/annotations/val.json", "--output", tmp_path / "more")
    assert status == 2 and "move already" in told


def test_a_stopped_run_leaves_no_labels_of_another(
    stills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(stills, "--output", out, "--clips", 2, "--frames", 2)[0] == 0
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)  # a full disk
    status, told = run(stills, "--output", out, "--clips", 2, "--frames", 2, "--seed", 1)
    assert status == 2 and "is the disk full?" in told
    assert not (out / "annotations/val.json").exists()


def test_the_stills_are_never_overwritten(stills: Path, tmp_path: Path) -> None:
    labels = tmp_path / "annotations/val.json"
    labels.parent.mkdir()
    labels.write_text(stills.read_text().replace('"file_name": "', f'"file_name": "{tmp_path}/'))
    status, told = run(labels, "--output", tmp_path, "--clips", 1)
    assert status == 2 and "take the place of the stills" in told and len(told.strip().splitlines()) == 1
    assert labels.exists()
