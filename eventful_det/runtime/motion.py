"""Boxes that move with their objects between key frames, by dense optical flow on a small grey picture.

::

    mover = BoxMover()
    detections = mover.key(image, detections)  # the network ran on this frame
    detections = mover.held(next_image)  # it did not run on this one

One flow field (DIS, Kroeger et al., ECCV 2016) serves all boxes, so the time hardly grows with their number. Points in
each box tell how it moves and grows (MedianFlow, Kalal et al., ICPR 2010); a point counts if the flow back leads to
where it came from. Points outside of all boxes tell how the camera moves, which carries boxes
that cannot be followed. On a key
frame a box that was moved hands its track id to the detection that overlaps it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from eventful_det.data.transforms import fit_size
from eventful_det.detectors.results import Detections
from eventful_det.errors import UserError

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]

_POINTS = 7  # along each side of a box
_CAMERA_POINTS = 10  # along each side of the frame
_INSET = 0.15  # of a box's side has no points: there is mostly background
_LEAST = 0.3  # share of a box's points that have to come back, or nothing is known of it
_OWN = 0.25  # share of a box's points that have to leave the camera's motion, or the box goes with the camera
_GROWTH = 1.1  # at most, from one frame to the next


@dataclass(frozen=True)
class MotionOptions:
    """How boxes are followed.

    Attributes:
        short_side: of the grey picture that is looked at, in pixels.
        error: largest distance in pixels of that picture between a point and where the way back leads.
        moving: a point moves by itself if it leaves the camera's motion by more than so many pixels.
        decay: factor of the score for each frame on which a box could not be followed.
        inside: least share of a box's area that is still in the frame; with less it is dropped.
        overlap: least intersection over union with a box of the same class that hands its track id on.
    """

    short_side: int = 240
    error: float = 1.0
    moving: float = 0.5
    decay: float = 0.9
    inside: float = 0.3
    overlap: float = 0.3


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


class BoxMover:
    """Moves the boxes of one stream, whose frames come in order.

    Attributes:
        quality: score-weighted share of the boxes that were followed on the last held frame; 1 on a key frame.
        motion: score-weighted mean distance that boxes went since the key frame, in their own sizes.
    """

    def __init__(self, options: MotionOptions | None = None) -> None:
        self.options = options or MotionOptions()
        self.quality, self.motion = 1.0, 0.0
        self._field = FlowField()
        self._boxes: Detections | None = None
        self._next_track = 0

    def key(self, image: Picture, found: Detections) -> Detections:
        """Begin anew from what was detected on a frame `(h, w, 3)`: the same detections, with track ids."""
        if self._boxes is None:
            self._field.look(grey_picture(image, self.options.short_side))
        else:
            self.held(image)  # moved to this frame, boxes overlap the detections of their objects
        self._boxes = dataclasses.replace(found, tracks=self._tracks(found))
        self.quality, self.motion = 1.0, 0.0
        return self._boxes.clone()

    def forget(self) -> None:
        """Forget the boxes: another scene begins. Track ids go on."""
        self._boxes = None

    def held(self, image: Picture) -> Detections:
        """The boxes on the next frame `(h, w, 3)`, on which the network does not run; those that left it are gone."""
        assert self._boxes is not None, "key() comes first"
        grey = grey_picture(image, self.options.short_side)
        self._field.look(grey)
        scale = image.shape[0] / grey.shape[0]
        boxes, scores = self._boxes.boxes.cpu().numpy() / scale, self._boxes.scores.cpu().numpy()
        moved, followed = move_boxes(self._field, boxes, self.options)
        gone = (moved - boxes).reshape(-1, 2, 2).mean(1)  # (n, 2), of the centres
        weight = scores / max(float(scores.sum()), 1e-6)
        self.quality = float((weight * followed).sum()) if len(scores) else 1.0
        self.motion += float((weight * np.linalg.norm(gone, axis=1) / np.maximum(_sides(boxes), 1)).sum())
        return self._arrived(torch.from_numpy(moved * scale), torch.from_numpy(followed), image.shape[:2])

    def _tracks(self, found: Detections) -> Tensor:
        """Track ids `(n,)` of detections: those of the moved boxes of their objects, or new ones."""
        tracks = torch.full_like(found.labels, -1)
        if self._boxes is not None and self._boxes.tracks is not None:
            before = same_objects(found, self._boxes, self.options.overlap)
            tracks[before >= 0] = self._boxes.tracks[before[before >= 0]]
        new = (tracks < 0).nonzero().squeeze(1)
        tracks[new] = torch.arange(self._next_track, self._next_track + len(new), device=tracks.device)
        self._next_track += len(new)
        return tracks

    def _arrived(self, boxes: Tensor, followed: Tensor, size: tuple[int, ...]) -> Detections:
        """The boxes `(n, 4)` in a frame of `size`, best first, without those that left it."""
        assert self._boxes is not None
        boxes, followed = boxes.to(self._boxes.boxes), followed.to(self._boxes.boxes.device)
        clipped = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([size[1], size[0]] * 2))
        scores = torch.where(followed, self._boxes.scores, self.options.decay * self._boxes.scores)
        order = scores.argsort(descending=True, stable=True)
        order = order[(_areas(clipped) >= self.options.inside * _areas(boxes))[order]]
        moved = dataclasses.replace(self._boxes, boxes=boxes, scores=scores).map(lambda tensor: tensor[order])
        self._boxes = moved  # as they are: what is cut off at the border comes back with its object
        return dataclasses.replace(moved.clone(), boxes=clipped[order])


class FlowField:
    """Optical flow between the last two pictures of a stream, forth and back."""

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._before: Picture | None = None
        self._flows: tuple[Array, Array] | None = None

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
        returned = shift + _sampled(back, points + shift)
        end, (height, width) = points + shift, self.size
        inside = (end >= 0).all(-1) & (end[..., 0] < width) & (end[..., 1] < height)
        return Flow(points, shift, inside & (np.abs(returned).max(-1) < error))


def grey_picture(image: Picture, short_side: int) -> Picture:
    """A grey picture with `short_side` pixels along its short side, from RGB `(h, w, 3)`."""
    height, width = fit_size(image.shape[0], image.shape[1], short_side, 4 * short_side)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA))


def move_boxes(field: FlowField, boxes: Array, options: MotionOptions) -> tuple[Array, NDArray[np.bool_]]:
    """Move boxes from the last but one picture of a field to the last.

    Args:
        field: of the two pictures.
        boxes: `(n, 4)` xyxy in their pixels.
        options: how.

    Returns:
        The boxes `(n, 4)` in the last picture, and which `(n,)` of them could be followed.
    """
    height, width = field.size
    frame = np.array([[0, 0, width, height]], np.float32)
    camera = camera_motion(field.at(_grid(frame, _CAMERA_POINTS)[0], options.error), boxes)
    visible = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    flow = field.at(_grid(visible, _POINTS), options.error)  # (n, points, 2)
    by_camera = flow.start @ camera[:, :2].T + camera[:, 2] - flow.start
    own = flow.sure & (np.abs(flow.shift - by_camera).max(-1) > options.moving)
    moves = own.sum(1) > _OWN * np.maximum(flow.sure.sum(1), 1)
    used = np.where(moves[:, None], own, flow.sure)  # an object that moves: leave out the background beside it
    followed = used.mean(1) > _LEAST
    shift = _median(flow.shift, used)
    mirrored = slice(None, None, -1)  # each point and the one across the centre tell how far apart the box grows
    apart = np.linalg.norm(flow.start - flow.start[:, mirrored], axis=-1)
    later = np.linalg.norm((flow.start + flow.shift) - (flow.start + flow.shift)[:, mirrored], axis=-1)
    pairs = used & used[:, mirrored] & (apart > 0)
    growth = _median((later / np.maximum(apart, 1e-6))[..., None], pairs)[:, 0]
    growth = np.where(pairs.sum(1) > 2, np.clip(growth, 1 / _GROWTH, _GROWTH), 1)
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    zoom = np.sqrt(max(float(np.linalg.det(camera[:, :2])), 1e-6))
    centre = np.where(followed[:, None], centre + shift, centre @ camera[:, :2].T + camera[:, 2])
    half = half * np.where(followed, growth, zoom)[:, None]
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32), followed


def camera_motion(flow: Flow, boxes: Array) -> Array:
    """The similarity `(2, 3)` by which the camera moved, from points `(p, 2)`, those outside of all boxes if enough."""
    x, y = flow.start[:, :1], flow.start[:, 1:]
    inside = ((x >= boxes[:, 0]) & (x <= boxes[:, 2]) & (y >= boxes[:, 1]) & (y <= boxes[:, 3])).any(axis=1)
    outside = flow.sure & ~inside
    use = outside if outside.sum() > len(outside) / 10 else flow.sure
    if use.sum() >= 3:
        start, end = flow.start[use], flow.start[use] + flow.shift[use]
        found, _ = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=1.0, maxIters=50)
        if found is not None:
            return np.asarray(found, np.float32)
    return np.eye(2, 3, dtype=np.float32)


def _grid(boxes: Array, side: int) -> Array:
    """`side` x `side` points evenly in the inner part of each box `(n, 4)`: `(n, side^2, 2)`, row by row."""
    place = np.linspace(_INSET, 1 - _INSET, side, dtype=np.float32)
    share = np.stack(np.meshgrid(place, place), axis=-1).reshape(1, -1, 2)  # (1, side^2, 2)
    return boxes[:, None, :2] + share * (boxes[:, None, 2:] - boxes[:, None, :2])


def _sampled(field: Array, points: Array) -> Array:
    """Values of a field `(h, w, 2)` at points `(..., 2)`, bilinear; beyond the border those of the border."""
    if not points.size:
        return np.zeros_like(points)
    x, y = points.reshape(-1, 1, 2)[..., 0], points.reshape(-1, 1, 2)[..., 1]
    values = [
        cv2.remap(field, x[i : i + 16384], y[i : i + 16384], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for i in range(0, len(x), 16384)  # remap takes at most 32,767 rows
    ]
    return np.concatenate(values).reshape(points.shape).astype(np.float32)


def _median(values: Array, used: NDArray[np.bool_]) -> Array:
    """Lower median of the values `(n, p, c)` that are used `(n, p)`: `(n, c)`; of none, 0."""
    ordered = np.sort(np.where(used[..., None], values, np.inf), axis=1)
    middle = np.maximum(used.sum(1) - 1, 0) // 2
    picked = np.take_along_axis(ordered, middle[:, None, None], axis=1)[:, 0]
    return np.where(np.isfinite(picked), picked, 0).astype(np.float32)


def same_objects(found: Detections, moved: Detections, overlap: float) -> Tensor:
    """For each of n detections the moved box of its object `(n,)`: each other's best of a class; -1 = a new object."""
    if not len(found) or not len(moved):
        return torch.full_like(found.labels, -1)
    likeness = box_iou(found.boxes, moved.boxes) * (found.labels[:, None] == moved.labels)
    best, there = likeness.max(1)
    mutual = (best >= overlap) & (likeness.argmax(0)[there] == torch.arange(len(found), device=there.device))
    return torch.where(mutual, there, -1)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def _sides(boxes: Array) -> Array:
    return np.sqrt(np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 0))


@dataclass(frozen=True)
class KeyFrames:
    """When the network runs again.

    Attributes:
        every: at most so many frames from one key frame to the next; 1 = on every frame.
        motion: it runs earlier when boxes went so far since the last key frame, in their own sizes (score-weighted
            mean): a box that is moved keeps its shape, and fast objects change theirs.
        quality: it runs earlier when a smaller share of the boxes than this could be followed.
    """

    every: int = 4
    motion: float = 0.8
    quality: float = 0.5

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"hold must be at least 1 (= every frame), got {self.every}")

    @staticmethod
    def each(every: int) -> KeyFrames:
        """Every n-th frame, whatever moves."""
        return KeyFrames(every, math.inf, 0.0)

    def early(self, mover: BoxMover) -> bool:
        """Whether to run before it is time, by how the boxes went on the last frame."""
        return mover.motion > self.motion or mover.quality < self.quality
