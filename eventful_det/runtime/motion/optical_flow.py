"""Where points went from one picture to the next, and boxes with them.

Points in each box tell how it moves and grows (MedianFlow, Kalal et al., ICPR 2010), by pyramidal Lucas-Kanade; a point
counts if the way back leads to where it came from. There are so many points in all, however many boxes there are.
Points outside of all boxes tell how the camera moves, which carries boxes that cannot be followed, and whether
something new comes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.video.transforms import fit_size

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]

_INSET = 0.15  # of a box's side has no points: there is mostly background
_LEAST = 0.3  # share of a box's points that have to come back, or nothing is known of it
_OWN = 0.25  # share of a box's points that have to leave the camera's motion, or the box goes with the camera
_GROWTH = 1.1  # at most, from one frame to the next
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


def move_boxes(flows: PointFlow, boxes: Array, scores: Array, error: float, moving: float) -> Moved:
    """Move boxes `(n, 4)`, xyxy with scores `(n,)`, from the last but one picture to the last.

    Args:
        flows: of the stream.
        boxes, scores: in pixels of its pictures.
        error, moving: see `MotionOptions`.
    """
    height, width = flows.size
    size = np.array([width, height], np.float32)
    visible = np.clip(boxes, 0, np.tile(size, 2))
    places = _BOX_POINTS[min(7, max(2, math.isqrt(_POINTS // max(1, len(boxes)))))]
    inner = visible[:, None, :2] + places * (visible[:, None, 2:] - visible[:, None, :2])  # (n, points, 2)
    everywhere = _CAMERA_POINTS * size
    count = len(everywhere)
    start, shift, sure = flows.at(np.concatenate([everywhere, inner.reshape(-1, 2)]), error)
    seen = Flow(start[:count], shift[:count], sure[:count])
    flow = Flow(inner, shift[count:].reshape(inner.shape), sure[count:].reshape(inner.shape[:2]))
    camera = camera_motion(seen, boxes)
    own = _leaves(flow, camera, moving)
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
    restless = float((_leaves(seen, camera, 2 * moving) & outside).mean())
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
