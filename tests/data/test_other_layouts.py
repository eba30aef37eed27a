"""COCO files of other programs become COCO-video, on small trees in their layouts and on real boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import run

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import CocoVideo, load_coco_video
from eventful_det.data.layouts.other_layouts import import_coco as import_annotations
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import evaluate
from eventful_det.evaluation.ilsvrc.motion import motion_iou

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "vid" / "vid_val10000_coco.json"
CATEGORIES = [{"id": c.id, "name": c.name, "encode_name": c.wnid} for c in IMAGENET_VID]


def image(i: int, file_name: str, **more: Any) -> dict[str, Any]:
    return {"id": i, "file_name": file_name, "width": 64, "height": 48, **more}


def box(i: int, image_id: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": i, "image_id": image_id, "category_id": category, "bbox": bbox, "area": 1, "iscrowd": False, **more}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def tracks(data: CocoVideo) -> list[list[tuple[int, list[tuple[int, int | None]]]]]:
    """Per video and frame: frame_id, and (category, track) of its boxes."""
    return [[(f.frame_id, [(a.category_id, a.track_id) for a in f.annotations]) for f in v.frames] for v in data.videos]


def mmtracking(tmp_path: Path) -> Path:
    names = [f"val/ILSVRC2015_val_00000000/00000{i}.JPEG" for i in range(3)]
    touch(tmp_path / "ILSVRC/Data/VID", *names)
    flags = {"occluded": False, "generated": True}
    return write(
        tmp_path / "ILSVRC/annotations/imagenet_vid_val.json",
        {
            "categories": CATEGORIES,
            "videos": [{"id": 1, "name": "val/ILSVRC2015_val_00000000", "vid_train_frames": [1]}],
            "images": [
                image(i + 1, name, frame_id=i, video_id=1, is_vid_train_frame=i == 1) for i, name in enumerate(names)
            ],
            "annotations": [
                box(1, 1, 9, [1, 2, 20, 20], video_id=1, instance_id=41, **flags),
                box(2, 2, 9, [1, 2, 20, 20], video_id=1, instance_id=41, **flags),
                box(3, 2, 30, [50, 2, 20, 20], video_id=1, instance_id=42, **flags),
                box(4, 3, 9, [1, 2, 0, 20], video_id=1, instance_id=41, **flags),
            ],
        },
    )


def test_mmtracking(tmp_path: Path) -> None:
    data, problems = import_annotations(mmtracking(tmp_path))
    assert data.image_root == (tmp_path / "ILSVRC/Data/VID").resolve()
    assert data.categories == [(c.id, c.name) for c in IMAGENET_VID]
    assert tracks(data) == [[(0, [(9, 41)]), (1, [(9, 41), (30, 42)]), (2, [])]]
    first, last = data.videos[0].frames[0].annotations[0], data.videos[0].frames[1].annotations[1]
    assert (first.box, first.occluded, first.generated) == ((1, 2, 21, 22), False, True)
    assert last.box == (50, 2, 64, 22) and last.area == 14 * 20
    assert sorted((p.kind, p.file[-11:]) for p in problems) == [
        ("box_clipped", "000001.JPEG"),
        ("box_degenerate", "000002.JPEG"),
    ]
    assert motion_iou(data.videos[0]), "track ids are of use"


def test_key_frames_of_mmtracking(tmp_path: Path) -> None:
    path = mmtracking(tmp_path)
    assert tracks(import_annotations(path, key_frames=True)[0]) == [[(1, [(9, 41), (30, 42)])]]
    content = json.loads(path.read_text())
    for entry in content["images"]:
        entry["is_vid_train_frame"] = False
    with pytest.raises(UserError, match="there are no key frames"):
        import_annotations(write(path, content), key_frames=True)


def test_images_of_no_video_become_stills_and_other_classes_go(tmp_path: Path) -> None:
    """DET as mmtracking writes it, and as in the joint files of TransVOD, whose images have the video -1."""
    names = ["train/ILSVRC2013_train/n02084071/a.JPEG", "train/ILSVRC2014_train_0000/b.JPEG"]
    touch(tmp_path / "ILSVRC/Data/DET", *names)
    path = write(
        tmp_path / "ILSVRC/annotations/imagenet_det_30plus1cls.json",
        {
            "categories": [*CATEGORIES, {"id": 31, "name": "other_categeries", "encode_name": None}],
            "images": [
                image(1, names[0], is_vid_train_frame=True),
                image(2, names[1], is_vid_train_frame=True, video_id=-1, frame_id=-1),
            ],
            "annotations": [
                box(1, 1, 9, [1, 2, 20, 20]),
                box(2, 1, 31, [1, 2, 20, 20]),
                box(3, 2, 30, [1, 2, 20, 20], instance_id=-1, occluded=-1, generated=-1),
            ],
        },
    )
    data, problems = import_annotations(path)
    assert not problems and tracks(data) == [[(0, [(9, None)])], [(0, [(30, None)])]]
    assert len(data.categories) == 30 and not any(a.occluded for f in data.frames for a in f.annotations)


EVENTFUL = ["ILSVRC2015_val_00000007_000003", "ILSVRC2015_val_00000007_000004", "ILSVRC2015_val_00000007_000009"]
EVENTFUL += ["ILSVRC2015_val_00000002_000000"]


def eventful() -> dict[str, Any]:
    images = [image(i + 1, f"{name}.JPEG") for i, name in enumerate(EVENTFUL)]
    boxes = [box(1, 1, 9, [1, 2, 20, 20]), box(2, 3, 30, [1, 2, 20, 20]), box(3, 77, 1, [1, 2, 20, 20])]
    return {"images": images, "annotations": boxes}


@pytest.mark.parametrize("place", ["tar", "unpacked", "elsewhere"])
def test_official_archive(tmp_path: Path, place: str) -> None:
    """As packed, as the official code unpacks it, and with the images anywhere; gaps make videos of their own."""
    unpacked = [f"{name.split('_')[2]}/{name.split('_')[3]}.jpg" for name in EVENTFUL]
    packed = [f"{name}.JPEG" for name in EVENTFUL]
    where, names, folder = {
        "tar": ("annotations/vid_minival.json", packed, "vid_val"),
        "unpacked": ("vid_val/labels.json", unpacked, "vid_val/frames"),
        "elsewhere": ("labels.json", packed, "my/frames"),
    }[place]
    touch(tmp_path / folder, *names)
    path = write(tmp_path / where, eventful())
    data, problems = import_annotations(path, images=tmp_path / folder if place == "elsewhere" else None)
    assert [video.name for video in data.videos] == ["00000002", "00000007/000003", "00000007/000009"]
    assert tracks(data) == [[(0, [])], [(3, [(9, None)]), (4, [])], [(9, [(30, None)])]]
    assert all(data.image_path(frame).is_file() for frame in data.frames)
    assert dict(data.categories)[30] == "zebra" and [p.kind for p in problems] == ["unknown_image"]


def test_frames_in_folders_are_videos(tmp_path: Path) -> None:
    names = [f"ILSVRC2015/Data/VID/val/{v}/{i:06d}.JPEG" for v, i in (("b", 30), ("a", 5), ("b", 2))]
    touch(tmp_path, *names)
    categories = [{"id": 0, "name": "airplane"}, {"id": 1, "name": "antelope"}]
    images = [image(i, name) for i, name in enumerate(names)]
    content = {"categories": categories, "images": images, "annotations": [box(0, 0, 1, [1, 2, 20, 20])]}
    data, problems = import_annotations(write(tmp_path / "some.json", content))
    assert [v.name for v in data.videos] == ["a", "b"] and not problems
    assert tracks(data) == [[(5, [])], [(2, []), (30, [(1, None)])]], "a gap is no end: these are samples"


@pytest.mark.parametrize("names", ["frame_{:06d}.jpg", "yard/{}.png"])
def test_cvat(tmp_path: Path, names: str) -> None:
    """Bare names, or names in a folder, with tracks among the attributes."""
    files = [names.format(i) for i in (2, 0, 10)]
    touch(tmp_path / "images", *files)
    told = {"track_id": 0, "occluded": True, "keyframe": False}
    content = {
        "categories": [{"id": 1, "name": "dog", "supercategory": ""}],
        "images": [image(i, file) for i, file in enumerate(files)],
        "annotations": [
            box(1, 0, 1, [1, 2, 20, 20], attributes=told),
            box(2, 1, 1, [1, 2, 20, 20], attributes={**told, "occluded": False, "keyframe": True}),
            box(3, 1, 1, [30, 2, 20, 20], attributes={"occluded": False}),
        ],
    }
    data, problems = import_annotations(write(tmp_path / "annotations/instances_default.json", content))
    assert not problems and data.image_root == (tmp_path / "images").resolve()
    assert tracks(data) == [[(0, [(1, 0), (1, None)]), (2, [(1, 0)]), (10, [])]]
    first, second = data.videos[0].frames[0].annotations[0], data.videos[0].frames[1].annotations[0]
    assert (first.occluded, first.generated, second.occluded, second.generated) == (False, False, True, True)
    assert all(data.image_path(frame).is_file() for frame in data.frames)


@pytest.mark.slow
def test_real_boxes_survive(tmp_path: Path) -> None:
    """10,001 frames of the real validation set, imported, saved, loaded, scored with their own truth."""
    if not REAL.is_file():
        pytest.skip(f"no {REAL.name}")
    touch(tmp_path, min(entry["file_name"] for entry in json.loads(REAL.read_text())["images"]))
    data, problems = import_annotations(REAL, images=tmp_path)
    assert (len(data.videos), sum(1 for _ in data.frames), len(problems)) == (548, 10001, 0)
    data.save(tmp_path / "annotations/val.json")
    again = load_coco_video(tmp_path / "annotations/val.json")
    results = [
        {"image_id": f.image_id, "category_id": a.category_id, "score": 0.9}
        | {"bbox": [a.box[0], a.box[1], a.box[2] - a.box[0], a.box[3] - a.box[1]]}
        for f in again.frames
        for a in f.annotations
    ]
    scores = evaluate(again, results)
    assert (scores.images, scores.objects) == (10001, 15589) and scores.ap == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "holds no image"),
        ({"annotations": None}, "a list named 'annotations'"),
        ({"images": [{"id": 1, "file_name": "a/1.jpg"}]}, r"images\[0\] \(id 1\) lacks width"),
        ({"images": [image(1, "photo.jpg")]}, "of no known layout"),
        ({"images": [image(1, "a/1.jpg")]}, "cannot find the images: looked for"),
        ({"images": [image(1, "x_1_2.jpg"), image(2, "photo.jpg")] * 101}, "of no known layout"),
        ({"videos": [{"id": 1}]}, "has videos, but no instance_id"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_annotations(write(tmp_path / "some.json", eventful() | change))
    assert "some.json" in str(caught.value)


def test_the_script(tmp_path: Path) -> None:
    path, output = mmtracking(tmp_path), tmp_path / "out/val.json"
    command = ["datasets/import_annotations.py", str(path), "--output", str(output), "--strict"]
    done = run(*command, check=False)
    assert done.returncode == 1 and "2 faults in the data" in done.stdout, done.stderr
    assert sum(1 for _ in load_coco_video(tmp_path / "out/val.json").frames) == 3
    assert json.loads((tmp_path / "out/val.report.json").read_text())["boxes"] == 3
    done = run(*command, "--layout", "eventful", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
