"""Motion IoU: by hand, and against a slow reading of its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import Annotation, Box, Frame, Video
from eventful_det.data.layouts.imagenet_vid import Source, convert, list_folders
from eventful_det.evaluation.ilsvrc import vid_scores
from eventful_det.evaluation.ilsvrc.motion import motion_groups, motion_iou, motion_ious

Track = dict[int, Box]  # by frame


def clip(*tracks: Track, frames: range | list[int]) -> Video:
    """A video; annotation ids count up from 1, frame by frame."""
    images = [Frame(time + 1, f"{time}.jpg", 640, 480, time) for time in frames]
    number = 0
    for image in images:
        for track, boxes in enumerate(tracks):
            if image.frame_id in boxes:
                number += 1
                image.annotations.append(Annotation(1, boxes[image.frame_id], track_id=track, id=number))
    return Video(1, "a", images)


def motion_group(iou: float) -> str | None:
    """The name of the group a motion IoU belongs to."""
    return next((name for name, inside in motion_groups(np.array(iou)).items() if inside), None)


def moving(speed: float, frames: range, width: float = 99.0) -> Track:
    return {time: (speed * time, 20.0, speed * time + width, 120.0) for time in frames}


def by_definition(video: Video) -> list[float]:
    """Mean overlap with the same track on the other frames at most ten away, one pair at a time."""

    def overlap(a: Box, b: Box) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        shared = max(width, 0) * max(height, 0)
        areas = sum((x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b))
        return shared / (areas - shared)

    values = []
    for frame in video.frames:
        around = [f for f in video.frames if f.labelled and 0 < abs(f.frame_id - frame.frame_id) <= 10]
        for item in frame.annotations:
            like = [overlap(item.box, a.box) for f in around for a in f.annotations if a.track_id == item.track_id]
            known = item.track_id is not None and around
            values.append((sum(like) / len(like) if like else 1.0) if known else math.nan)
    return values


def test_what_stands_still_has_one() -> None:
    assert motion_iou(clip(moving(0, range(5)), frames=range(5))) == dict.fromkeys(range(1, 6), 1.0)


def test_constant_speed_by_hand() -> None:
    """100 pixels wide, 2 per frame: k frames apart, boxes share 100 - 2k of 100 + 2k columns."""
    values = motion_iou(clip(moving(2, range(50)), frames=range(50)))
    one_side = [(100 - 2 * k) / (100 + 2 * k) for k in range(1, 11)]
    assert values[26] == pytest.approx(np.mean(one_side)), "the frame itself does not count"
    assert values[1] == values[50] == pytest.approx(np.mean(one_side)), "at the ends there is one side only"
    assert values[2] == pytest.approx((sum(one_side) + one_side[0]) / 11)


def test_frames_without_the_object_do_not_count() -> None:
    seen = {time: box for time, box in moving(4, range(30)).items() if time in (3, 5, 12, 29)}
    values = list(motion_iou(clip(seen, frames=range(30))).values())
    near, far, apart = 92 / 108, 64 / 136, 72 / 128  # 2, 9 and 7 frames
    assert values == pytest.approx([(near + far) / 2, (near + apart) / 2, (far + apart) / 2, 1.0])


def test_distance_is_that_of_frame_ids() -> None:
    values = list(motion_iou(clip(moving(4, range(30)), frames=[0, 5, 16, 26])).values())
    assert values == pytest.approx([80 / 120, 80 / 120, 60 / 140, 60 / 140])


def test_what_cannot_be_known() -> None:
    assert all(map(math.isnan, motion_ious(clip(moving(4, range(50)), frames=[0, 20, 40])))), "frames too far apart"
    assert motion_ious(Video(1, "empty")).shape == (0,)
    video = clip(moving(0, range(3)), moving(50, range(3)), frames=range(3))
    for frame in video.frames:
        frame.annotations[0].track_id = None
    assert [math.isnan(value) for value in motion_ious(video)] == [True, False] * 3
    for frame in video.frames[1:]:
        frame.labelled, frame.annotations = False, []
    assert np.isnan(motion_ious(video)).all(), "nobody knows what is on the other frames"


def test_a_track_twice_on_a_frame_is_no_motion() -> None:
    video = clip(moving(0, range(2)), moving(300, range(2)), frames=range(2))
    for frame in video.frames:
        frame.annotations[1].track_id = 0
    assert motion_ious(video).tolist() == pytest.approx(by_definition(video))


@pytest.mark.parametrize(
    ("iou", "group"),
    [(1, "slow"), (0.9001, "slow"), (0.9, "medium"), (0.7, "medium"), (0.6999, "fast"), (0, "fast"), (math.nan, None)],
)
def test_groups(iou: float, group: str | None) -> None:
    assert motion_group(iou) == group


@pytest.mark.parametrize(("speed", "group"), [(0, "slow"), (0.5, "slow"), (2, "medium"), (5, "fast"), (200, "fast")])
def test_objects_of_known_speed_are_in_the_right_group(speed: float, group: str) -> None:
    tracks = [moving(other, range(40)) for other in (0, speed, 11)]
    video = clip(*tracks, frames=range(40))
    values = motion_iou(video)
    assert {motion_group(values[a.id]) for f in video.frames for a in f.annotations if a.track_id == 1} == {group}


SPEEDS = {"slow": (0.0, 0.006), "medium": (0.016, 0.024), "fast": (0.1, 0.3)}  # widths per frame


def write_tree(root: Path) -> dict[str, int]:
    """An ILSVRC tree of textureless frames whose objects move straight ahead, each at the speed of its group.

    k frames apart, a box that moves by s of its width per frame overlaps itself by (1 - s k) / (1 + s k): on average
    over ten frames at least 0.93 at 0.006, 0.84 to 0.77 at 0.016 to 0.024, at most 0.36 at 0.1. Some frames lack it.

    Returns:
        Boxes of each group.
    """
    rng, boxes = np.random.default_rng(0), dict.fromkeys(SPEEDS, 0)
    for v in range(6):
        name = f"ILSVRC2015_val_{v:08d}"
        images, xmls = (root / part / "VID/val" / name for part in ("Data", "Annotations"))
        for folder in (images, xmls):
            folder.mkdir(parents=True)
        group = list(SPEEDS)
        tracks = [(group[t % 3], rng.uniform(*SPEEDS[group[t % 3]]), rng.choice([-1, 1])) for t in range(6)]
        for i in range(30):
            objects = ""
            for track, (kind, speed, way) in enumerate(tracks):
                if track > 2 and i in (7, 20, 21):
                    continue
                boxes[kind] += 1
                x = 1000 + way * speed * 100 * i
                corners = {"xmin": x, "ymin": 40 * track, "xmax": x + 99, "ymax": 40 * track + 59}
                bounds = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                objects += f"<object><trackid>{track}</trackid><name>n02084071</name><bndbox>{bounds}</bndbox></object>"
            size = "<size><width>2000</width><height>300</height></size>"
            (xmls / f"{i:06d}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            Image.new("L", (2000, 300)).save(images / f"{i:06d}.JPEG", "JPEG")
    return boxes


def test_a_set_of_known_motion_from_files_to_scores(tmp_path: Path) -> None:
    boxes = write_tree(tmp_path)
    source = Source(tmp_path, "VID", "val", IMAGENET_VID)
    data, problems = convert(source, list_folders(source))
    assert not problems
    kinds = list(SPEEDS)
    for video in data.videos:
        values = motion_iou(video)
        for frame in video.frames:
            assert all(motion_group(values[a.id]) == kinds[(a.track_id or 0) % 3] for a in frame.annotations)
    slow_only = [
        {"image_id": f.image_id, "category_id": 9, "score": 0.9}
        | {"bbox": [a.box[0], a.box[1], a.box[2] - a.box[0], a.box[3] - a.box[1]]}
        for f in data.frames
        for a in f.annotations
        if (a.track_id or 0) % 3 == 0
    ]
    scores = vid_scores(data, slow_only)
    assert {kind: getattr(scores, f"objects_{kind}") for kind in kinds} == boxes
    assert (scores.ap50_slow, scores.ap50_medium, scores.ap50_fast) == (1, 0, 0)


COORDINATE = st.integers(0, 300)
BOXES = st.tuples(COORDINATE, COORDINATE, st.integers(1, 200), st.integers(1, 200)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
TRACKS = st.lists(st.dictionaries(st.integers(0, 40), BOXES, max_size=15), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(TRACKS, st.sets(st.integers(0, 40), min_size=1))
def test_equals_its_definition_on_any_video(tracks: list[Track], frames: set[int]) -> None:
    video = clip(*tracks, frames=sorted(frames))
    values = motion_ious(video)
    assert values.tolist() == pytest.approx(by_definition(video), nan_ok=True)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in values)


@settings(max_examples=40, deadline=None)
@given(TRACKS, st.floats(-1000, 1000).map(round))
def test_time_runs_both_ways_and_place_does_not_matter(tracks: list[Track], shift: int) -> None:
    mirrored = [{40 - time: tuple(value + shift for value in box) for time, box in track.items()} for track in tracks]
    straight = motion_ious(clip(*tracks, frames=range(41)))
    back = motion_ious(clip(*mirrored, frames=range(41)))  # type: ignore[arg-type]
    assert sorted(back) == pytest.approx(sorted(straight))
