"""Assumed absence: more negatives, never against a box, for training alone."""

from pathlib import Path

import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.labelling.absent import assume_absent
from eventful_det.errors import UserError


def still(n: int, name: str, exhaustive: set[int] | None, *classes: int) -> Video:
    objects = [Annotation(c, (0, 0, 8, 8)) for c in classes]
    frame = Frame(n, name, 16, 16, annotations=objects)
    frame.exhaustive = None if exhaustive is None else frozenset(exhaustive)
    return Video(n, name, [frame])


@pytest.fixture
def data() -> CocoVideo:
    stills = [still(1, "roads/a.jpg", {1}, 1), still(2, "zoo/b.jpg", {2}, 2, 3), still(3, "all/c.jpg", None)]
    return CocoVideo([(1, "car"), (2, "tiger"), (3, "person")], stills, Path("."))


def searched(data: CocoVideo) -> list[set[int] | None]:
    return [None if f.exhaustive is None else set(f.exhaustive) for f in data.frames]


def test_classes_count_as_searched_for_where_they_are_assumed_absent(data: CocoVideo) -> None:
    assert searched(assume_absent(data, {"roads/*": ["tiger"]})) == [{1, 2}, {2}, None]
    assert searched(assume_absent(data, {"*": ["tiger"], "zoo/?.jpg": ["car"]})) == [{1, 2}, {1, 2}, None]
    assert searched(assume_absent(data, {})) == searched(data) == [{1}, {2}, None]


def test_no_assumption_stands_against_a_box(data: CocoVideo) -> None:
    assert searched(assume_absent(data, {"*": ["person"]})) == [{1, 3}, {2}, None]


def test_unknown_classes_and_patterns_are_said(data: CocoVideo) -> None:
    with pytest.raises(UserError, match="no class wolf; there are car, tiger, person"):
        assume_absent(data, {"*": ["wolf"]})
    with pytest.raises(UserError, match=r"no picture fits 'road/\*'; a file name is 'roads/a.jpg'"):
        assume_absent(data, {"road/*": ["tiger"]})
