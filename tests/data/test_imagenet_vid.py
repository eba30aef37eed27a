"""ILSVRC trees to COCO-video: the rendered truth comes out, and every fault is reported and stops nothing."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from running import script_main

from eventful_det.data.classes import IMAGENET_VID, SYNTHETIC_SHAPES, classes_json, load_classes
from eventful_det.data.coco_video import Problem, load_coco_video
from eventful_det.data.layouts.imagenet_vid import Entry, Folder, Source, convert, find_tree, list_folders
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.synthetic.tree import TreeOptions, make_tree
from eventful_det.errors import UserError

SCENE = SceneOptions(width=128, height=96)
OPTIONS = TreeOptions(SCENE, train_videos=2, val_videos=2, train_frames=6, val_frames=4)
VIDEO = "VID/val/ILSVRC2015_val_00000000"
TRAIN = "VID/train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000"
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def prepare() -> Main:
    return script_main("prepare_imagenet_vid.py")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cv2.setNumThreads(1)
    root = tmp_path_factory.mktemp("vid") / "tree"
    list(make_tree(root, OPTIONS))
    return root


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "ILSVRC2015"))


def report_of(tree: Path, name: str = "vid_val") -> dict[str, str]:
    """kind -> detail of the problems of a report, which must have one of a kind at most."""
    report = json.loads((tree / f"annotations/imagenet_{name}.report.json").read_text())
    kinds = {p["kind"]: p["detail"] for p in report["problems"]}
    assert report["problem_counts"] == dict.fromkeys(sorted(kinds), 1)
    return kinds


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def xml_text(size: tuple[int, int], *objects: tuple[str, tuple[float, ...]], track: bool = True) -> str:
    parts = "".join(
        f"<object>{'<trackid>4</trackid>' if track else ''}<name>{name}</name><bndbox><xmin>{b[0]}</xmin>"
        f"<ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    size_text = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{size_text}{parts}</annotation>"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_rendered_truth_comes_out(prepare: Main, tree: Path, workers: str) -> None:
    assert prepare([str(tree.parent), "--workers", workers, "--strict"]) == 0
    for split in ("train", "val"):
        data = load_coco_video(tree / f"annotations/imagenet_vid_{split}.json")
        assert data.image_root == tree
        assert [f.image_id for f in data.frames] == list(range(1, 2 * len(data.videos[0].frames) + 1))
        for index, video in enumerate(data.videos):
            truth = list(render_video(OPTIONS.of_split(split), OPTIONS.seed, index, split))
            assert len(truth) == len(video.frames)
            for t, (frame, rendered) in enumerate(zip(video.frames, truth, strict=True)):
                assert frame.frame_id == t and (frame.width, frame.height) == (128, 96) and frame.labelled
                found = [(a.track_id, a.category_id, a.box, a.occluded, a.generated) for a in frame.annotations]
                assert found == [(o.track_id, o.category, o.box, o.occluded, False) for o in rendered.objects]
                decoded = np.asarray(cv2.imread(str(data.image_path(frame))))[..., ::-1]
                assert np.abs(decoded.astype(int) - rendered.image).mean() < 4


def test_image_ids_are_the_official_frame_indices(prepare: Main, tree: Path) -> None:
    (tree / "Data" / VIDEO / "000001.JPEG").unlink()
    assert prepare([str(tree), "--sets", "vid_val", "--workers", "1"]) == 0
    lines = (tree / "ImageSets/VID/val.txt").read_text().split()
    official = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
    for frame in load_coco_video(tree / "annotations/imagenet_vid_val.json").frames:
        assert frame.image_id == official[frame.file_name.removeprefix("Data/VID/val/").removesuffix(".JPEG")]


def test_frames_per_video_are_the_middles_of_equal_parts(prepare: Main, tree: Path) -> None:
    assert prepare([str(tree), "--frames-per-video", "3", "--workers", "1"]) == 0
    train = load_coco_video(tree / "annotations/imagenet_vid_train.json")
    assert [[f.frame_id for f in v.frames] for v in train.videos] == [[1, 3, 5]] * 2
    val = load_coco_video(tree / "annotations/imagenet_vid_val.json")
    assert [len(v.frames) for v in val.videos] == [4, 4], "validation streams stay whole"
    for k in range(300):
        (tree / "Data" / TRAIN / f"{k:06d}.JPEG").touch()
    source = Source(tree, "VID", "train", IMAGENET_VID)
    stems = [entry.stem for entry in list_folders(source, 15)[0].entries]
    assert stems == [f"{k:06d}" for k in range(10, 300, 20)]


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing_image": (lambda image, xml: image.unlink(), "not in the tree"),
    "missing_xml": (lambda image, xml: xml.unlink(), "no annotation"),
    "malformed_xml": (lambda image, xml: edit(xml, "</annotation>", ""), "no element found"),
    "unreadable_image": (lambda image, xml: image.write_bytes(b"\xff\xd8 no picture"), "not a readable picture"),
    "size_mismatch": (lambda image, xml: edit(xml, "<width>128<", "<width>640<"), "says 640x96, the image is 128x96"),
    "unknown_class": (lambda image, xml: edit(xml, "<name>s0", "<name>x0"), "none of the 10"),
    "box_degenerate": (lambda image, xml: xml.write_text(xml_text((128, 96), ("s00000001", (9, 9, 9, 20)))), "box"),
    "box_outside": (lambda image, xml: xml.write_text(xml_text((128, 96), ("s00000001", (130, 9, 140, 20)))), "box"),
    "missing_track": (
        lambda image, xml: xml.write_text(xml_text((128, 96), ("s00000001", (1, 2, 30, 40)), track=False)),
        "no <trackid>",
    ),
    "duplicate_track": (
        lambda image, xml: xml.write_text(xml_text((128, 96), *[("s00000001", (1, 2, 30, 40))] * 2)),
        "track 4 is on this frame more than once",
    ),
    "box_clipped": (lambda image, xml: xml.write_text(xml_text((128, 96), ("s00000001", (120, -5, 140, 20)))), "box"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_reported_and_the_rest_kept(
    prepare: Main, tree: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, detail = FAULTS[kind]
    for split in (VIDEO, TRAIN):
        break_it(tree / "Data" / split / "000002.JPEG", tree / "Annotations" / split / "000002.xml")
    assert prepare([str(tree), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert kind in output and "000002" in output and "warning" in output
    assert prepare([str(tree), "--workers", "1", "--strict"]) == 1

    dropped = {"vid_val": kind in ("missing_image", "unreadable_image")}
    dropped["vid_train"] = dropped["vid_val"] or kind in ("missing_xml", "malformed_xml")
    for name, length in (("vid_val", 4), ("vid_train", 6)):
        assert detail in report_of(tree, name)[kind]
        data = load_coco_video(tree / f"annotations/imagenet_{name}.json")
        stems = [f.frame_id for f in data.videos[0].frames]
        assert stems == [t for t in range(length) if t != 2 or not dropped[name]]
        assert len(data.videos[1].frames) == length
        if not dropped[name]:
            frame = data.videos[0].frames[2]
            assert frame.labelled == (kind not in ("missing_xml", "malformed_xml"))
            if kind == "box_clipped":
                assert [(a.box, a.track_id) for a in frame.annotations] == [((120, 0, 128, 20), 4)]
            elif kind.endswith("track"):
                assert frame.annotations[-1].track_id is None and frame.annotations[0].box == (1, 2, 30, 40)
            elif kind.startswith("box"):
                assert not frame.annotations
            elif kind == "size_mismatch":
                assert frame.width == 128 and frame.annotations


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("<annotation/>", "lacks <size/width>"),
        (xml_text((128, 96), ("", (1, 1, 9, 9))), "lacks <name>"),
        (xml_text((128, 96), ("s00000001", ("left", 1, 9, 9))), "'left', expected a number"),  # type: ignore[arg-type]
        (xml_text((128, 96), ("s00000001", (1, float("inf"), 9, 9))), "'inf', expected a number"),
        ("", "no element found"),
        ("<annotation><size><width>1</width></size></annotation>", "lacks <size/height>"),
    ],
)
def test_annotations_that_make_no_sense_are_malformed(prepare: Main, tree: Path, content: str, detail: str) -> None:
    (tree / "Annotations" / VIDEO / "000002.xml").write_text(content)
    assert prepare([str(tree), "--sets", "vid_val", "--workers", "1"]) == 0
    assert detail in report_of(tree)["malformed_xml"]


def test_only_the_first_faults_are_printed(prepare: Main, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for xml in (tree / "Annotations/VID/val").rglob("*.xml"):
        edit(xml, "<name>s0", "<name>x0")
    assert prepare([str(tree), "--sets", "vid_val", "--show", "3", "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("unknown_class  ") == 3 and "8 faults" in output
    assert len(json.loads((tree / "annotations/imagenet_vid_val.report.json").read_text())["problems"]) == 8


def make_det(tree: Path) -> None:
    images = {
        "ILSVRC2013_train/n02084071/dog": xml_text((40, 30), ("n02084071", (1, 2, 20, 25)), track=False),
        "ILSVRC2014_train_0000/mixed": xml_text(
            (40, 30), ("n00007846", (0, 0, 9, 9)), ("n02391049", (5, 5, 30, 28)), track=False
        ),
        "ILSVRC2014_train_0000/person": xml_text((40, 30), ("n00007846", (0, 0, 9, 9)), track=False),
        "ILSVRC2014_train_0000/gone": xml_text((40, 30), ("n02084071", (1, 2, 20, 25)), track=False),
        "ILSVRC2013_train_extra0/negative": None,
    }
    for name, annotation in images.items():
        image, xml = tree / f"Data/DET/train/{name}.JPEG", tree / f"Annotations/DET/train/{name}.xml"
        for path in (image, xml):
            path.parent.mkdir(parents=True, exist_ok=True)
        if "gone" not in name:
            cv2.imwrite(str(image.with_suffix(".jpg")), np.zeros((30, 40, 3), np.uint8))
            image.with_suffix(".jpg").rename(image)
        if annotation:
            xml.write_text(annotation)


def test_det_keeps_the_categories_of_vid_only(prepare: Main, tmp_path: Path) -> None:
    tree = tmp_path / "ILSVRC2017"
    make_det(tree)
    assert prepare([str(tmp_path), "--workers", "1"]) == 0
    data = load_coco_video(tree / "annotations/imagenet_det_train.json")
    names = dict(data.categories)
    found = {f.file_name: [names[a.category_id] for a in f.annotations] for f in data.frames}
    assert found == {
        "Data/DET/train/ILSVRC2013_train/n02084071/dog.JPEG": ["dog"],
        "Data/DET/train/ILSVRC2014_train_0000/mixed.JPEG": ["zebra"],
    }
    assert all(len(v.frames) == 1 for v in data.videos)
    assert set(report_of(tree, "det_train")) == {"missing_image"}


def test_det_may_be_thinned(prepare: Main, tmp_path: Path) -> None:
    tree = tmp_path / "ILSVRC2017"
    make_det(tree)
    dog = tree / "Data/DET/train/ILSVRC2013_train/n02084071/dog.JPEG"
    for i in range(5):
        shutil.copy(dog, dog.with_name(f"dog{i}.JPEG"))
        xml = tree / f"Annotations/DET/train/ILSVRC2013_train/n02084071/dog{i}.xml"
        xml.write_text(xml_text((40, 30), ("n02084071", (1, 2, 20, 25)), track=False))
    assert prepare([str(tmp_path), "--workers", "1", "--det-per-class", "2"]) == 0
    data = load_coco_video(tree / "annotations/imagenet_det_train.json")
    names = [frame.file_name.split("/")[-1] for frame in data.frames]
    assert names == ["dog0.JPEG", "dog3.JPEG", "mixed.JPEG"]


def test_a_tree_that_lacks_videos_is_told(prepare: Main, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "mine.json").write_text(classes_json(IMAGENET_VID))
    prepare([str(tree), "--sets", "vid_val", "--workers", "1", "--classes", str(tree / "mine.json")])
    assert "the tree holds 2 of 555 videos and 8 of 176,126 frames" in " ".join(capsys.readouterr().out.split())
    prepare([str(tree), "--sets", "vid_val", "--workers", "1"])
    assert "the tree holds" not in capsys.readouterr().out, "a set with classes of its own has a size of its own"


def test_again_gives_the_same_bytes(prepare: Main, tree: Path) -> None:
    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tree / "annotations").iterdir()}

    assert prepare([str(tree), "--workers", "1"]) == 0
    before = written()
    assert prepare([str(tree), "--workers", "1"]) == 0
    assert written() == before and len(before) == 4


def test_an_interrupt_leaves_what_was_there(prepare: Main, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare([str(tree), "--sets", "vid_val", "--workers", "1"]) == 0
    before = (tree / "annotations/imagenet_vid_val.json").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eventful_det.data.coco_video.records.os.replace", interrupted)
    assert prepare([str(tree), "--workers", "1"]) == 130
    files = {path.name for path in (tree / "annotations").iterdir()}
    assert files == {"imagenet_vid_val.json", "imagenet_vid_val.report.json"}
    assert (tree / "annotations/imagenet_vid_val.json").read_bytes() == before


def test_output_may_lie_elsewhere_and_the_tree_is_left_alone(prepare: Main, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "else/where"
    assert prepare([str(tree), "--output", str(output), "--workers", "1"]) == 0
    data = load_coco_video(output / "imagenet_vid_val.json")
    assert data.image_path(next(data.frames)).is_file()
    assert not (tree / "annotations").exists()


def test_classes_can_be_given(prepare: Main, tree: Path, tmp_path: Path) -> None:
    table = load_classes(tree / "classes.json")
    (tree / "classes.json").unlink()
    assert prepare([str(tree), "--sets", "vid_val", "--workers", "1"]) == 1, "none of these is in ImageNet VID"
    (tmp_path / "mine.json").write_text(classes_json(table))
    assert prepare([str(tree), "--workers", "1", "--classes", str(tmp_path / "mine.json")]) == 0


@pytest.mark.parametrize(
    "content", ["[", "{}", "[]", '[{"id": 1}]', '[{"id": 2, "wnid": "a", "name": "b"}]', "[1]", "null"]
)
def test_wrong_class_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=r"expected a JSON list"):
        load_classes(tmp_path / "c.json")


def test_imagenet_vid_table() -> None:
    assert len(IMAGENET_VID) == 30
    assert (IMAGENET_VID[0].name, IMAGENET_VID[29].wnid) == ("airplane", "n02391049")
    assert sorted(c.name for c in IMAGENET_VID) == [c.name for c in IMAGENET_VID]
    assert all(len(c.wnid) == 9 and c.wnid[0] == "n" for c in IMAGENET_VID)


def test_user_errors_are_one_line_and_leave_nothing_behind(
    prepare: Main, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, status, message in (
        ([str(tmp_path / "empty")], 2, "no ILSVRC tree"),
        ([str(tmp_path / "absent")], 2, "no ILSVRC tree"),
        ([str(tree), "--sets", "det_train"], 2, "lacks Data/DET/train"),
        ([str(tree), "--classes", str(tmp_path / "none.json")], 2, "cannot read the categories"),
    ):
        assert prepare([*arguments, "--workers", "1"]) == status
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tree / "annotations").exists()
    shutil.rmtree(tree / "Annotations")
    assert prepare([str(tree), "--workers", "1"]) == 2
    assert "no annotations in" in capsys.readouterr().err


def test_unknown_encodings_and_claims_of_huge_pictures(tree: Path) -> None:
    edit(
        tree / "Annotations" / VIDEO / "000001.xml", "<annotation>", '<?xml version="1.0" encoding="nope"?><annotation>'
    )
    edit(tree / "Annotations" / VIDEO / "000003.xml", "<width>128<", "<width>1e300<")
    png = bytearray(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tree / "Data" / VIDEO / "000002.JPEG").write_bytes(png)
    data, problems = convert(source := Source(tree, "VID", "val", SYNTHETIC_SHAPES), list_folders(source))
    assert [(problem.kind, Path(problem.file).stem) for problem in problems] == [
        ("malformed_xml", "000001"),
        ("unreadable_image", "000002"),
        ("malformed_xml", "000003"),
    ]
    assert "claims more than" in problems[1].detail
    assert [frame.labelled for frame in data.videos[0].frames] == [True, False, False]


def test_brackets_in_a_path_are_no_markup(prepare: Main, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree.with_name("[").mkdir()
    renamed = tree.rename(tree.with_name("[") / "x]")
    (renamed / "Data" / VIDEO / "000002.JPEG").unlink()
    assert prepare([str(renamed), "--sets", "vid_val", "--workers", "1"]) == 0
    assert str(renamed / "annotations") in capsys.readouterr().out


def test_trees_with_links_pipes_and_frames_twice(tree: Path, tmp_path: Path) -> None:
    """Every regular file once, whatever leads to it; what is left out is reported."""
    images, labels = tree / "Data/VID/val", tree / "Annotations/VID/val"
    whole, problems = convert(source := Source(tree, "VID", "val", SYNTHETIC_SHAPES), list_folders(source))
    assert not problems
    (first, *_), (last, *_) = sorted(images.iterdir()), sorted(images.iterdir(), reverse=True)
    (images / "0_link").symlink_to(last)  # sorted before what it leads to
    for circle in (images / "self", labels / "self", first / "a", first / "b"):
        circle.symlink_to("..")
    os.mkfifo(first / "000009.JPEG")
    (first / "000010.JPEG").symlink_to("nowhere")
    for folder, suffixes in ((first, (".JPEG", ".jpg")), (labels / first.name, (".xml",))):
        for suffix in suffixes:
            shutil.copy(folder / f"000001.{'xml' if suffix == '.xml' else 'JPEG'}", folder / f"1{suffix}")
    data, problems = convert(source, list_folders(source))
    assert data == whole
    counts = Counter(problem.kind for problem in problems)
    assert counts == {"linked_folder": 5, "irregular_file": 2, "duplicate_frame": 3}
    assert Problem("duplicate_frame", f"Data/VID/val/{first.name}/1.jpg", "the same frame as 000001.JPEG") in problems


def test_names_that_are_no_numbers(tree: Path, tmp_path: Path) -> None:
    """Frames are then counted; files with names of any bytes are read, reported and saved."""
    for top, suffix in (("Data", "JPEG"), ("Annotations", "xml")):
        folder = tree / top / VIDEO
        (folder / f"000003.{suffix}").rename(folder / f"\u00b2.{suffix}")
        (folder / f"000002.{suffix}").rename(folder / os.fsdecode(b"\xff." + suffix.encode()))
    source = Source(tree, "VID", "val", SYNTHETIC_SHAPES)
    data, problems = convert(source, list_folders(source))
    assert not problems and [frame.frame_id for frame in data.videos[0].frames] == [0, 1, 2, 3]
    data.save(tmp_path / "x.json")
    assert all(data.image_path(frame).is_file() for frame in load_coco_video(tmp_path / "x.json").frames)


def test_two_trees_are_ambiguous(tmp_path: Path) -> None:
    for name in ("ILSVRC2015", "ILSVRC2017"):
        (tmp_path / name / "Data").mkdir(parents=True)
    with pytest.raises(UserError, match="more than one"):
        find_tree(tmp_path)


def test_folders_join_images_and_annotations(tree: Path) -> None:
    (tree / "Data" / VIDEO / "000000.JPEG").unlink()
    (tree / "Annotations" / VIDEO / "000003.xml").unlink()
    first = list_folders(Source(tree, "VID", "val", IMAGENET_VID))[0]
    assert first == Folder(
        "ILSVRC2015_val_00000000",
        [
            Entry("000000", None, "000000.xml"),
            Entry("000001", "000001.JPEG", "000001.xml"),
            Entry("000002", "000002.JPEG", "000002.xml"),
            Entry("000003", "000003.JPEG", None),
        ],
    )
