"""What may stand in `cameras.yaml`; `site_file` reads it.

cameras:
  gate:
    source: rtsp://user:${GATE_PASSWORD}@10.0.0.7/stream
    masks: [[[0, 0], [1, 0], [1, 0.2], [0, 0.2]]]
    zones: {drive: {polygon: [[0.1, 0.5], [0.9, 0.5], [0.9, 1], [0.1, 1]], classes: [car, person]}}
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlsplit

import numpy as np

from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT, Focus, Policy
from eventful_det.options import (
    Count,
    NonNegative,
    Positive,
    Range,
    Share,
)
from eventful_det.runtime.session import StreamOptions

Place = tuple[Share, Share]
Area = tuple[Place, ...]
_POINTS = 200  # of a polygon
_FLAT = 1e-9  # twice the area of a triangle, relative to the frame, that counts as a line
_POLICIES: dict[str, Policy] = {"focus": DEFAULT.policy, "frugal": Focus(2.0)}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Objects that count, by their score and by their share of the frame's area; None = as for the others."""

    score: Share | None = None
    min_area: Share | None = None
    max_area: Share | None = None

    def __post_init__(self) -> None:
        if (self.min_area or 0.0) > (1.0 if self.max_area is None else self.max_area):
            raise UserError(f"min_area must be at most max_area, got {self.min_area} and {self.max_area}")

    def admit(self, score: float, area: float) -> bool:
        """Whether an object counts."""
        low, high = self.min_area or 0.0, 1.0 if self.max_area is None else self.max_area
        return score >= (self.score or 0.0) and low <= area <= high


@dataclass(frozen=True, kw_only=True)
class Wanted(Limits):
    """Objects of which classes count; a mapping gives some of these limits of their own. None = all classes."""

    classes: dict[str, Limits] | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.classes or ():
            self.limits(name)  # those of its own may contradict the others

    def limits(self, name: str) -> Limits | None:
        """Those of a class; None where it does not count."""
        if self.classes is None:
            return self
        if name not in self.classes:
            return None
        if not isinstance(self.classes, Mapping):
            return self
        fields = [f.name for f in dataclasses.fields(Limits)]
        own = self.classes[name]
        values = {f: getattr(self, f) if getattr(own, f) is None else getattr(own, f) for f in fields}
        return Limits(**values)


@dataclass(frozen=True, kw_only=True)
class Zone(Wanted):
    """A part of the frame; an object is in it with the middle of its box's lower side."""

    polygon: Area

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_polygon(self.polygon, "polygon")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line to cross: "in" is from the left of somebody who looks from its start to its end, "out" the other way."""

    start: Place
    end: Place
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.start == self.end:
            raise UserError("start and end must be two points")


@dataclass(frozen=True, kw_only=True)
class Camera(Wanted):
    """One camera.

    Attributes:
        source: an address, a file that is played over and over, the number of a webcam, or synthetic:SEED.
        fps: frames per second that are looked at, at most; null = as many as there is time for.
        short_side: of the network's input in pixels; null = the model's own.
        priority: a camera of priority 2 gets as much of the budget as two others.
        policy: how tokens are ranked; null = as the budget has it.
        hold: run on every n-th frame, boxes move in between; auto = by budget.
        masks: polygons in which nothing is looked for.
        zones, lines: by name.
        stay: seconds after which an object that is still there has stayed.
        gone: seconds without an object after which it has left.
        record: keep snapshots and clips of events.
    """

    source: str | Annotated[int, Range(0)]
    fps: Positive | None = None
    short_side: Annotated[int, Range(32, 16384)] | None = None
    priority: Annotated[float, Range(0.001, 1000)] = 1.0
    policy: Literal["focus", "frugal"] | None = None
    hold: Count | Literal["auto", "adaptive"] = "auto"
    masks: tuple[Area, ...] = ()
    zones: dict[str, Zone] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    score: Share | None = 0.5
    stay: Positive = 10.0
    gone: Positive = 2.0
    record: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "":
            raise UserError("source must not be empty")
        if both := sorted(set(self.zones) & set(self.lines)):
            raise UserError(f"{both[0]} is the name of a zone and of a line; give one of them another")
        for i, mask in enumerate(self.masks):
            _check_polygon(mask, f"masks[{i}]")

    def fixed(self) -> tuple[object, ...]:
        """What cannot change without the stream beginning anew."""
        return self.source, self.fps, self.short_side, self.hold

    def stream_options(self) -> StreamOptions:
        """What can."""
        policy = None if self.policy is None else _POLICIES[self.policy]
        return StreamOptions(policy, self.priority, self.masks)


@dataclass(frozen=True, kw_only=True)
class Mqtt:
    """A broker. `prefix` begins all topics; `discovery` is that of Home Assistant, null = none."""

    host: str
    port: Annotated[int, Range(1, 65535)] = 1883
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    prefix: str = "eventful"
    discovery: str | None = "homeassistant"

    def __post_init__(self) -> None:
        try:
            importlib.import_module("paho.mqtt.enums")  # told before anything is begun; new in version 2
        except ImportError:
            raise UserError("it needs the package paho-mqtt: pip install 'paho-mqtt>=2'") from None
        try:
            sound = re.fullmatch(r"[\w:.%-]+", self.host) and self.host.encode("idna")
        except UnicodeError:
            sound = None
        if not sound:
            raise UserError("host must be the name or the address of a computer; port is an option of its own")
        if self.password is not None and self.user is None:
            raise UserError("give user as well as password")
        for name in ("prefix", "discovery"):
            topic = getattr(self, name)
            if topic is not None and not (len(topic) <= 200 and re.fullmatch(r"[\w-]+(/[\w-]+)*", topic)):
                raise UserError(f"{name} must be a topic of letters, digits, - and /, 200 at most, got {topic[:99]!r}")


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """An address that events are posted to, signed with the secret (HMAC-SHA256)."""

    url: str = field(repr=False)
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.hostname and parts.port != 0 and re.fullmatch("[!-~]+", self.url)
        except ValueError:
            sound = False
        if not re.match("https?://", self.url):
            raise UserError("url must begin with http:// or https://")
        if not sound:
            raise UserError("url must name a host, and hold no blanks")
        if len(self.secret) < 16:
            raise UserError("secret must have 16 characters or more")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """How long clips are kept, in days and in megabytes of one camera; seconds of them around events."""

    days: Positive = 14.0
    megabytes: Positive = 2000.0
    before: NonNegative = 4.0
    after: NonNegative = 6.0
    longest: Positive = 300.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """All cameras, and where their events go.

    Attributes:
        folder: for events and clips; relative to the file.
        journal: megabytes of events that are kept for whoever cannot be reached.
    """

    cameras: dict[str, Camera]
    folder: str = "cameras"
    journal: Annotated[float, Range(0.001, 1e6)] = 64.0
    clips: Clips = Clips()
    mqtt: Mqtt | None = None
    webhook: Webhook | None = None

    def __post_init__(self) -> None:
        for name, camera in self.cameras.items():
            for zone in camera.zones:
                if (both := f"{name}_zones_{zone}") in self.cameras:  # one sensor of Home Assistant for two
                    raise UserError(f"a camera must not be called {both}; that is zone {zone} of {name}")


def _check_polygon(polygon: Area, name: str) -> None:
    if not 3 <= len(set(polygon)) <= _POINTS:
        raise UserError(f"{name} needs 3 to {_POINTS} different points, got {len(set(polygon))}")
    start = np.array([point for i, point in enumerate(polygon) if point != polygon[i - 1]], np.float64)  # (n, 2)
    edge, beside = np.roll(start, -1, axis=0) - start, start - start[:, None]  # (n, 2), (edges, points, 2)
    turn = edge[:, :1] * beside[..., 1] - edge[:, 1:] * beside[..., 0]
    side = np.where(np.abs(turn) < _FLAT, 0.0, np.sign(turn))  # of each edge, on which each point lies
    if not side.any():
        raise UserError(f"all points of {name} lie on one line")
    along = (edge[:, None] * beside).sum(axis=2) / (edge**2).sum(axis=1, keepdims=True)
    own = np.eye(len(start)) + np.roll(np.eye(len(start)), 1, axis=1)  # the two ends of an edge
    touched = (side == 0) & (along >= 0) & (along <= 1) & (own == 0)
    split = side * np.roll(side, -1, axis=1) < 0  # one edge has its ends on two sides of another
    if touched.any() or (split & split.T).any():
        raise UserError(f"{name} crosses or touches itself; give its points in the order of its border")
