"""Synthetic videos: same bits everywhere, fair boxes, the ILSVRC layout."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import script_main

from eventful_det.data.classes import SYNTHETIC_SHAPES, load_classes
from eventful_det.data.synthetic import SceneOptions, render_video, video_facts
from eventful_det.data.synthetic.shapes import OUTLINES, shape_mask
from eventful_det.errors import UserError

SMALL = SceneOptions(width=192, height=128, frames=12)
TINY = ["--width", "128", "--height", "96", "--train-videos", "3", "--val-videos", "2"]
TINY += ["--train-frames", "3", "--val-frames", "4"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    cv2.setNumThreads(1)


@pytest.fixture(scope="module")
def make() -> Callable[[list[str]], int]:
    return script_main("make_synthetic_vid.py")


def digest(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_category_has_a_shape_and_shapes_differ() -> None:
    assert [c.name for c in SYNTHETIC_SHAPES] == list(OUTLINES)
    masks = [shape_mask(name, 48) for name in OUTLINES]
    for i, a in enumerate(masks):
        assert 0.15 < a.mean() <= 1
        for b in masks[:i]:
            assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85


@given(seed=st.integers(0, 2**31), index=st.integers(0, 1000), split=st.sampled_from(["train", "val", "demo"]))
@settings(max_examples=25, deadline=None)
def test_frames_and_boxes_are_well_formed(seed: int, index: int, split: str) -> None:
    options = replace(SMALL, frames=4)
    frames = list(render_video(options, seed, index, split))
    assert len(frames) == options.frames
    for frame in frames:
        assert frame.image.shape == (options.height, options.width, 3) and frame.image.dtype == np.uint8
        assert frame.image.std() > 2
        assert frame.objects, "the nearest object stays in view"
        assert len({o.track_id for o in frame.objects}) == len(frame.objects) <= options.objects[1]
        for o in frame.objects:
            x1, y1, x2, y2 = o.box
            assert 0 <= x1 < x2 <= options.width and 0 <= y1 < y2 <= options.height
            assert min(x2 - x1, y2 - y1) >= options.min_side
            assert options.min_visible <= o.visible_fraction <= 1
            assert 1 <= o.category <= len(SYNTHETIC_SHAPES)


def test_the_same_request_gives_the_same_bits_and_others_do_not() -> None:
    first, again = (list(render_video(SMALL, 3, 5, "val")) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a.objects == b.objects
    for seed, index, split in ((4, 5, "val"), (3, 6, "val"), (3, 5, "train")):
        other = next(render_video(SMALL, seed, index, split))
        assert np.abs(other.image.astype(int) - first[0].image).mean() > 5


def test_boxes_are_tight_around_what_changes() -> None:
    """With one object and a static camera, pixels that ever change lie in the union of the boxes."""
    options = replace(SMALL, objects=(1, 1), noise=0, exposure_drift=0, static_fraction=1, cut_fraction=0)
    options = replace(options, occluder_fraction=0)
    frames = list(render_video(options, seed=0, index=2))  # index 2: fast
    changed = np.zeros((options.height, options.width), bool)
    boxes = np.zeros_like(changed)
    for a, b in itertools.pairwise(frames):
        changed |= np.abs(a.image.astype(int) - b.image).max(-1) > 24
    for frame in frames:
        x1, y1, x2, y2 = (int(v) for v in frame.objects[0].box)
        boxes[y1:y2, x1:x2] = True
    assert changed.any()
    assert (changed & ~boxes).sum() <= 0.01 * changed.sum()
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    outer_rows, outer_columns = np.flatnonzero(boxes.any(1)), np.flatnonzero(boxes.any(0))
    for inner, outer in ((rows, outer_rows), (columns, outer_columns)):
        assert abs(inner[0] - outer[0]) <= 3 and abs(inner[-1] - outer[-1]) <= 3


def test_a_static_camera_without_noise_shows_a_still_background() -> None:
    options = replace(SMALL, noise=0, exposure_drift=0, static_fraction=1, cut_fraction=0)
    frames = list(render_video(options, seed=1, index=0))
    free = np.ones((options.height, options.width), bool)
    for frame in frames:
        for o in frame.objects:
            x1, y1, x2, y2 = (int(v) for v in o.box)
            free[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3] = False
    still = (frames[0].image == frames[-1].image).all(-1)
    assert still[free].mean() > 0.9  # what is too hidden to be labelled may still move


def test_motion_groups_follow_the_imagenet_vid_rule() -> None:
    """Mean IoU with the same object within 10 frames: slow above 0.9, fast below 0.7."""
    options = replace(SMALL, frames=21, noise=0)
    right = total = 0
    for index in range(9):
        tracks: dict[int, dict[int, tuple[float, ...]]] = defaultdict(dict)
        for t, frame in enumerate(render_video(options, 0, index)):
            for o in frame.objects:
                tracks[o.track_id][t] = o.box
        for boxes in tracks.values():
            if len(boxes) == options.frames:
                mean = float(np.mean([_iou(boxes[10], b) for t, b in boxes.items() if t != 10]))
                group = "slow" if mean > 0.9 else "fast" if mean < 0.7 else "medium"
                right, total = right + (group == video_facts(options, 0, index).motion), total + 1
    assert total > 10 and right / total > 0.75


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0.0) * max(h, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_facts_spread_evenly_and_cuts_start_new_tracks() -> None:
    options = replace(SMALL, cut_fraction=0.5)
    facts = [video_facts(options, 0, i) for i in range(40)]
    assert sum(f.camera == "static" for f in facts) == 20
    assert 18 <= sum(bool(f.cuts) for f in facts) <= 22
    index = next(i for i, f in enumerate(facts) if f.cuts)
    cut = facts[index].cuts[0]
    frames = list(render_video(options, 0, index))
    assert [t for t, f in enumerate(frames) if f.is_cut] == facts[index].cuts
    before, after = ({o.track_id for f in part for o in f.objects} for part in (frames[:cut], frames[cut:]))
    assert not before & after


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 8},
        {"frames": 0},
        {"objects": (0, 3)},
        {"object_size": (0.5, 0.1)},
        {"cut_fraction": 2},
        {"noise": math.nan},
        {"width": 10**5},
    ],
)
def test_impossible_options_are_refused_with_a_reason(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"synthetic video.{next(iter(wrong))}.* must be"):
        SceneOptions(**wrong)  # type: ignore[arg-type]


def test_tree_has_the_ilsvrc_layout(make: Callable[[list[str]], int], tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert make(["--output", str(root), "--workers", "1", "--mp4", *TINY]) == 0
    train = [f"ILSVRC2015_VID_train_0000/ILSVRC2015_train_{i:08d}" for i in range(3)]
    val = [f"ILSVRC2015_val_{i:08d}" for i in range(2)]
    names = {f"train/{v}/{i:06d}" for v in train for i in range(3)} | {
        f"val/{v}/{i:06d}" for v in val for i in range(4)
    }
    expected = {f"Data/VID/{n}.JPEG" for n in names} | {f"Annotations/VID/{n}.xml" for n in names}
    expected |= {f"Data/VID/snippets/val/{v}.mp4" for v in val}
    expected |= {"ImageSets/VID/train.txt", "ImageSets/VID/val.txt", "classes.json", "synthetic.json"}
    assert set(digest(root)) == expected

    assert (root / "ImageSets/VID/train.txt").read_text().splitlines() == [f"{v} 1" for v in train]
    lines = (root / "ImageSets/VID/val.txt").read_text().splitlines()
    assert lines == [f"{v}/{i:06d} {4 * n + i + 1}" for n, v in enumerate(val) for i in range(4)]
    assert load_classes(root / "classes.json") == SYNTHETIC_SHAPES
    facts = json.loads((root / "synthetic.json").read_text())
    assert facts["complete"] and set(facts["videos"]) == {f"train/{v}" for v in train} | {f"val/{v}" for v in val}

    xml = ElementTree.parse(root / f"Annotations/VID/val/{val[0]}/000000.xml").getroot()
    assert [e.tag for e in xml][:4] == ["folder", "filename", "source", "size"]
    assert [e.tag for e in xml.find("object") or []] == ["trackid", "name", "bndbox", "occluded", "generated"]
    assert [e.tag for e in xml.find("object/bndbox") or []] == ["xmax", "xmin", "ymax", "ymin"]
    image = cv2.imread(str(root / f"Data/VID/val/{val[0]}/000000.JPEG"))
    assert image is not None and image.shape == (96, 128, 3)
    with av.open(str(root / f"Data/VID/snippets/val/{val[0]}.mp4")) as clip:
        assert clip.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in clip.decode(video=0)) == 4


def test_tree_does_not_depend_on_workers_and_goes_on_after_an_interruption(
    make: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert make(["--output", str(one), "--workers", "1", *TINY]) == 0
    assert make(["--output", str(two), "--workers", "2", *TINY]) == 0
    whole = digest(one)
    assert whole == digest(two)

    assert make(["--output", str(one), "--workers", "1", *TINY]) == 0
    assert "nothing to do" in capsys.readouterr().out

    facts = json.loads((two / "synthetic.json").read_text())
    (two / "synthetic.json").write_text(json.dumps({**facts, "complete": False}))
    last = two / "Annotations/VID/val/ILSVRC2015_val_00000001"
    last.rename(last.with_name(last.name + ".part"))  # as if stopped before the last video was whole
    assert make(["--output", str(two), "--workers", "1", *TINY]) == 0
    assert digest(two) == whole


def test_foreign_folders_and_wrong_requests_are_refused_in_one_line(
    make: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, other = tmp_path / "foreign", tmp_path / "other"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    assert make(["--output", str(other), "--workers", "1", *TINY, "--train-videos", "0", "--val-videos", "1"]) == 0
    before = digest(other)
    capsys.readouterr()
    for arguments, message in (
        (["--output", str(foreign)], "not empty"),
        (["--output", str(foreign / "precious.txt")], "File exists"),
        (["--output", str(other), *TINY], "other options"),
        (["--output", str(tmp_path / "new"), "--width", "3"], "width must be"),
        (["--output", str(tmp_path / "new"), "--jpeg-quality", "0"], "jpeg_quality must be"),
    ):
        assert make([*arguments, "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert digest(other) == before and (foreign / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()
