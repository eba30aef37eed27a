"""Labels of a video in the files of other programs: all say the same, and what cannot be used is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from running import run
from videos import encode

from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.layouts.video_labels import import_annotations
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.errors import UserError

WIDTH, HEIGHT, FRAMES = 160, 96, 12
CLASSES = ["cat", "dog"]
OBJECTS = [(n, "dog", 7, (10 + n, 20, 50 + n, 60)) for n in range(FRAMES)]  # frame, class, track, box
OBJECTS += [(n, "cat", 3, (100, 30, 130, 90)) for n in range(3, 9)]
LAYOUTS = ("yolo", "voc", "mot", "cvat_xml")


def numbered(n: int, layout: str) -> str:
    return f"yard_{n + 1}" if layout == "yolo" else f"{n:06d}"


def write_labels(folder: Path, layout: str) -> Path:
    """The objects in the files of a layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "mot":
        rows = [
            f"{n + 1},{track},{x1 + 1},{y1 + 1},{x2 - x1},{y2 - y1},1,{CLASSES.index(name) + 1},1.0"
            for n, name, track, (x1, y1, x2, y2) in OBJECTS
        ]
        (folder / "labels.txt").write_text("\n".join(CLASSES))
        (folder / "gt.txt").write_text("\n".join(rows))
        return folder / "gt.txt"
    if layout == "cvat_xml":
        tracks = ""
        for wanted, number in (("dog", 7), ("cat", 3)):
            boxes = "".join(
                f'<box frame="{n}" outside="0" occluded="{int(n == 4)}" keyframe="{int(n % 3 == 0)}" '
                f'xtl="{b[0]}" ytl="{b[1]}" xbr="{b[2]}" ybr="{b[3]}"/>'
                for n, name, _, b in OBJECTS
                if name == wanted
            )
            gone = '<box frame="11" outside="1" occluded="0" keyframe="1" xtl="0" ytl="0" xbr="9" ybr="9"/>'
            tracks += f'<track id="{number}" label="{wanted}">{boxes}{gone}</track>'
        names = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
        meta = f"<meta><task><size>{FRAMES}</size><labels>{names}</labels></task></meta>"
        (folder / "annotations.xml").write_text(f"<annotations>{meta}{tracks}</annotations>")
        return folder / "annotations.xml"
    for n in range(FRAMES):
        objects = [(name, track, box) for frame, name, track, box in OBJECTS if frame == n]
        if layout == "yolo":
            lines = [
                f"{CLASSES.index(name)} {(b[0] + b[2]) / 2 / WIDTH} {(b[1] + b[3]) / 2 / HEIGHT} "
                f"{(b[2] - b[0]) / WIDTH} {(b[3] - b[1]) / HEIGHT} {track}"
                for name, track, b in objects
            ]
            (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
            (folder / f"{numbered(n, layout)}.txt").write_text("\n".join(lines))
        else:
            parts = "".join(
                f"<object><name>{name}</name><trackid>{track}</trackid><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
                f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
                for name, track, b in objects
            )
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
            (folder / f"{numbered(n, layout)}.xml").write_text(f"<annotation>{size}{parts}</annotation>")
    return folder


def write_frames(folder: Path, layout: str, as_video: bool) -> Path:
    options = SceneOptions(width=WIDTH, height=HEIGHT, frames=FRAMES, cut_fraction=0)
    images = [frame.image for frame in render_video(options, seed=1)]
    folder.mkdir(parents=True, exist_ok=True)
    if as_video:
        return encode(folder / "yard.mp4", images)
    for n, image in enumerate(images):
        name = f"{n + 1:06d}" if layout == "mot" else numbered(n, layout)
        cv2.imwrite(str(folder / f"{name}.jpg"), image)
    return folder


def content(data: CocoVideo) -> list[tuple[int, str, int | None, tuple[int, ...]]]:
    """The objects of the only video, as in OBJECTS; its frames from 0."""
    (video,) = data.videos
    names, first = dict(data.categories), video.frames[0].frame_id
    return [
        (frame.frame_id - first, names[a.category_id], a.track_id, tuple(round(v, 6) for v in a.box))
        for frame in video.frames
        for a in frame.annotations
    ]


@pytest.mark.parametrize("as_video", [True, False], ids=["video", "pictures"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(tmp_path: Path, layout: str, as_video: bool) -> None:
    write_frames(tmp_path / ("" if as_video else "images"), layout, as_video)
    path = write_labels(tmp_path / "labels", layout)
    data, problems = import_annotations(path)
    assert not problems and sorted(content(data)) == sorted(OBJECTS)
    assert data.categories == [(1, "cat"), (2, "dog")]
    frames = data.videos[0].frames
    assert len(frames) == FRAMES and all(f.labelled and (f.width, f.height) == (WIDTH, HEIGHT) for f in frames)
    data.save(tmp_path / "out/x.json")
    again = load_coco_video(tmp_path / "out/x.json")
    assert sorted(content(again)) == sorted(OBJECTS)
    assert as_video == bool(again.videos[0].file_name)
    if not as_video:
        assert all(again.image_path(frame).is_file() for frame in again.frames)


def test_frames_from_0_or_1(tmp_path: Path) -> None:
    """Names with zeros in front count from 0, unless there is one more frame; others count from 1."""
    video = write_frames(tmp_path / "v", "yolo", True)
    (tmp_path / "classes.txt").write_text("dog")
    for numbers, form, first in (
        (range(12), "{:06d}", 0),
        (range(1, 13), "a_{:06d}", 1),
        (range(3, 9), "{:06d}", 0),
        (range(3, 9), "a{}", 1),
    ):
        folder = tmp_path / f"labels{form}{len(numbers)}"
        folder.mkdir()
        for n in numbers:
            (folder / f"{form.format(n)}.txt").write_text("0 0.5 0.5 0.1 0.1")
        data, problems = import_annotations(folder, media=video)
        labelled = [frame.frame_id for frame in data.frames if frame.annotations]
        assert labelled == [n - first for n in numbers] and not problems, form
        assert all(frame.labelled for frame in data.frames)


def test_lines_and_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    video = write_frames(tmp_path, "yolo", True)
    yolo = write_labels(tmp_path / "yolo", "yolo")
    (yolo / "yard_1.txt").write_text(
        "0 0.5 0.5\n9 0.5 0.5 0.1 0.1\n0 a b c d\n0 .5 .5 0 .1\n1 .1 .1 .3 .1 .3 .4 .1 .4\n"
    )
    (yolo / "yard_77.txt").write_text("0 0.5 0.5 0.1 0.1")
    data, problems = import_annotations(yolo, media=video)
    assert [p.kind for p in problems] == [*["malformed_line"] * 3, "missing_image", "box_degenerate"]
    (polygon,) = next(data.frames).annotations
    assert polygon.box == pytest.approx((16, 9.6, 48, 38.4))

    voc = write_labels(tmp_path / "voc", "voc")
    (voc / "000002.xml").write_text("<annotation>")
    (voc / "000004.xml").unlink()
    os.mkfifo(voc / "000099.xml")
    data, problems = import_annotations(voc, media=video)
    assert [p.kind for p in problems] == ["malformed_xml"]
    assert [frame.frame_id for frame in data.frames if not frame.labelled] == [2, 4]

    mot = write_labels(tmp_path / "mot", "mot")
    mot.write_text("1,-1,5,5,9,9,0,1,1\n2 1 5 5 9 9\nx\n3,1,5,5,9,inf,1,1,1\n-1,1,5,5,9,9,1,1,1\n")
    data, problems = import_annotations(mot)
    assert [p.kind for p in problems] == ["malformed_line", "malformed_line", "box_clipped"]
    first, second = next(data.frames).annotations[0], list(data.frames)[1].annotations[0]
    assert first.iscrowd and first.track_id is None and second.track_id == 1 and second.box == (4, 4, 13, 13)


def test_two_pictures_for_one_frame(tmp_path: Path) -> None:
    for stem in ("1", "000001", "2"):
        cv2.imwrite(str(tmp_path / f"{stem}.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "classes.txt").write_text("cat")
    (tmp_path / "labels" / "1.txt").write_text("0 .5 .5 .5 .5")
    data, problems = import_annotations(tmp_path / "labels", media=tmp_path)
    assert [p.kind for p in problems] == ["duplicate_frame"]
    data.save(tmp_path / "data.json")
    assert [frame.frame_id for frame in load_coco_video(tmp_path / "data.json").frames] == [1, 2]


def test_parts_of_a_video_in_cvat(tmp_path: Path) -> None:
    """A task may begin late and take every third frame; what lies between was not searched."""
    video = write_frames(tmp_path, "cvat_xml", True)
    path = write_labels(tmp_path / "labels", "cvat_xml")
    task = "<size>4</size><start_frame>2</start_frame><frame_filter>step=3</frame_filter>"
    path.write_text(path.read_text().replace("<size>12</size>", task))
    data, _ = import_annotations(path, media=video)
    assert [frame.frame_id for frame in data.frames if frame.labelled] == [2, 5, 8, 11]
    assert [len(frame.annotations) for frame in data.frames] == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 2]

    path.write_text(path.read_text().replace("<size>4<", f"<size>{10**18}<"))  # a claim costs nothing
    data, _ = import_annotations(path, media=video)
    assert [frame.frame_id for frame in data.frames if frame.labelled] == [2, 5, 8, 11]


@pytest.mark.parametrize("layout", ["images", "stills"])
def test_images_of_cvat(tmp_path: Path, layout: str) -> None:
    folder = write_frames(tmp_path / "images", "voc", False)
    names = [f"{n:06d}" for n in range(FRAMES)]
    if layout == "stills":
        names = [chr(97 + n) * 3 for n in range(FRAMES)]
        for n, name in enumerate(names):
            (folder / f"{n:06d}.jpg").rename(folder / f"{name}.jpg")
    shapes = '<polygon label="dog" points="1,2;9,2;5,30" occluded="0"/>'
    images = "".join(f'<image id="{n}" name="{name}.jpg">{shapes}</image>' for n, name in enumerate(names))
    (tmp_path / "annotations.xml").write_text(f"<annotations>{images}</annotations>")
    data, problems = import_annotations(tmp_path / "annotations.xml")
    assert not problems and len(data.videos) == (1 if layout == "images" else FRAMES)
    assert all(frame.annotations[0].box == (1, 2, 9, 30) for frame in data.frames)


def test_what_cannot_be_imported_is_said_in_one_line(tmp_path: Path) -> None:
    yolo = write_labels(tmp_path / "a/labels", "yolo")
    for change, message in (
        (lambda: None, "no pictures and no video beside the labels"),
        (lambda: [(tmp_path / f"a/{name}.mp4").touch() for name in ("b", "c")], "which video is it of"),
        (lambda: (yolo / "street_1.txt").touch(), "several videos"),
        (lambda: (yolo / "classes.txt").write_text("dog\ndog"), "each name once"),
        (lambda: (yolo / "classes.txt").unlink(), "name the classes with --classes"),
    ):
        change()  # type: ignore[no-untyped-call]
        media = write_frames(tmp_path / "v", "yolo", True) if message == "several videos" else None
        with pytest.raises(UserError, match=message):
            import_annotations(yolo, media=media)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xml").write_text("<html/>")
    (tmp_path / "empty.txt").touch()
    for name, message in (
        ("empty", "holds neither .xml"),
        ("x.xml", "no XML file of CVAT"),
        ("gone.txt", "cannot read"),
        ("empty.txt", "holds no labels of the layout mot"),
    ):
        with pytest.raises(UserError, match=message):
            import_annotations(tmp_path / name)


def test_the_script(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "v", "yolo", True)
    yolo = write_labels(tmp_path / "labels", "yolo")
    command = [
        "datasets/import_annotations.py",
        str(yolo),
        "--images",
        str(video),
        "--output",
        str(tmp_path / "x.json"),
    ]
    assert run(*command).returncode == 0
    assert len(json.loads((tmp_path / "x.json").read_text())["annotations"]) == len(OBJECTS)
