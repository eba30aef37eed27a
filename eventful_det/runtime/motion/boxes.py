"""Boxes that move with their objects between key frames, by the optical flow of a few points on a small grey picture.

::

    mover = BoxMover()
    mover.move(image)  # every frame, in order
    detections = mover.key(detections)  # the network ran on it
    mover.move(next_image)
    detections = mover.boxes()  # it did not run on this one

On a key frame a moved box and the detection of its object become one, which keeps the track id; an object that the
network misses once lives on with a lower score. Unsure boxes use up no ids; see `MotionOptions.start`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from eventful_det.data.boxes import areas, overlaps
from eventful_det.detectors.results import Detections
from eventful_det.runtime.motion.optical_flow import Array, Picture, PointFlow, grey_picture, move_boxes

Indices = NDArray[np.int64]

_GONE = 0.05  # score below which a box that the network does not find again is dropped
_FLAT = 4.0  # standard deviation of grey levels below which there is no contrast


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
        start: least score with which an object gets a track id, which it keeps whatever its score is then.
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
    start: float = 0.25


EVERY_ID = MotionOptions(start=0.0)


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
        scores, labels, tracks: `(n,)`; -1 = no track id yet.
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
        moved = move_boxes(self._flow, boxes, before.scores, self.options.error, self.options.moving)
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
        nameless = np.flatnonzero((new.tracks < 0) & (new.scores >= options.start))
        new.tracks[nameless] = np.arange(self._next_track, self._next_track + len(nameless))
        self._next_track += len(nameless)
        return new

    def _staying(self, objects: _Objects) -> _Objects:
        """Those that did not leave the frame, as they are: what is cut off at its border comes back with its object."""
        left = areas(self._clipped(objects.boxes)) >= self.options.inside * areas(objects.boxes)
        order = np.argsort(-objects.scores, kind="stable")
        return objects.where(order[left[order]])

    def _clipped(self, boxes: Array) -> Array:
        height, width = self._size
        return np.clip(boxes, 0, np.array([width, height] * 2, np.float32))


def _correlation(a: Array, b: Array) -> Array:
    """Correlation of grey levels `(n, p)`, row by row, at least 0: `(n,)`. What has no contrast looks like anything."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    energy = (a * a).mean(1), (b * b).mean(1)
    alike = (a * b).mean(1) / np.sqrt(np.maximum(energy[0] * energy[1], 1e-6))
    return np.where(np.maximum(*energy) < _FLAT**2, 1, np.maximum(alike, 0)).astype(np.float32)


def _mutual(likeness: Array, least: float) -> tuple[Indices, Indices]:
    """Rows and columns `(k,)` of a matrix that are each other's best, of at least so much."""
    if not likeness.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    there = likeness.argmax(1)
    here = np.arange(len(there))
    pairs = (likeness[here, there] >= least) & (likeness.argmax(0)[there] == here)
    return here[pairs], there[pairs]
