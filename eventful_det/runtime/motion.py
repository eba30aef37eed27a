"""Boxes that move with their objects between key frames, by optical flow of a few points on a small grey picture.

::

    mover = BoxMover()
    mover.move(image)  # every frame, in order
    detections = mover.key(detections)  # the network ran on it
    mover.move(next_image)
    detections = mover.boxes()  # it did not run on this one

Points in each box tell how it moves and grows (MedianFlow, Kalal et al., ICPR 2010), by pyramidal Lucas-Kanade; a point
counts if the way back leads to where it came from. There are so many points in all, however many boxes there are.
Points outside of all boxes tell how the camera moves, which carries boxes that cannot be followed,
and whether something new comes. On a key frame a moved box and the detection of its object become one, which keeps the
track id; an object that the network misses once lives on with a lower score.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from eventful_det.data.video.transforms import fit_size
from eventful_det.detectors.results import Detections
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import AnyRule

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Picture = NDArray[np.uint8]

_INSET = 0.15  # of a box's side has no points: there is mostly background
_LEAST = 0.3  # share of a box's points that have to come back, or nothing is known of it
_OWN = 0.25  # share of a box's points that have to leave the camera's motion, or the box goes with the camera
_GROWTH = 1.1  # at most, from one frame to the next
_GONE = 0.05  # score below which a box that the network does not find again is dropped
_FLAT = 4.0  # standard deviation of grey levels below which there is no contrast
_SURE = 0.3  # score of boxes whose motion is nothing new


_POINTS = 400  # in all boxes together, unless there are more than a hundred of them


def _square(side: int) -> Array:
    """`side` x `side` places evenly in the inner part of the unit square, `(side^2, 2)`, row by row."""
    place = np.linspace(_INSET, 1 - _INSET, side, dtype=np.float32)
    return np.stack(np.meshgrid(place, place), axis=-1).reshape(-1, 2)


_BOX_POINTS = {side: _square(side) for side in range(2, 8)}
_CAMERA_POINTS = _square(8)  # in the frame
_WINDOW, _LEVELS = (9, 9), 3  # of Lucas-Kanade
_UNTIL = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 8, 0.05)


@dataclass(frozen=True)
class MotionOptions:
    """How boxes are followed.

    Attributes:
        short_side: of the grey picture that is looked at, in pixels.
        error: largest distance in pixels of that picture between a point and where the way back leads.
        moving: a point moves by itself if it leaves the camera's motion by more than so many pixels.
        decay: factor of the score for each frame on which a box could not be followed.
        inside: least share of a box's area that is still in the frame; with less it is dropped.
        overlap: least intersection over union of a moved box and the detection of its object, of the same class.
        rise, fall: how much of a change of an object's score counts at once, upwards and downwards.
        blend: weight of the detection's box where it becomes one with a moved box.
        keep: factor of the score of an object that the network does not find again; 0 = it is gone ...
        alike: ... as it is where boxes look less than this as they did on the key frame: frames are too far apart.
    """

    short_side: int = 160
    error: float = 1.0
    moving: float = 0.5
    decay: float = 0.9
    inside: float = 0.3
    overlap: float = 0.3
    rise: float = 0.7
    fall: float = 0.4
    blend: float = 0.8
    keep: float = 0.7
    alike: float = 0.65


class Flow(NamedTuple):
    """How points moved from one picture to the next; leading dimensions are boxes and points of a box.

    Attributes:
        start: `(..., 2)` where they were, in pixels.
        shift: `(..., 2)` how far they went.
        sure: `(...)` whether the way back leads to where they were.
    """

    start: Array
    shift: Array
    sure: NDArray[np.bool_]


class View(NamedTuple):
    """A frame as movers see it.

    Attributes:
        size: height and width of the frame.
        grey: the small picture.
    """

    size: tuple[int, int]
    grey: Picture


class _Objects(NamedTuple):
    """What is followed, best first.

    Attributes:
        boxes: `(n, 4)` in pixels of the frame.
        scores, labels, tracks: `(n,)`.
        looks: `(n, p)` grey levels at points of the boxes on the key frame.
    """

    boxes: Array
    scores: Array
    labels: Indices
    tracks: Indices
    looks: Array

    def where(self, chosen: NDArray[Any]) -> _Objects:
        """Those that a mask or indices pick."""
        return _Objects(*(values[chosen] for values in self))


class BoxMover:
    """Moves the boxes of one stream, whose frames come in order.

    Attributes:
        quality: how much boxes still look as they did on the key frame: score-weighted mean correlation, 0 to 1.
        novelty: share of the points outside of all boxes that move by themselves now and did not on the key frame.
    """

    def __init__(self, options: MotionOptions | None = None) -> None:
        self.options = options or MotionOptions()
        self.quality, self.novelty = 1.0, 0.0
        self._flow = PointFlow()
        self._size = (0, 0)  # of the last frame
        self._objects: _Objects | None = None
        self._device = torch.device("cpu")
        self._restless: float | None = None  # share of points that moved by themselves on the key frame
        self._next_track = 0

    def forget(self) -> None:
        """Forget the boxes: another scene begins. Track ids go on."""
        self._objects, self._flow = None, PointFlow()

    def fork(self) -> BoxMover:
        """Another mover that is as far, and goes on by itself."""
        other = copy.copy(self)
        other._flow = copy.copy(self._flow)
        return other

    @property
    def following(self) -> bool:
        """Whether there are boxes of a key frame, if only none."""
        return self._objects is not None

    def move(self, image: Picture) -> None:
        """Go on to the next frame `(h, w, 3)`; boxes move with their objects, and those that leave it are gone."""
        self.follow(self.view(image))

    def view(self, image: Picture) -> View:
        """All that movers look at of a frame `(h, w, 3)`."""
        return View((image.shape[0], image.shape[1]), grey_picture(image, self.options.short_side))

    def follow(self, view: View) -> None:
        """As `move`, by what `view` made of the frame."""
        self._size, grey = view
        self._flow.look(grey)
        if self._objects is None:
            return  # nothing to move yet
        before, scale = self._objects, self._size[0] / grey.shape[0]
        boxes = before.boxes / np.float32(scale)
        moved = move_boxes(self._flow, boxes, before.scores, self.options)
        weight = before.scores / max(float(before.scores.sum()), 1e-6)
        likeness = _correlation(before.looks, self._flow.looks(moved.boxes))
        self.quality = float((weight * likeness).sum()) if len(weight) else 1.0
        self._restless = moved.restless if self._restless is None else self._restless
        self.novelty = max(0.0, moved.restless - self._restless)
        scores = np.where(moved.followed, before.scores, np.float32(self.options.decay) * before.scores)
        self._objects = self._staying(before._replace(boxes=moved.boxes * np.float32(scale), scores=scores))

    def boxes(self) -> Detections:
        """The boxes on the last frame, best first, in its pixels."""
        assert self._objects is not None, "key() comes first"
        found = self._objects
        values = self._clipped(found.boxes), found.scores, found.labels, found.tracks
        return Detections(*(torch.from_numpy(value.copy()).to(self._device) for value in values))

    def key(self, found: Detections) -> Detections:
        """Take in what was detected on the last frame: one with the boxes that moved there, and with track ids."""
        self._device = found.boxes.device
        boxes, scores, labels = (v.detach().cpu().numpy() for v in (found.boxes, found.scores, found.labels))
        tracks = np.full(len(labels), -1, np.int64)
        nothing = np.zeros((len(labels), 0), np.float32)
        new = _Objects(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), tracks, nothing)
        merged = self._merged(new, self._objects)
        scale = np.float32(self._flow.size[0] / self._size[0])
        self._objects = merged._replace(looks=self._flow.looks(merged.boxes * scale))
        self.quality, self.novelty, self._restless = 1.0, 0.0, None
        return self.boxes()

    def _merged(self, new: _Objects, old: _Objects | None) -> _Objects:
        """Detections and the moved boxes of the same frame as one list."""
        options = self.options
        if old is not None and len(old.scores):
            overlap = overlaps(new.boxes, self._clipped(old.boxes)) * (new.labels[:, None] == old.labels)
            here, there = _mutual(overlap, options.overlap)
            tracks, scores, boxes = new.tracks.copy(), new.scores.copy(), new.boxes.copy()
            tracks[here] = old.tracks[there]
            change = new.scores[here] - old.scores[there]
            scores[here] = old.scores[there] + np.where(change > 0, options.rise, options.fall) * change
            boxes[here] += np.float32(1 - options.blend) * (self._clipped(old.boxes[there]) - boxes[here])
            keep = np.float32(options.keep if self.quality >= options.alike else 0)
            missed = ~np.isin(np.arange(len(old.scores)), there) & (keep * old.scores >= _GONE)
            missed &= overlap.max(axis=0, initial=0) < 0.5  # of an object that was found there is one box
            lost = old.where(missed)._replace(scores=keep * old.scores[missed])
            new = _Objects(
                np.concatenate([boxes, lost.boxes]),
                np.concatenate([scores, lost.scores]),
                np.concatenate([new.labels, lost.labels]),
                np.concatenate([tracks, lost.tracks]),
                np.zeros((len(tracks) + len(lost.tracks), 0), np.float32),
            )
            new = new.where(np.argsort(-new.scores, kind="stable"))
        nameless = np.flatnonzero(new.tracks < 0)
        new.tracks[nameless] = np.arange(self._next_track, self._next_track + len(nameless))
        self._next_track += len(nameless)
        return new

    def _staying(self, objects: _Objects) -> _Objects:
        """Those that did not leave the frame, as they are: what is cut off at its border comes back with its object."""
        left = _areas(self._clipped(objects.boxes)) >= self.options.inside * _areas(objects.boxes)
        order = np.argsort(-objects.scores, kind="stable")
        return objects.where(order[left[order]])

    def _clipped(self, boxes: Array) -> Array:
        height, width = self._size
        return np.clip(boxes, 0, np.array([width, height] * 2, np.float32))


class PointFlow:
    """Where points went between the last two pictures of a stream: pyramidal Lucas-Kanade, forth and back."""

    def __init__(self) -> None:
        self._before: Picture | None = None
        self._now: Picture | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last picture."""
        assert self._now is not None
        return self._now.shape[0], self._now.shape[1]

    def look(self, picture: Picture) -> None:
        """Go on to the next picture `(h, w)`."""
        self._before, self._now = self._now, picture

    def at(self, points: Array, error: float) -> Flow:
        """How points `(p, 2)` moved; sure if the way back leads to within `error` pixels of them."""
        before, now = self._before, self._now
        if before is None or now is None or before.shape != now.shape or not len(points):
            return Flow(points, np.zeros_like(points), np.zeros(len(points), bool))
        start = points[:, None]
        end, there = _follow(before, now, start)
        again, back = _follow(now, before, end)
        end, returned = end[:, 0], again[:, 0] - points
        x, y = end[:, 0], end[:, 1]
        inside = (x >= 0) & (y >= 0) & (x < self.size[1]) & (y < self.size[0])
        sure = inside & (there[:, 0] > 0) & (back[:, 0] > 0) & (_largest(returned) < error)
        return Flow(points, end - points, sure)

    def looks(self, boxes: Array) -> Array:
        """Grey levels of the last picture at points of boxes `(n, 4)` in its pixels: `(n, p)`."""
        assert self._now is not None
        if not len(boxes):
            return np.zeros((0, len(_BOX_POINTS[7])), np.float32)
        at = boxes[:, None, :2] + _BOX_POINTS[7] * (boxes[:, None, 2:] - boxes[:, None, :2])  # (n, p, 2)
        x, y = np.ascontiguousarray(at[..., 0]), np.ascontiguousarray(at[..., 1])
        return cv2.remap(self._now, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)


def grey_picture(image: Picture, short_side: int) -> Picture:
    """A grey picture with `short_side` pixels along its short side, from RGB `(h, w, 3)`."""
    height, width = fit_size(image.shape[0], image.shape[1], short_side, 4 * short_side)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    way = cv2.INTER_AREA if height < image.shape[0] / 2 else cv2.INTER_LINEAR  # areas take six times as long
    return np.asarray(cv2.resize(grey, (width, height), interpolation=way))


class Moved(NamedTuple):
    """Boxes `(n, 4)` in the next picture, which `(n,)` could be followed, share of other points that move."""

    boxes: Array
    followed: NDArray[np.bool_]
    restless: float


def move_boxes(flows: PointFlow, boxes: Array, scores: Array, options: MotionOptions) -> Moved:
    """Move boxes `(n, 4)`, xyxy with scores `(n,)`, from the last but one picture to the last."""
    height, width = flows.size
    size = np.array([width, height], np.float32)
    visible = np.clip(boxes, 0, np.tile(size, 2))
    places = _BOX_POINTS[min(7, max(2, math.isqrt(_POINTS // max(1, len(boxes)))))]
    inner = visible[:, None, :2] + places * (visible[:, None, 2:] - visible[:, None, :2])  # (n, points, 2)
    everywhere = _CAMERA_POINTS * size
    count = len(everywhere)
    start, shift, sure = flows.at(np.concatenate([everywhere, inner.reshape(-1, 2)]), options.error)
    seen = Flow(start[:count], shift[:count], sure[:count])
    flow = Flow(inner, shift[count:].reshape(inner.shape), sure[count:].reshape(inner.shape[:2]))
    camera = camera_motion(seen, boxes)
    own = _leaves(flow, camera, options.moving)
    moves = own.sum(1) > _OWN * np.maximum(flow.sure.sum(1), 1)
    used = np.where(moves[:, None], own, flow.sure)  # an object that moves: leave out the background beside it
    followed = used.mean(1) > _LEAST
    end = flow.start + flow.shift
    mirrored = slice(None, None, -1)  # each point and the one across the centre tell how far apart the box grows
    apart, later = (np.hypot(*np.moveaxis(at - at[:, mirrored], -1, 0)) for at in (flow.start, end))
    pairs = used & used[:, mirrored] & (apart > 0)
    growth = _median((later / np.maximum(apart, 1e-6))[..., None], pairs)[:, 0]
    growth = np.where(pairs.sum(1) > 2, np.clip(growth, 1 / _GROWTH, _GROWTH), 1)
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    zoom = math.sqrt(max(float(np.linalg.det(camera[:, :2])), 1e-6))
    by_camera = centre @ camera[:, :2].T + camera[:, 2]
    centre = np.where(followed[:, None], centre + _median(flow.shift, used), by_camera)
    half = half * np.where(followed, growth, zoom)[:, None]
    outside = ~_inside(seen.start, boxes[scores >= _SURE])
    restless = float((_leaves(seen, camera, 2 * options.moving) & outside).mean())
    return Moved(np.concatenate([centre - half, centre + half], axis=1).astype(np.float32), followed, restless)


def camera_motion(flow: Flow, boxes: Array) -> Array:
    """The similarity `(2, 3)` by which the camera moved, from points `(p, 2)`, those outside of all boxes if enough."""
    outside = flow.sure & ~_inside(flow.start, boxes)
    use = outside if outside.sum() > len(outside) / 10 else flow.sure
    if use.sum() >= 3:
        start, end = flow.start[use], flow.start[use] + flow.shift[use]
        found, _ = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=1.0, maxIters=50)
        if found is not None:
            return np.asarray(found, np.float32)
    return np.eye(2, 3, dtype=np.float32)


def _leaves(flow: Flow, camera: Array, pixels: float) -> NDArray[np.bool_]:
    """Which points leave the camera's motion `(2, 3)` by more than so many pixels."""
    by_camera = flow.start @ camera[:, :2].T + camera[:, 2] - flow.start
    return np.asarray(flow.sure & (_largest(flow.shift - by_camera) > pixels))


def _inside(points: Array, boxes: Array) -> NDArray[np.bool_]:
    """Which points `(p, 2)` lie in one of the boxes `(n, 4)`."""
    x, y = points[:, :1], points[:, 1:]
    within = (x >= boxes[:, 0]) & (y >= boxes[:, 1]) & (x <= boxes[:, 2]) & (y <= boxes[:, 3])  # (p, n)
    return np.asarray(within.any(axis=1))


def _largest(shift: Array) -> Array:
    """The larger of the lengths along x and y of shifts `(..., 2)`."""
    return np.asarray(np.maximum(np.abs(shift[..., 0]), np.abs(shift[..., 1])))


def _follow(start: Picture, end: Picture, points: Array) -> tuple[Array, NDArray[np.uint8]]:
    """Where points `(p, 1, 2)` of a picture are in another one, and which `(p, 1)` were found."""
    unknown = np.zeros_like(points)  # as it is not used
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        start, end, points, unknown, winSize=_WINDOW, maxLevel=_LEVELS - 1, criteria=_UNTIL
    )
    return np.asarray(there, np.float32), np.asarray(found, np.uint8)


def _median(values: Array, used: NDArray[np.bool_]) -> Array:
    """Lower median of the values `(n, p, c)` that are used `(n, p)`: `(n, c)`; of none, 0."""
    ordered = np.sort(np.where(used[..., None], values, np.inf), axis=1)
    middle = np.maximum(used.sum(1) - 1, 0) // 2
    picked = np.take_along_axis(ordered, middle[:, None, None], axis=1)[:, 0]
    return np.where(np.isfinite(picked), picked, 0).astype(np.float32)


def _correlation(a: Array, b: Array) -> Array:
    """Correlation of grey levels `(n, p)`, row by row, at least 0: `(n,)`. What has no contrast looks like anything."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    energy = (a * a).mean(1), (b * b).mean(1)
    alike = (a * b).mean(1) / np.sqrt(np.maximum(energy[0] * energy[1], 1e-6))
    return np.where(np.maximum(*energy) < _FLAT**2, 1, np.maximum(alike, 0)).astype(np.float32)


def overlaps(a: Array, b: Array) -> Array:
    """Intersection over union of boxes `(n, 4)` and `(m, 4)`, `(n, m)`."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    sides = np.maximum(high - low, 0)
    both = sides[..., 0] * sides[..., 1]
    return np.asarray(both / np.maximum(_areas(a)[:, None] + _areas(b) - both, 1e-9), np.float32)


def _mutual(likeness: Array, least: float) -> tuple[Indices, Indices]:
    """Rows and columns `(k,)` of a matrix that are each other's best, of at least so much."""
    if not likeness.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    there = likeness.argmax(1)
    here = np.arange(len(there))
    pairs = (likeness[here, there] >= least) & (likeness.argmax(0)[there] == here)
    return here[pairs], there[pairs]


def _areas(boxes: Array) -> Array:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1], np.float32)


@dataclass(frozen=True)
class KeyFrames:
    """When the network runs again.

    Attributes:
        every: at most so many frames from one key frame to the next; 1 = on every frame.
        quality: it runs earlier when boxes look less than this as they did on the key frame, see `BoxMover`: objects
            turn or were lost.
        novelty: it runs earlier when a larger share of the picture outside of all boxes begins to move.
    """

    every: int = 6
    quality: float = 0.7
    novelty: float = 0.03

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"hold must be at least 1 (= every frame), got {self.every}")

    @staticmethod
    def each(every: int) -> KeyFrames:
        """Every n-th frame, whatever moves."""
        return KeyFrames(every, 0.0, math.inf)

    def early(self, mover: BoxMover) -> bool:
        """Whether to run before it is time, by what became of the boxes."""
        return mover.quality < self.quality or mover.novelty > self.novelty

    @staticmethod
    def of(hold: Hold) -> KeyFrames:
        """What `hold` means: key frames, or the number n of every n-th one; None = the product's choice.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(hold, KeyFrames):
            return hold
        if hold is None:
            return DEFAULT_HOLD
        if isinstance(hold, bool) or not isinstance(hold, int):
            raise UserError(f"hold must be a number of frames, KeyFrames or None, got {hold!r}")
        return KeyFrames.each(hold)


DEFAULT_HOLD = KeyFrames(every=2, quality=0.8)
"""Where nobody says otherwise: every second frame, and every one where boxes cannot be followed."""

Hold = int | KeyFrames | None
"""On which frames the network runs: every n-th, as `KeyFrames` say, or (None) as `DEFAULT_HOLD` and the budget say.

None is every frame where somebody chooses tokens in place of the product: with a `Selector` of one's own, and with the
rules that are there for comparison (`Dense`, `Paper`, `Rows(exact=True)`).
"""

HOLDS = ("auto", "adaptive")
"""Words for `hold` in configs, besides numbers: None, and `KeyFrames()`."""


def hold_for(hold: Hold, rule: AnyRule) -> Hold:
    """`hold` under a rule."""
    compares = isinstance(rule, (Dense, Paper)) or (isinstance(rule, Rows) and rule.exact)
    return 1 if hold is None and compares else hold


def parse_hold(value: int | str) -> Hold:
    """`hold` as written in a config: a number, "auto" or "adaptive"."""
    return {"auto": None, "adaptive": KeyFrames()}[value] if isinstance(value, str) else value
