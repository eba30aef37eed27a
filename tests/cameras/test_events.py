"""Objects enter, stay, leave, cross lines and are counted: once each, on what their tracks do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eventful_det.adapters import to_record
from eventful_det.cameras.config import Camera, Limits, Line, Zone
from eventful_det.cameras.events import Event, Watcher
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.runtime.session import StreamResult

NAMES = ("car", "person")
COST = FrameCost({"backbone": 1}, {"backbone": 1}, 1, 1, False)
RIGHT = ((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0))
Seen = tuple[int, str, float, float, float]  # track, class, score, foot x and y in pixels of 200 x 100


def result(*seen: Seen, held: bool = False, size: float = 10.0) -> StreamResult:
    """A frame with boxes of a size, which stand at points."""
    boxes = [[x - size / 2, y - size, x + size / 2, y] for _, _, _, x, y in seen]
    found = Detections(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor([score for _, _, score, _, _ in seen]),
        torch.tensor([NAMES.index(name) for _, name, _, _, _ in seen], dtype=torch.long),
        torch.tensor([track for track, *_ in seen], dtype=torch.long),
    )
    image = np.zeros((100, 200, 3), np.uint8)
    return StreamResult(
        detections=found,
        names=NAMES,
        frame_index=0,
        timestamp=None,
        cost=COST,
        work=torch.zeros(1, 1),
        token_size=(16, 16),
        image=image,
        held=held,
    )


class Film:
    """Frames before a watcher, a tenth of a second apart."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.watcher = Watcher("gate", Camera(source=0, **options), lambda: self.now)
        self.events: list[Event] = []

    def show(self, *seen: Seen, times: int = 1, **options: Any) -> StreamResult:
        for _ in range(times):
            self.now += 0.1
            shown, events = self.watcher(result(*seen, **options))
            self.events += events
        return shown

    def told(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [(e.kind, e.zone, e.label) for e in self.events if e.kind in (kinds or ("enter", "stay", "leave"))]


def test_an_object_enters_stays_and_leaves_once() -> None:
    film = Film(stay=1.0, gone=0.5)
    film.show((7, "car", 0.9, 50, 50))
    assert film.told() == [], "one frame is not enough"
    film.show((7, "car", 0.9, 50, 50), times=30)
    film.show(times=4)
    assert film.told() == [("enter", None, "car"), ("stay", None, "car")]
    film.show((7, "car", 0.9, 50, 50))  # it was only hidden
    film.show(times=20)
    assert film.told()[2:] == [("leave", None, "car")]
    enter, stay, leave = (e for e in film.events if e.kind != "count")
    assert enter.object == stay.object == leave.object and len({enter.id, stay.id, leave.id}) == 3
    assert enter.box == (45.0, 40.0, 55.0, 50.0) and leave.seconds == pytest.approx(3.4, abs=0.11)
    assert [e.count for e in film.events if e.kind == "count"] == [0, 1, 0]


def test_what_is_seen_on_one_key_frame_is_no_object() -> None:
    film = Film()
    film.show((1, "car", 0.9, 50, 50))
    film.show((1, "car", 0.8, 50, 50), times=5, held=True)  # moved on, not seen again
    assert film.told() == []


def test_an_object_that_flickers_stays_the_same() -> None:
    film = Film(score=0.5)
    film.show((1, "car", 0.6, 50, 50), times=3)
    for score in (0.3, 0.55, 0.26, 0.4) * 10:
        film.show((1, "car", score, 50, 50))
    assert film.told() == [("enter", None, "car")]
    film.show((2, "person", 0.4, 20, 50), (1, "car", 0.5, 50, 50), times=5)
    assert film.told() == [("enter", None, "car")], "it was never sure of the person"


def test_an_object_in_long_steps_is_one_although_each_frame_begins_a_track() -> None:
    """Two frames per second: boxes do not overlap, and the mover lets the old ones stand for a while."""
    film = Film(gone=1.0, lines={"door": Line(start=(0.5, 1.0), end=(0.5, 0.0))})
    for step in range(12):
        film.now += 0.4
        left = [(step - k, "person", 0.9 * 0.7**k, 20 + 12 * (step - k), 50) for k in range(min(step, 4) + 1)]
        film.show(*left)  # type: ignore[arg-type]
    assert film.told() == [("enter", None, "person")] and len(film.watcher._objects) <= 5
    assert [e.direction for e in film.events if e.kind == "cross"] == ["in"], "what was left behind crosses nothing"
    assert [e.count for e in film.events if e.kind == "count"] == [0, 1]


@pytest.mark.parametrize(
    ("away", "x", "label", "same"),
    [(8, 55, "car", True), (30, 55, "car", False)] + [(8, 80, "car", False), (8, 55, "person", False)],
)
def test_what_comes_back_within_the_camera_s_patience_is_the_same(away: int, x: int, label: str, same: bool) -> None:
    film = Film(gone=1.0)
    film.show((1, "car", 0.9, 50, 50), times=3)
    film.show(times=away)
    film.show((2, label, 0.9, x, 50), times=3)
    assert len({e.object for e in film.events if e.object}) == 2 - same
    assert len(film.told("enter")) == 2 - same


def test_who_comes_beside_another_is_another() -> None:
    film = Film()
    film.show((1, "car", 0.9, 50, 50), times=3)
    film.show((1, "car", 0.8, 50, 50), (2, "car", 0.9, 56, 50), times=3)
    assert film.told() == [("enter", None, "car")] * 2


def test_zones_tell_who_is_in_them_by_where_it_stands() -> None:
    film = Film(zones={"right": Zone(polygon=RIGHT, classes=("car",), score=0.8)}, gone=0.5)
    film.show((1, "car", 0.9, 20, 50), (2, "person", 0.9, 150, 50), times=3)
    shown = film.show((1, "car", 0.9, 120, 50), (2, "person", 0.9, 150, 50), times=3)
    assert shown.zones == (("right",), ())
    assert to_record(shown)["detections"][0]["zones"] == ["right"]
    assert film.told("enter") == [("enter", None, "car"), ("enter", None, "person"), ("enter", "right", "car")]
    film.show((1, "car", 0.9, 20, 50), (2, "person", 0.9, 150, 50), times=10)
    assert film.told("leave") == [("leave", "right", "car")]
    counts = [(e.zone, e.count, e.classes) for e in film.events if e.kind == "count"]
    assert counts[:2] == [(None, 0, {}), ("right", 0, {})], "so that nobody has to believe what a broker retained"
    assert counts[2:] == [(None, 2, {"car": 1, "person": 1}), ("right", 1, {"car": 1}), ("right", 0, {})]


def test_who_leaves_the_frame_leaves_its_zones() -> None:
    film = Film(zones={"right": Zone(polygon=RIGHT)}, gone=0.5)
    film.show((1, "car", 0.9, 150, 50), times=3)
    film.show(times=10)
    assert film.told("leave") == [("leave", None, "car"), ("leave", "right", "car")]


def test_what_stands_in_a_mask_is_dropped() -> None:
    film = Film(masks=(RIGHT,))
    shown = film.show((1, "car", 0.9, 150, 50), (2, "car", 0.9, 50, 50), times=3)
    assert len(shown.detections) == 1 and shown.detections.tracks is not None and shown.detections.tracks[0] == 2
    assert film.told() == [("enter", None, "car")]


def test_classes_scores_and_sizes_count_by_class() -> None:
    film = Film(classes={"car": Limits(), "person": Limits(score=0.3, max_area=0.0045)}, min_area=0.004)
    shown = film.show((1, "person", 0.4, 50, 50), (2, "car", 0.9, 90, 50), times=3)  # 100 of 20,000 pixels
    assert film.told() == [("enter", None, "car")] and shown.detections.labels.tolist() == [0]
    small = Film(classes=("person",))
    assert not len(small.show((2, "car", 0.9, 90, 50)).detections)


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ([20, 60, 95, 120], ["out"]),
        ([150, 101, 120, 60], ["in"]),
        ([98, 99.5, 100.5, 99], []),
        ([20, 150, 20], ["out", "in"]),
    ],
)
def test_a_line_is_crossed_when_somebody_is_clearly_on_its_other_side(path: list[float], way: list[str]) -> None:
    film = Film(lines={"door": Line(start=(0.5, 1.0), end=(0.5, 0.0))})  # seen upwards: from the right is "in" ...
    for x in path[:1] * 2 + path:
        film.show((1, "car", 0.9, x, 50))
    crossed = [("in" if e.direction == "out" else "out") for e in film.events if e.kind == "cross"]
    assert crossed == way


def test_directions_are_those_of_the_documentation() -> None:
    """From left to right of somebody who looks from start to end is "in"."""
    film = Film(lines={"door": Line(start=(0.5, 1.0), end=(0.5, 0.0))})  # looks upwards: left is left
    for x in (20, 20, 20, 180):
        film.show((1, "car", 0.9, x, 50))
    assert [e.direction for e in film.events if e.kind == "cross"] == ["in"]


def test_who_walks_around_a_line_does_not_cross_it() -> None:
    film = Film(lines={"door": Line(start=(0.5, 0.0), end=(0.5, 0.4), classes=("car",))})
    for x, y in ((20, 90), (20, 90), (180, 90), (180, 20)):
        film.show((1, "car", 0.9, x, y), (2, "person", 0.9, x, 30))
    assert film.told("cross") == []


def test_other_options_count_at_once_and_objects_stay_the_same() -> None:
    film = Film(zones={"right": Zone(polygon=RIGHT)})
    film.show((1, "car", 0.9, 150, 50), times=3)
    film.watcher.camera = Camera(source=0, zones={"all": Zone(polygon=((0, 0), (1, 0), (1, 1), (0, 1)))})
    film.show((1, "car", 0.9, 150, 50), times=3)
    assert film.told() == [
        ("enter", None, "car"),
        ("enter", "right", "car"),
        ("leave", "right", "car"),
        ("enter", "all", "car"),
    ]
    assert len({e.object for e in film.events if e.object}) == 1
    assert [(e.zone, e.kind) for e in film.watcher.close() if e.kind == "leave"] == [(None, "leave"), ("all", "leave")]


def test_nothing_is_remembered_of_who_left() -> None:
    film = Film(gone=0.5, lines={"door": Line(start=(0.5, 0), end=(0.5, 1))}, zones={"right": Zone(polygon=RIGHT)})
    for track in range(50):
        film.show((track, "car", 0.9, 150, 50), times=3)
    film.show(times=10)
    assert not film.watcher._objects and not film.watcher._scores


def test_a_slow_machine_has_to_look_before_somebody_has_left() -> None:
    film = Film(gone=0.5)
    film.show((1, "car", 0.9, 50, 50), times=2)
    film.now += 10
    film.show((1, "car", 0.9, 50, 50))
    film.now += 10
    film.show()
    assert film.told() == [("enter", None, "car"), ("stay", None, "car")]
    film.show()
    assert film.told("leave")


def test_a_zone_that_is_taken_away_is_empty() -> None:
    film = Film(zones={"drive": Zone(polygon=RIGHT)})
    film.show((1, "car", 0.9, 150, 50), times=3)
    film.events.clear()
    film.watcher.camera = Camera(source=0)
    film.show((1, "car", 0.9, 150, 50), times=3)
    assert [(e.zone, e.count) for e in film.events if e.kind == "count"] == [("drive", 0)]
