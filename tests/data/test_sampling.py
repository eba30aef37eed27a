"""Parts of data sets: evenly spaced, at most so many per class, and what a tree lacks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.layouts.sampling import COMPLETE, at_most_per_class, evenly, what_is_missing

REAL = Path(__file__).parents[3] / "shared" / "data" / "vid" / "VID_val_videos.txt"


def stills(*classes: tuple[int, ...]) -> CocoVideo:
    videos = []
    for i, shown in enumerate(classes):
        boxes = [Annotation(c, (0, 0, 5, 5)) for c in shown]
        videos.append(Video(i, f"{i}.jpg", [Frame(i, f"{i}.jpg", 9, 9, 0, boxes)]))
    return CocoVideo([(c, str(c)) for c in range(1, 6)], videos, Path())


def counts(data: CocoVideo) -> dict[int, int]:
    return Counter(c for v in data.videos for c in {a.category_id for f in v.frames for a in f.annotations})


def test_middles_of_equal_parts() -> None:
    assert evenly(range(300), 15) == list(range(10, 300, 20))
    assert evenly([1, 2, 3], 5) == [1, 2, 3] and evenly([1, 2, 3], 1) == [2]


def test_at_most_so_many_per_class() -> None:
    """Ten images of class 1, three of class 2, one of both."""
    data = stills(*[(1,)] * 10, *[(2,)] * 3, (1, 2))
    assert counts(at_most_per_class(data, 4)) == {1: 4, 2: 4}, "class 2 takes all, the shared one counts for class 1"
    assert [video.id for video in at_most_per_class(data, 4).videos] == [1, 5, 8, 10, 11, 12, 13]
    assert at_most_per_class(data, 99).videos == data.videos


@given(st.lists(st.sets(st.integers(1, 5), min_size=1), max_size=60), st.integers(1, 12))
def test_no_class_is_short_of_what_there_is(shown: list[set[int]], count: int) -> None:
    data = stills(*(tuple(classes) for classes in shown))
    there, kept = counts(data), counts(at_most_per_class(data, count))
    assert all(kept[c] >= min(count, n) for c, n in there.items())
    if all(len(classes) == 1 for classes in shown):
        assert all(n <= count for n in kept.values())


def test_what_a_tree_lacks() -> None:
    assert what_is_missing("VID", "val", 555, 176_126) == "" == what_is_missing("VID", "val", 555, None)
    assert "554 of 555 videos and 176,000 of 176,126 frames" in what_is_missing("VID", "val", 554, 176_000)
    assert what_is_missing("DET", "train", 3, 5) == ""


def test_the_known_sizes_are_those_of_the_official_list() -> None:
    if not REAL.is_file():
        pytest.skip(f"no {REAL.name}")
    rows = [line.split() for line in REAL.read_text().splitlines()]
    assert COMPLETE["VID", "val"] == (len(rows), sum(int(row[3]) for row in rows))
    position = 1
    for _, first_row, _, length in rows:  # image ids count the frames of all videos, in the order of their names
        assert int(first_row) == position
        position += int(length)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
