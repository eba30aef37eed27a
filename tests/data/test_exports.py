"""Detections in the files of other programs: our own readers find in them what was detected."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.layouts.exports import EXPORTS, VideoInfo, export_detections
from eventful_det.data.layouts.video_labels import import_annotations

WIDTH, HEIGHT = 64, 48
INFO = VideoInfo("videos/my yard.mp4", ("cat", 'a "b" & <c>', "dog"), 25.0, show=0.3)

boxes = st.tuples(
    st.floats(0, 30), st.floats(0, 20), st.floats(1, 30), st.floats(1, 20)
)  # left, top, width, height: inside the frame
found = st.builds(
    lambda box, score, label, track: {
        "box": [round(v, 2) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3])],
        "score": round(score, 4),
        "label": label,
        "name": INFO.classes[label],
        **({} if track is None else {"track_id": track}),
    },
    boxes,
    st.floats(0.01, 1),
    st.integers(0, 2),
    st.none() | st.integers(0, 4),
)
frames = st.lists(st.lists(found, max_size=4, unique_by=lambda f: f.get("track_id", object())), min_size=1, max_size=6)


def export(folder: Path, videos: list[list[dict[str, Any]]], kind: str) -> Path:
    size = {"height": HEIGHT, "width": WIDTH}
    lines = [{"frame_index": n, "size": size, "detections": found} for n, found in enumerate(videos)]
    (folder / "detections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = folder / EXPORTS[kind][0]
    export_detections(folder / "detections.jsonl", kind, target, INFO)
    return target


def pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        cv2.imwrite(str(folder / f"{name}.png"), np.zeros((HEIGHT, WIDTH), np.uint8))
    return folder


Objects = list[list[tuple[Any, ...]]]  # class, track and box of all objects, frame by frame


def contents(data: CocoVideo) -> Objects:
    names = dict(data.categories)
    (video,) = data.videos
    return [[(names[a.category_id], a.track_id, *a.box) for a in frame.annotations] for frame in video.frames]


def expected(videos: list[list[dict[str, Any]]], show: float = 0.0) -> Objects:
    return [[(f["name"], f.get("track_id"), *f["box"]) for f in found if f["score"] >= show] for found in videos]


def assert_same(read: Objects, wanted: Objects, tolerance: float) -> None:
    """Tracks that nothing was followed with are those that a format made up."""
    tracks = {o[1] for frame in wanted for o in frame}
    for ours, theirs in zip(read, wanted, strict=True):
        assert len(ours) == len(theirs)
        left = list(theirs)
        for one in ours:
            track = one[1] if one[1] in tracks else None
            same = [o for o in left if o[:2] == (one[0], track) and np.allclose(o[2:], one[2:], atol=tolerance)]
            assert same, (one, left)
            left.remove(same[0])


@settings(max_examples=15, deadline=None)
@given(frames, st.sampled_from(["mot", "cvat", "yolo"]))
def test_readers_find_what_was_detected(videos: list[list[dict[str, Any]]], kind: str) -> None:
    show = INFO.show if kind == "cvat" else 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = export(folder, videos, kind)
        names = [f"{INFO.name}_{n}" for n in range(1, len(videos) + 1)]
        data, problems = import_annotations(target, media=pictures(folder / "img1", names))
        assert {problem.kind for problem in problems} <= {"box_clipped"}  # shares of a frame are rounded
        assert data.categories == list(enumerate(INFO.classes, start=1))
        assert_same(contents(data), expected(videos, show), 0.011)


@pytest.mark.parametrize("kind", ["mot", "cvat", "yolo"])
def test_a_video_without_an_object_was_searched(tmp_path: Path, kind: str) -> None:
    export(tmp_path, [[], []], kind)
    media = pictures(tmp_path / "img1", [f"{INFO.name}_1", f"{INFO.name}_2"])
    data, problems = import_annotations(tmp_path / EXPORTS[kind][0], media=media)
    assert not problems and contents(data) == [[], []] and all(frame.labelled for frame in data.frames)
    data.save(tmp_path / "data.json")
    assert load_coco_video(tmp_path / "data.json").categories == list(enumerate(INFO.classes, start=1))


@settings(max_examples=15, deadline=None)
@given(frames)
def test_label_studio_holds_runs_of_frames(videos: list[list[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        (task,) = json.loads(export(Path(name), videos, "label_studio").read_text())
    assert task["data"] == {"video": INFO.source}
    read: list[list[tuple[Any, ...]]] = [[] for _ in videos]
    regions = task["predictions"][0]["result"]
    assert len({region["id"] for region in regions}) == len(regions)
    for region in regions:
        value = region["value"]
        assert region["type"] == "videorectangle" and value["framesCount"] == len(videos)
        numbers = [box["frame"] for box in value["sequence"]]
        # An object is in sight from a box to the next, unless the box is the last of a run of frames.
        assert [box["enabled"] for box in value["sequence"]] == [n + 1 in numbers for n in numbers]
        for box in value["sequence"]:
            x, y, w, h = (box[key] / 100 for key in ("x", "y", "width", "height"))
            corners = (x * WIDTH, y * HEIGHT, (x + w) * WIDTH, (y + h) * HEIGHT)
            track = int(region["id"].removeprefix("track").partition("_")[0])
            read[box["frame"] - 1].append((value["labels"][0], track, *corners))
    assert_same(read, expected(videos, INFO.show), 0.01)


@settings(max_examples=15, deadline=None)
@given(frames)
def test_coco_results(videos: list[list[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        entries = json.loads(export(Path(name), videos, "coco").read_text())
    wanted = [(n, f) for n, found in enumerate(videos, start=1) for f in found]
    assert len(entries) == len(wanted)
    for entry, (image, f) in zip(entries, wanted, strict=True):
        x, y, w, h = entry["bbox"]
        assert (entry["image_id"], entry["category_id"], entry["score"]) == (image, f["label"] + 1, f["score"])
        assert entry.get("track_id") == f.get("track_id") and [x, y, x + w, y + h] == pytest.approx(f["box"])


def test_cvat_says_when_an_object_is_gone(tmp_path: Path) -> None:
    one = {"box": [1, 2, 11, 12], "score": 0.9, "label": 0, "name": "cat", "track_id": 5}
    unsure = {**one, "score": 0.2, "track_id": 6}
    root = ElementTree.parse(export(tmp_path, [[one], [one, unsure], [], [one]], "cvat")).getroot()
    assert root.findtext("version") == "1.1" and root.findtext("meta/task/size") == "4"
    (track,) = root.iterfind("track")
    shapes = [(box.get("frame"), box.get("outside")) for box in track]
    assert shapes == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "0")]


def test_mot_is_a_sequence_of_the_challenge(tmp_path: Path) -> None:
    one = {"box": [0, 0, 10, 20], "score": 0.9, "label": 2, "name": "dog"}
    folder = export(tmp_path, [[], [{**one, "track_id": 5}, one]], "mot")
    rows = (folder / "gt" / "gt.txt").read_text().splitlines()
    assert rows == ["2,5,1.00,1.00,10.00,20.00,0.9,3,1", "2,-1,1.00,1.00,10.00,20.00,0.9,3,1"]
    assert "seqLength=2" in (folder / "seqinfo.ini").read_text().splitlines()


@pytest.mark.parametrize("kind", ["mot", "cvat", "yolo"])
def test_names_of_classes_are_a_line_each(tmp_path: Path, kind: str) -> None:
    """Else whatever comes after them is read as another class, or not at all."""
    info = VideoInfo("a.mp4", ("two\nlines", "\x01\ud800", "dog"), 25.0)
    line = {"frame_index": 0, "size": {"height": HEIGHT, "width": WIDTH}}
    found = [{"box": [0, 0, 10, 20], "score": 0.9, "label": label} for label in range(3)]
    (tmp_path / "lines").write_text(json.dumps({**line, "detections": found}))
    target = tmp_path / EXPORTS[kind][0]
    export_detections(tmp_path / "lines", kind, target, info)
    labels = {"mot": target / "gt" / "gt.txt", "cvat": target, "yolo": target / "labels"}[kind]
    data, _ = import_annotations(labels, media=pictures(tmp_path / "img1", ["a_1"]))
    assert [name for frame in contents(data) for name, *_ in frame] == ["two lines", "\ufffd\ufffd", "dog"]


def test_a_full_disk_is_an_error_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: str) -> sqlite3.Connection:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(OSError, match="disk is full, for temporary files"):
        export(tmp_path, [[]], "cvat")


def test_long_videos_need_no_memory(tmp_path: Path) -> None:
    """What a format holds in memory does not grow with the video."""
    import tracemalloc

    def peak(count: int, kind: str) -> int:
        folder = tmp_path / f"{kind}{count}"
        folder.mkdir()
        one = {"box": [1, 2, 11, 12], "score": 0.9, "label": 0, "name": "cat"}
        videos = [[{**one, "track_id": n // 50}] for n in range(count)]
        export(folder, videos, "coco")
        for path in folder.glob("*.coco.json"):
            path.unlink()
        tracemalloc.start()
        export_detections(folder / "detections.jsonl", kind, folder / "out", INFO)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    for kind in EXPORTS:
        peak(100, kind)  # imports
        assert peak(2000, kind) < peak(200, kind) + 100_000, kind
