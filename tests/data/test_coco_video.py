"""COCO-video files: what is saved comes back, pycocotools reads it, and faults are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.errors import UserError


def example(root: Path) -> CocoVideo:
    frames = [
        Frame(1, "a/0.jpg", 64, 48, 0, [Annotation(1, (1.0, 2.0, 11.0, 22.0), 7, occluded=True)]),
        Frame(2, "a/1.jpg", 64, 48, 1, [Annotation(2, (0.0, 0.0, 64.0, 48.0), 8, generated=True)]),
        Frame(3, "a/5.jpg", 64, 48, 5, labelled=False),
    ]
    still = Frame(4, "b.jpg", 32, 32, 0, [Annotation(2, (3.0, 3.0, 5.0, 6.0), None, iscrowd=True, area=4.0)])
    data = CocoVideo([(1, "dog"), (2, "fox")], [Video(1, "a", frames), Video(2, "b", [still])], root)
    data.renumber()
    return data


def test_round_trip(tmp_path: Path) -> None:
    data = example(tmp_path)
    path = tmp_path / "annotations/x.json"
    data.save(path)
    loaded = load_coco_video(path)
    assert loaded == data
    assert loaded.image_path(next(loaded.frames)) == tmp_path / "a/0.jpg"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"], "no temporary file stays"
    again = tmp_path / "annotations/y.json"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_pycocotools_reads_it(tmp_path: Path) -> None:
    example(tmp_path).save(tmp_path / "x.json")
    coco = COCO(str(tmp_path / "x.json"))
    assert len(coco.imgs) == 4 and coco.anns[1]["bbox"] == [1, 2, 10, 20] and coco.anns[1]["area"] == 200
    assert coco.anns[3]["iscrowd"] == 1


@given(box=st.tuples(*[st.floats(0, 1, width=32)] * 4))
def test_boxes_survive_to_a_thousandth_of_a_pixel(tmp_path_factory: pytest.TempPathFactory, box: Any) -> None:
    root = tmp_path_factory.getbasetemp()
    x1, y1 = 30 * box[0], 20 * box[1]
    whole = (x1, y1, x1 + 1 + 30 * box[2], y1 + 1 + 20 * box[3])
    frame = Frame(1, "a.jpg", 64, 48, 0, [Annotation(1, whole, 0, id=1)])
    CocoVideo([(1, "dog")], [Video(1, "a", [frame])], root).save(root / "box.json")
    loaded = next(load_coco_video(root / "box.json").frames).annotations[0]
    assert loaded.box == pytest.approx(whole, abs=1e-3)


def test_frames_are_put_in_order(tmp_path: Path) -> None:
    data = example(tmp_path)
    data.videos[0].frames.reverse()
    data.save(tmp_path / "x.json")
    assert [f.frame_id for f in load_coco_video(tmp_path / "x.json").videos[0].frames] == [0, 1, 5]


def test_plain_coco_is_read_as_still_pictures(tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "categories": [{"id": 3, "name": "dog"}],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in (5, 6)],
        "annotations": [{"id": 1, "image_id": 6, "category_id": 3, "bbox": [0, 0, 4, 4]}],
    }
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    data = load_coco_video(tmp_path / "plain.json")
    assert [(v.name, len(v.frames)) for v in data.videos] == [("5.jpg", 1), ("6.jpg", 1)]
    annotation = data.videos[1].frames[0].annotations[0]
    assert annotation.area == 16 and annotation.track_id is None
    assert data.image_root == tmp_path


def test_image_root_is_the_parent_of_annotations_or_as_told(tmp_path: Path) -> None:
    path = tmp_path / "annotations/x.json"
    example(tmp_path).save(path)
    content = json.loads(path.read_text())
    del content["info"]
    path.write_text(json.dumps(content))
    assert load_coco_video(path).image_root == tmp_path
    assert load_coco_video(path, image_root="elsewhere").image_root == Path("elsewhere")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("categories",), [], "categories is empty"),
        (("categories",), None, "categories is missing"),
        (("images",), {}, "images is no list"),
        (("images", 0, "id"), 2, r"images\[1\] has the id 2; expected every id once"),
        (("images", 0, "file_name"), ..., r"images\[0\] \(id 1\) lacks file_name"),
        (("images", 0, "file_name"), "a\0b", r"images\[0\] has file_name 'a.x00b'"),
        (("images", 0, "file_name"), ["a"], r"images\[0\] has file_name \['a'\]"),
        (("images", 0, "width"), 0, r"images\[0\] has width 0"),
        (("images", 0, "width"), 10**400, r"images\[0\] has width 1000+\.\.\.0+; expected a number of whole pixels"),
        (("images", 0, "frame_id"), "x", r"images\[0\] has frame_id 'x'"),
        (("images", 0, "frame_id"), 1, r"video 1 \(a\) has the frame_id 1 twice"),
        (("images", 0, "video_id"), 9, r"images\[0\] \(id 1\) has video_id 9"),
        (("annotations", 0, "image_id"), 99, r"annotations\[0\] \(id 1\) has image_id 99"),
        (("annotations", 0, "category_id"), 99, r"annotations\[0\] \(id 1\) has category_id 99"),
        (("annotations", 0, "category_id"), [1], r"annotations\[0\] has category_id \[1\]"),
        (("annotations", 0, "iscrowd"), "perhaps", r"annotations\[0\] has iscrowd 'perhaps'; expected true or false"),
        (("annotations", 0, "area"), "large", r"annotations\[0\] has area 'large'"),
        (("annotations", 0, "track_id"), {}, r"annotations\[0\] has track_id {}"),
        (("annotations", 0, "bbox"), [1, 2], r"annotations\[0\] has bbox \[1, 2\]"),
        (("annotations", 0, "bbox"), ["a", 0, 1, 1], "has bbox"),
        (("annotations", 0, "bbox"), [10**400, 0, 1, 1], "has bbox"),
        (("annotations", 0, "bbox"), [float("nan"), 0, 1, 1], "has bbox"),
        (("annotations", 0), 5, r"annotations\[0\] is 5"),
        (("categories", 0, "name"), ["dog"], r"categories\[0\] has name \['dog'\]"),
        (("categories", 1, "name"), "dog ", r"category 'dog' has the ids 1 and 2"),
        (("info", "image_root"), 5, "info has image_root 5"),
    ],
)
def test_faults_are_named(tmp_path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
    path = tmp_path / "x.json"
    example(tmp_path).save(path)
    content = json.loads(path.read_text())
    *parents, last = where
    place = content
    for key in parents:
        place = place[key]
    if value is None or value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_coco_video(path)
    assert str(path) in str(caught.value) and "expected" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_values_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    example(tmp_path).save(path)
    whole = load_coco_video(path)
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        row |= {"id": str(row["id"]), "image_id": float(row["image_id"]), "category_id": f"{row['category_id']}"}
        row |= {"iscrowd": str(row["iscrowd"]), "occluded": str(row["occluded"]), "bbox": list(map(str, row["bbox"]))}
        row |= {"area": None if row["area"] > 9 else str(row["area"]), "generated": str(int(row["generated"]))}
    for row in content["images"]:
        row |= {"width": str(row["width"]), "license": None, "frame_id": float(row["frame_id"])}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(json.dumps(content), encoding=encoding)
        assert load_coco_video(path) == whole


def test_tracks_may_have_names(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    example(tmp_path).save(path)
    content = json.loads(path.read_text())
    content["images"][2]["labelled"] = True
    content["annotations"] = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [1, 1, 5, 5], "track_id": track}
        for n, (image, track) in enumerate([(1, "a"), (1, "7"), (2, "a"), (2, "b"), (3, 7), (3, -1), (4, "a")])
    ]
    path.write_text(json.dumps(content))
    tracks = [a.track_id for frame in load_coco_video(path).frames for a in frame.annotations]
    assert tracks[0] == tracks[2] != tracks[3] and tracks[1] == tracks[4] == 7 and tracks[5] is None
    assert tracks[6] not in tracks[:6], "a name means something within its video"


def test_boxes_without_area_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.json"
    example(tmp_path).save(path)
    content = json.loads(path.read_text())
    boxes = [[0, 0, 5, 0], [64, 0, 5, 5], [9, 9, -3, 5], [-2, -2, 9, 9]]
    content["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": bbox} for n, bbox in enumerate(boxes, start=11)
    ]
    path.write_text(json.dumps(content))
    (left,) = [a for frame in load_coco_video(path).frames for a in frame.annotations]
    assert left.id == 14 and left.box == (-2, -2, 7, 7), "what lies partly outside is as it was"
    (record,) = caplog.records
    for told in ("3 boxes", "annotations[0] (id 11), [0, 0, 5, 0]", "(id 12)", "a/0.jpg"):
        assert told in record.getMessage()


def test_a_class_listed_twice_is_one_class_if_only_one_has_boxes(tmp_path: Path) -> None:
    """As Roboflow writes files: the first category is the project, and may be called like a class."""
    path = tmp_path / "x.json"
    example(tmp_path).save(path)
    whole = load_coco_video(path)
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 0, "name": "dog"}, *content["categories"], {"id": 3, "name": "fox"}]
    content["images"][3]["labelled_category_ids"] = [0, 3]
    path.write_text(json.dumps(content))
    whole.videos[1].frames[0].exhaustive = frozenset([1, 2])
    assert load_coco_video(path) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 99_999, "not valid JSON"),
        ('{"a": 1' + "0" * 9999 + "}", "not valid JSON"),
    ],
    ids=["cut", "list", "deep", "long"],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_coco_video(path)
    with pytest.raises(UserError, match="cannot read"):
        load_coco_video(tmp_path / "absent.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    data = example(tmp_path)
    data.save(path)
    before = path.read_bytes()
    data.videos[0].frames[0].annotations[0].area = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        data.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]
