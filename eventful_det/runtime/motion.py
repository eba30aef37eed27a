"""Boxes that move with their objects between key frames, by dense optical flow on a small grey picture.

::

    mover = BoxMover()
    mover.move(image)  # every frame, in order
    detections = mover.key(detections)  # the network ran on it
    mover.move(next_image)
    detections = mover.boxes()  # it did not run on this one

One flow field (DIS, Kroeger et al., ECCV 2016) serves all boxes, so the time hardly grows with their number. Points in
each box tell how it moves and grows (MedianFlow, Kalal et al., ICPR 2010); a point counts if the flow back leads to
where it came from. Points outside of all boxes tell how the camera moves, which carries boxes that cannot be followed,
and whether something new comes. On a key frame a moved box and the detection of its object become one, which keeps the
track id; an object that the network misses once lives on with a lower score.
"""

from __future__ import annotations

import copy
import dataclasses
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

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Picture = NDArray[np.uint8]

_INSET = 0.15  # of a box's side has no points: there is mostly background
_LEAST = 0.3  # share of a box's points that have to come back, or nothing is known of it
_OWN = 0.25  # share of a box's points that have to leave the camera's motion, or the box goes with the camera
_GROWTH = 1.1  # at most, from one frame to the next
_GONE = 0.05  # score below which a box that the network does not find again is dropped
_SURE = 0.3  # score of boxes whose motion is nothing new


def _square(side: int) -> Array:
    """`side` x `side` places evenly in the inner part of the unit square, `(side^2, 2)`, row by row."""
    place = np.linspace(_INSET, 1 - _INSET, side, dtype=np.float32)
    return np.stack(np.meshgrid(place, place), axis=-1).reshape(-1, 2)


_BOX_POINTS, _CAMERA_POINTS = _square(7), _square(10)  # in each box, in the frame


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
        keep: factor of the score of an object that the network does not find again; 0 = it is gone.
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


class _Objects(NamedTuple):
    """What is followed, best first: boxes `(n, 4)` in pixels of the frame, scores, labels and track ids `(n,)`."""

    boxes: Array
    scores: Array
    labels: Indices
    tracks: Indices

    def where(self, chosen: NDArray[Any]) -> _Objects:
        """Those that a mask or indices pick."""
        return _Objects(*(values[chosen] for values in self))


class BoxMover:
    """Moves the boxes of one stream, whose frames come in order.

    Attributes:
        quality: score-weighted share of the boxes that were followed to the last frame; 1 on a key frame.
        motion: score-weighted mean distance that boxes went since the key frame, in their own sizes.
        novelty: share of the points outside of all boxes that move by themselves now and did not on the key frame.
    """

    def __init__(self, options: MotionOptions | None = None) -> None:
        self.options = options or MotionOptions()
        self.quality, self.motion, self.novelty = 1.0, 0.0, 0.0
        self._field = FlowField()
        self._size = (0, 0)  # of the last frame
        self._objects: _Objects | None = None
        self._device = torch.device("cpu")
        self._restless: float | None = None  # share of points that moved by themselves on the key frame
        self._next_track = 0

    def forget(self) -> None:
        """Forget the boxes: another scene begins. Track ids go on."""
        self._objects, self._field = None, FlowField()

    def fork(self) -> BoxMover:
        """Another mover that is as far, and goes on by itself."""
        other = copy.copy(self)
        other._field = self._field.fork()
        return other

    @property
    def following(self) -> bool:
        """Whether there are boxes of a key frame, if only none."""
        return self._objects is not None

    def move(self, image: Picture) -> None:
        """Go on to the next frame `(h, w, 3)`; boxes move with their objects, and those that leave it are gone."""
        self._size = image.shape[0], image.shape[1]
        grey = grey_picture(image, self.options.short_side)
        self._field.look(grey)
        if self._objects is None:
            return  # nothing to move yet
        before, scale = self._objects, image.shape[0] / grey.shape[0]
        boxes = before.boxes / np.float32(scale)
        moved = move_boxes(self._field, boxes, before.scores, self.options)
        weight = before.scores / max(float(before.scores.sum()), 1e-6)
        gone = np.linalg.norm((moved.boxes - boxes).reshape(-1, 2, 2).mean(1), axis=1)  # of the centres
        self.quality = float((weight * moved.followed).sum()) if len(weight) else 1.0
        self.motion += float((weight * gone / np.maximum(np.sqrt(_areas(boxes)), 1)).sum())
        self._restless = moved.restless if self._restless is None else self._restless
        self.novelty = max(0.0, moved.restless - self._restless)
        scores = np.where(moved.followed, before.scores, np.float32(self.options.decay) * before.scores)
        after = before._replace(boxes=moved.boxes * np.float32(scale), scores=scores)
        # As they are: what is cut off at the border comes back with its object.
        left = _areas(self._clipped(after.boxes)) >= self.options.inside * _areas(after.boxes)
        order = np.argsort(-scores, kind="stable")
        self._objects = after.where(order[left[order]])

    def boxes(self) -> Detections:
        """The boxes on the last frame, best first, in its pixels."""
        assert self._objects is not None, "key() comes first"
        found = self._objects
        clipped = self._clipped(found.boxes)
        return Detections(*(torch.from_numpy(v.copy()).to(self._device) for v in (clipped, *found[1:])))

    def key(self, found: Detections) -> Detections:
        """Take in what was detected on the last frame: one with the boxes that moved there, and with track ids."""
        self._device = found.boxes.device
        boxes, scores, labels = (v.detach().cpu().numpy() for v in (found.boxes, found.scores, found.labels))
        tracks = np.full(len(labels), -1, np.int64)
        new = _Objects(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), tracks)
        self._objects = self._merged(new, self._objects)
        self.quality, self.motion, self.novelty, self._restless = 1.0, 0.0, 0.0, None
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
            missed = ~np.isin(np.arange(len(old.scores)), there) & (options.keep * old.scores >= _GONE)
            missed &= overlap.max(axis=0, initial=0) < 0.5  # of an object that was found there is one box
            lost = old.where(missed)._replace(scores=np.float32(options.keep) * old.scores[missed])
            new = _Objects(
                np.concatenate([boxes, lost.boxes]),
                np.concatenate([scores, lost.scores]),
                np.concatenate([new.labels, lost.labels]),
                np.concatenate([tracks, lost.tracks]),
            )
            new = new.where(np.argsort(-new.scores, kind="stable"))
        nameless = np.flatnonzero(new.tracks < 0)
        new.tracks[nameless] = np.arange(self._next_track, self._next_track + len(nameless))
        self._next_track += len(nameless)
        return new

    def _clipped(self, boxes: Array) -> Array:
        height, width = self._size
        return np.clip(boxes, 0, np.array([width, height] * 2, np.float32))


class FlowField:
    """Optical flow between the last two pictures of a stream, forth and back."""

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._before: Picture | None = None
        self._flows: tuple[Array, Array] | None = None

    def fork(self) -> FlowField:
        """Another field that has seen the same last picture."""
        other = FlowField()
        other._before = self._before
        return other

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last picture."""
        assert self._before is not None
        return self._before.shape[0], self._before.shape[1]

    def look(self, picture: Picture) -> None:
        """Go on to the next picture `(h, w)`."""
        before, self._before = self._before, picture
        if before is None or before.shape != picture.shape:
            self._flows = None
        else:
            self._flows = self._flow(before, picture), self._flow(picture, before)

    def _flow(self, start: Picture, end: Picture) -> Array:
        """How far every pixel of a picture `(h, w)` went, `(h, w, 2)`."""
        return np.asarray(self._dis.calc(start, end, np.zeros((*start.shape, 2), np.float32)), np.float32)

    def at(self, points: Array, error: float) -> Flow:
        """How points `(..., 2)` moved; sure if the way back leads to within `error` pixels of them."""
        if self._flows is None:
            return Flow(points, np.zeros_like(points), np.zeros(points.shape[:-1], bool))
        there, back = self._flows
        shift = _sampled(there, points)
        end = points + shift
        returned = shift + _sampled(back, end)
        x, y = end[..., 0], end[..., 1]  # reductions over pairs take several times as long
        inside = (x >= 0) & (y >= 0) & (x < self.size[1]) & (y < self.size[0])
        return Flow(points, shift, inside & (_largest(returned) < error))


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


def move_boxes(field: FlowField, boxes: Array, scores: Array, options: MotionOptions) -> Moved:
    """Move boxes `(n, 4)`, xyxy with scores `(n,)`, from the last but one picture of a field to the last."""
    height, width = field.size
    size = np.array([width, height], np.float32)
    visible = np.clip(boxes, 0, np.tile(size, 2))
    inner = visible[:, None, :2] + _BOX_POINTS * (visible[:, None, 2:] - visible[:, None, :2])  # (n, points, 2)
    everywhere = _CAMERA_POINTS * size
    count = len(everywhere)
    start, shift, sure = field.at(np.concatenate([everywhere, inner.reshape(-1, 2)]), options.error)
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


def _sampled(field: Array, points: Array) -> Array:
    """Values of a field `(h, w, 2)` at points `(p, 2)`, bilinear; beyond the border those of the border."""
    x, y = np.ascontiguousarray(points[:, :1]), np.ascontiguousarray(points[:, 1:])
    values = [
        cv2.remap(field, x[i : i + 16384], y[i : i + 16384], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for i in range(0, len(x), 16384)  # remap takes at most 32,767 rows
    ]
    return np.asarray(np.concatenate(values).reshape(points.shape), np.float32)


def _median(values: Array, used: NDArray[np.bool_]) -> Array:
    """Lower median of the values `(n, p, c)` that are used `(n, p)`: `(n, c)`; of none, 0."""
    ordered = np.sort(np.where(used[..., None], values, np.inf), axis=1)
    middle = np.maximum(used.sum(1) - 1, 0) // 2
    picked = np.take_along_axis(ordered, middle[:, None, None], axis=1)[:, 0]
    return np.where(np.isfinite(picked), picked, 0).astype(np.float32)


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
        motion: it runs earlier when boxes went so far since the last key frame, in their own sizes (score-weighted
            mean): a box that is moved keeps its shape, and fast objects change theirs.
        quality: it runs earlier when a smaller share of the boxes than this could be followed.
        novelty: it runs earlier when a larger share of the picture outside of all boxes begins to move.
    """

    every: int = 6
    motion: float = 0.2
    quality: float = 0.5
    novelty: float = 0.03

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"hold must be at least 1 (= every frame), got {self.every}")

    @staticmethod
    def each(every: int) -> KeyFrames:
        """Every n-th frame, whatever moves."""
        return KeyFrames(every, math.inf, 0.0, math.inf)

    def early(self, mover: BoxMover) -> bool:
        """Whether to run before it is time, by how the boxes went."""
        return mover.motion > self.motion or mover.quality < self.quality or mover.novelty > self.novelty

    @staticmethod
    def of(hold: Hold) -> KeyFrames:
        """What `hold` means: key frames, or the number n of every n-th one; None = every frame.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(hold, KeyFrames):
            return hold
        if hold is None:
            return dataclasses.replace(KeyFrames(), every=1)
        if isinstance(hold, bool) or not isinstance(hold, int):
            raise UserError(f"hold must be a number of frames, KeyFrames or None, got {hold!r}")
        return KeyFrames.each(hold)


Hold = int | KeyFrames | None
"""On which frames the network runs: every n-th, as `KeyFrames` say, or (None) on as many as the budget allows."""

HOLDS = ("auto", "adaptive")
"""Words for `hold` in configs, besides numbers: as the budget allows, and `KeyFrames()`."""


def parse_hold(value: int | str) -> Hold:
    """`hold` as written in a config: a number, "auto" or "adaptive"."""
    return {"auto": None, "adaptive": KeyFrames()}[value] if isinstance(value, str) else value
