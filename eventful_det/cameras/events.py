"""What happens before one camera: objects enter, stay and leave, cross lines and fill zones."""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import torch

from eventful_det.cameras.config import Camera, Line, Place
from eventful_det.files import JsonObject
from eventful_det.runtime.motion.boxes import MotionOptions
from eventful_det.runtime.regions import within
from eventful_det.runtime.session import StreamResult

Kind = Literal["enter", "stay", "leave", "cross", "count", "online", "offline"]
KINDS: tuple[Kind, ...] = ("enter", "stay", "leave", "cross", "count", "online", "offline")

_CONFIRM = 2  # key frames on which an object has to be seen before it counts
_KEEPS = 2.0  # an object that counts may score so many times less
_MISSED = 1.01 * MotionOptions().keep  # to which part a score falls where the detector does not find its object
_STEP = 1.5  # sides of its box that an object may be away from where it was missed
_CLEAR = 0.01  # of the frame; an object that is nearer to a line has not crossed it yet


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        kind: of event.
        camera, zone, line: where; zone None = in the frame.
        direction: of a crossing, see `config.Line`.
        object: id of the object, the same in all of its events; label: its class.
        score, box: of its detection; xyxy in pixels of the frame.
        seconds: that it has been there.
        count, classes: objects that are there now, and of each class.
        snapshot, clip: files, relative to the folder of clips.
        id: of the event; whoever gets it twice knows by that.
        time: in seconds since 1970.
    """

    kind: Kind
    camera: str
    zone: str | None = None
    line: str | None = None
    direction: Literal["in", "out"] | None = None
    object: str | None = None
    label: str | None = None
    score: float | None = None
    box: tuple[float, ...] | None = None
    seconds: float | None = None
    count: int | None = None
    classes: dict[str, int] | None = None
    snapshot: str | None = None
    clip: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    time: float = field(default_factory=time.time)

    def record(self) -> JsonObject:
        """As one JSON object, without what it has not."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if (label := values.pop("label", None)) is not None:
            values["class"] = label
        return {**values, "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds")}


@dataclass
class _Presence:
    """An object in a zone or in the frame; times are seconds on the clock of the watcher."""

    first: float
    last: float
    seen: int = 0  # key frames
    missed: int = 0  # frames since it was seen
    entered: bool = False
    stayed: bool = False


@dataclass(eq=False)
class _Object:
    """One object, whose boxes may be those of one track after the other.

    Attributes:
        label: its class.
        id: for others.
        track, score, box: of its last detection.
        places: where it is; None = in the frame.
        sides: of each line, on which one it was, and where.
    """

    label: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    track: int = -1
    score: float = 0.0
    box: tuple[float, ...] = ()
    places: dict[str | None, _Presence] = field(default_factory=dict)
    sides: dict[str, tuple[bool, Place]] = field(default_factory=dict)


class Watcher:
    """Turns the results of one camera, in their order, into events.

    A track that begins near an object that is missed goes on with it: few frames per second make steps that boxes do
    not overlap over, and a track ends sooner than the camera's patience.

    Args:
        name: of the camera.
        camera: its options; may be exchanged at any time.
        clock: seconds that only grow.
    """

    def __init__(self, name: str, camera: Camera, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.camera, self._clock = name, camera, clock
        self._objects: dict[int, _Object] = {}  # by track, of which an object may have several
        self._scores: dict[int, float] = {}  # of the tracks of the last frame
        self._counts: dict[str | None, Counter[str]] = {}

    def __call__(self, result: StreamResult) -> tuple[StreamResult, list[Event]]:
        """The result without what does not count, with the zones of each detection; and what happened."""
        camera, now, found = self.camera, self._clock(), result.detections
        scale = np.array(result.image.shape[1::-1] * 2, np.float32)
        boxes = found.boxes.cpu().numpy() / scale
        feet = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, boxes[:, 3]], axis=1)  # where objects stand
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        tracks = np.full(len(boxes), -1) if found.tracks is None else found.tracks.cpu().numpy()
        labels = [result.names[label] for label in found.labels.tolist()]
        masked = within(feet, camera.masks)
        inside = {name: within(feet, [zone.polygon]) for name, zone in camera.zones.items()}
        kept: list[int] = []
        zones: list[tuple[str, ...]] = []
        events: list[Event] = []
        scores = dict(zip(tracks.tolist(), found.scores.tolist(), strict=True))
        met = {one for track, one in self._objects.items() if scores.get(track, 0) > _MISSED * self._scores[track]}
        done: set[_Object] = set()  # best boxes come first
        for i, (track, label, score) in enumerate(zip(tracks.tolist(), labels, found.scores.tolist(), strict=True)):
            if masked[i] or (limits := camera.limits(label)) is None:
                continue
            if not limits.admit(_KEEPS * score, areas[i]):
                continue
            places = {
                name: own
                for name, zone in camera.zones.items()
                if inside[name][i] and (own := zone.limits(label)) and own.admit(_KEEPS * score, areas[i])
            }
            kept.append(i)
            zones.append(tuple(places))
            if track < 0 or (track not in self._objects and not limits.admit(score, areas[i])):
                continue
            box = tuple(found.boxes[i].tolist())
            if track not in self._objects:
                one = self._objects[track] = self._missing(label, box, met) or _Object(label)
                met.add(one)
            one = self._objects[track]
            if one in done:
                continue
            done.add(one)
            one.track, one.score, one.box = track, score, tuple(round(v, 1) for v in box)
            for place, own in ((None, limits), *places.items()):
                self._see(one, place, now, own.admit(score, areas[i]), not result.held)
            events += self._entered(one, now)
            if None in one.places and one.places[None].entered:
                events += self._crossed(one, (float(feet[i, 0]), float(feet[i, 1])))
        self._scores = scores
        events += self._left(now)
        index = torch.tensor(kept, dtype=torch.long, device=found.boxes.device)
        return dataclasses.replace(result, detections=found[index], zones=tuple(zones)), events + self._counted()

    def close(self) -> list[Event]:
        """The camera is watched no longer, or shows nothing: all objects leave."""
        return self._left(math.inf) + self._counted()

    def _missing(self, label: str, box: tuple[float, ...], met: set[_Object]) -> _Object | None:
        """The object of a class nearest to a box, of those that were not met on this frame; None if none is near."""
        x1, y1, x2, y2 = box

        def steps(one: _Object) -> float:
            left, top, right, bottom = one.box
            way = math.hypot(x1 + x2 - left - right, y1 + y2 - top - bottom) / 2
            return way / max(right - left, bottom - top, x2 - x1, y2 - y1, 1e-6)

        near = [one for one in self._objects.values() if one.label == label and one not in met and steps(one) < _STEP]
        return min(near, key=steps, default=None)

    def _see(self, one: _Object, place: str | None, now: float, sure: bool, key: bool) -> None:
        """An object is somewhere; where it has not entered it has to be sure."""
        here = one.places.get(place)
        if here is None:
            if not sure:
                return
            here = one.places[place] = _Presence(now, now)
        here.last, here.missed = now, 0
        here.seen += sure and key

    def _entered(self, one: _Object, now: float) -> list[Event]:
        """What an object that was just seen did."""
        events = []
        for place in (None, *self.camera.zones):
            here = one.places.get(place)
            if here is None or here.last < now:
                continue
            if not here.entered and here.seen >= _CONFIRM:
                here.entered = True
                events.append(self._event("enter", one, place))
            if here.entered and not here.stayed and now - here.first >= self.camera.stay:
                here.stayed = True
                events.append(self._event("stay", one, place, seconds=round(now - here.first, 1)))
        return events

    def _left(self, now: float) -> list[Event]:
        """Those that were not seen for long; an object that is not in the frame is in no zone."""
        events, camera = [], self.camera

        def is_gone(here: _Presence) -> bool:  # by time, but a slow machine has to have looked
            return now - here.last > camera.gone and (here.missed >= _CONFIRM or now == math.inf)

        for one in dict.fromkeys(self._objects.values()):
            for here in one.places.values():
                here.missed += here.last < now
            gone = None not in one.places or is_gone(one.places[None])
            for place, here in list(one.places.items()):
                known = place is None or place in camera.zones
                if known and not gone and not is_gone(here):
                    continue
                del one.places[place]
                if here.entered:
                    events.append(self._event("leave", one, place, seconds=round(here.last - here.first, 1)))
        self._objects = {
            track: one
            for track, one in self._objects.items()
            if one.places and (track in self._scores or track == one.track)
        }
        self._scores = {track: self._scores.get(track, 0.0) for track in self._objects}
        return events

    def _crossed(self, one: _Object, foot: Place) -> list[Event]:
        """Lines that an object crossed since it was last on one side of them for sure."""
        events = []
        for name, line in self.camera.lines.items():
            if line.classes is not None and one.label not in line.classes:
                continue
            distance = _beside(line, foot)
            if abs(distance) < _CLEAR:
                continue
            before = one.sides.get(name)
            one.sides[name] = distance > 0, foot
            if before is not None and before[0] != (distance > 0) and _meets(line, before[1], foot):
                way: Literal["in", "out"] = "in" if distance > 0 else "out"
                events.append(dataclasses.replace(self._event("cross", one, None), line=name, direction=way))
        return events

    def _counted(self) -> list[Event]:
        """How many objects there are, where that changed; at first in any case, as others may remember an old count."""
        known = dict.fromkeys((None, *self.camera.zones))
        counts: dict[str | None, Counter[str]] = {place: Counter() for place in (*known, *self._counts)}
        for one in set(self._objects.values()):
            for place, here in one.places.items():
                if here.entered:
                    counts[place][one.label] += 1
        changed = [place for place in counts if counts[place] != self._counts.get(place)]  # 0 in a zone that is gone
        self._counts = {place: counts[place] for place in known}
        return [
            Event(
                kind="count",
                camera=self.name,
                zone=place,
                count=counts[place].total(),
                classes=dict(sorted(counts[place].items())),
            )
            for place in changed
        ]

    def _event(self, kind: Kind, one: _Object, place: str | None, seconds: float | None = None) -> Event:
        return Event(
            kind=kind,
            camera=self.name,
            zone=place,
            object=one.id,
            label=one.label,
            score=round(one.score, 3),
            box=one.box,
            seconds=seconds,
        )


def _beside(line: Line, point: Place) -> float:
    """How far a point lies to the right of a line, in shares of the frame; negative = to the left."""
    (x1, y1), (x2, y2) = line.start, line.end
    dx, dy = x2 - x1, y2 - y1
    return float((dx * (point[1] - y1) - dy * (point[0] - x1)) / np.hypot(dx, dy))  # y points downwards


def _meets(line: Line, before: Place, now: Place) -> bool:
    """Whether a way that ends on the other side of a line led through it, not around its ends."""
    way = Line(start=before, end=now) if before != now else None
    return way is not None and (_beside(way, line.start) > 0) != (_beside(way, line.end) > 0)
