"""Synthetic videos with exact boxes: moving textured shapes, for tests, demos and training with no downloads.

::

    for frame in render_video(SceneOptions(frames=60), seed=0, index=3, split="val"):
        show(frame.image, [o.box for o in frame.objects])

The same options, seed, split and index always give the same bits, in any process. Across indices, motion
groups (slow, medium, fast) and static against moving cameras alternate, so that small sets are balanced.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.synthetic.scene import CAMERAS, MOTIONS, Actor, Shot, make_shot
from eventful_det.data.synthetic.shapes import Array
from eventful_det.errors import UserError
from eventful_det.options import Count, Natural, Range, Share, convert_fields

Side = Annotated[int, Range(32, 8192)]  # of a frame in pixels
Size = Annotated[float, Range(0, 1, above=True)]  # of an object, as a fraction of the frame's shorter side
Noise = Annotated[float, Range(0, 255)]  # standard deviation in grey levels
Objects = Annotated[int, Range(1, 1000)]


@dataclass(frozen=True, slots=True)
class SceneOptions:
    """What the videos are like.

    Attributes:
        width: of the frame in pixels.
        height: of the frame in pixels.
        frames: frames per video.
        objects: fewest and most objects per shot.
        object_size: smallest and largest object as a fraction of the frame's shorter side.
        noise: standard deviation of the sensor noise in grey levels (0..255).
        exposure_drift: largest relative change of brightness over time; about half of the videos drift.
        static_fraction: fraction of videos with a static camera; the others pan, zoom or are handheld.
        cut_fraction: fraction of videos with scene cuts.
        occluder_fraction: fraction of videos in which background-textured things stand in the way.
        min_visible: an object is labelled when at least this fraction of its area is visible ...
        min_side: ... and its visible box is at least this many pixels wide and high.
    """

    width: Side = 384
    height: Side = 256
    frames: Count = 60
    objects: tuple[Objects, Objects] = (2, 5)
    object_size: tuple[Size, Size] = (0.14, 0.5)
    noise: Noise = 2.0
    exposure_drift: Annotated[float, Range(0, 0.99)] = 0.08
    static_fraction: Share = 0.5
    cut_fraction: Share = 0.25
    occluder_fraction: Share = 0.5
    min_visible: Share = 0.3
    min_side: Natural = 10

    def __post_init__(self) -> None:
        convert_fields(self, "synthetic video")
        for name in ("objects", "object_size"):
            least, most = getattr(self, name)
            if least > most:
                raise UserError(f"synthetic video.{name} must be [least, most], got [{least}, {most}]")


@dataclass(frozen=True, slots=True)
class SyntheticObject:
    """One labelled object of one frame.

    Attributes:
        track_id: the same object has the same id in all frames of its video.
        category: id in ``classes.SYNTHETIC_SHAPES``, 1-based.
        box: x1, y1, x2, y2 in pixel edges (0 is the left edge of the first pixel, ``width`` the right edge of the
            last), tight around what is visible.
        occluded: more than a tenth of what is inside the frame is hidden by other things.
        visible_fraction: visible area by whole area, parts outside the frame included.
    """

    track_id: int
    category: int
    box: tuple[float, float, float, float]
    occluded: bool
    visible_fraction: float


@dataclass(frozen=True, slots=True)
class SyntheticFrame:
    """A frame: ``image`` is (height, width, 3) uint8 RGB."""

    image: NDArray[np.uint8]
    objects: list[SyntheticObject]
    is_cut: bool = False  # the first frame after a scene cut


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What is true of a video by construction."""

    motion: str  # slow, medium or fast
    camera: str  # static, pan, zoom or handheld
    occluders: bool
    cuts: list[int] = field(default_factory=list)  # first frame of every shot but the first


def video_facts(options: SceneOptions, seed: int, index: int, split: str = "val") -> VideoFacts:
    """The plan of a video, without rendering it."""
    return _plan(options, _generator(seed, index, split), index)


def render_video(
    options: SceneOptions | None = None, seed: int = 0, index: int = 0, split: str = "val"
) -> Iterator[SyntheticFrame]:
    """Render one video, frame by frame.

    Args:
        options: what the videos are like; the defaults of ``SceneOptions`` if None.
        seed: of the whole set, a non-negative integer.
        index: of the video in its split.
        split: any name; different splits never share a video.
    """
    options = options or SceneOptions()
    rng = _generator(seed, index, split)
    facts = _plan(options, rng, index)
    t = np.arange(options.frames)
    swing = np.sin(2 * math.pi * t / rng.uniform(40, 160) + rng.uniform(0, 2 * math.pi))
    drift = options.exposure_drift * rng.uniform(0.3, 1.0) * float(rng.random() < 0.5)
    exposure = 1 + drift * swing
    first_track = 0
    bounds = [0, *facts.cuts, options.frames]
    for begin, end in itertools.pairwise(bounds):
        shot = make_shot(
            rng,
            size=(options.height, options.width),
            frames=end - begin,
            motion=facts.motion,
            camera=facts.camera,
            objects=options.objects,
            object_size=options.object_size,
            occluders=facts.occluders,
            first_track=first_track,
        )
        first_track += len(shot.actors)
        for i in range(begin, end):
            picture, objects = _draw(shot, i - begin, options)
            picture *= np.float32(exposure[i])
            if options.noise:
                picture += np.float32(options.noise) * rng.standard_normal(picture.shape, dtype=np.float32)
            image = np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)
            yield SyntheticFrame(image, objects, is_cut=i == begin > 0)


def _generator(seed: int, index: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def _plan(options: SceneOptions, rng: np.random.Generator, index: int) -> VideoFacts:
    # Multiples of irrational numbers spread the fractions evenly and independently over the indices.
    static = math.floor((index + 1) * options.static_fraction) > math.floor(index * options.static_fraction)
    camera = CAMERAS[0] if static else str(rng.choice(CAMERAS[1:], p=(0.6, 0.2, 0.2)))
    occluders = (index * math.sqrt(2) + 0.25) % 1 < options.occluder_fraction
    cuts: list[int] = []
    if (index * (math.sqrt(5) - 1) / 2 + 0.5) % 1 < options.cut_fraction:
        shots = max(2, round(options.frames / 60))
        places = (np.arange(1, shots) + rng.uniform(-0.25, 0.25, shots - 1)) / shots * options.frames
        cuts = sorted({int(p) for p in places if 0 < int(p) < options.frames})
    return VideoFacts(MOTIONS[index % 3], camera, occluders, cuts)


def _draw(shot: Shot, i: int, options: SceneOptions) -> tuple[Array, list[SyntheticObject]]:
    """Frame i of a shot before exposure and noise, and what is to be seen in it."""
    size = (options.width, options.height)
    canvas = _Canvas(warp(shot.background, shot.camera[i], size, cv2.BORDER_REFLECT_101))
    for actor in shot.actors:
        if not actor.in_front:
            canvas.put(actor, i)
    if shot.occluders is not None:
        canvas.paint(warp(shot.occluders, shot.camera[i], size, cv2.BORDER_REFLECT_101), 0, 0)
    for actor in shot.actors:
        if actor.in_front:
            canvas.put(actor, i)
    labels = (_label(*layer, i, options) for layer in canvas.layers)
    return canvas.picture, sorted((o for o in labels if o is not None), key=lambda o: o.track_id)


class _Canvas:
    """A picture (H, W, 3) painted from far to near that keeps track of how much of each actor still shows."""

    def __init__(self, picture: Array) -> None:
        self.picture = picture
        self.layers: list[tuple[Actor, Array, float]] = []  # visible alpha (H, W); area in view when it was painted

    def put(self, actor: Actor, i: int) -> None:
        """Paint an actor where it is on frame i."""
        height, width = self.picture.shape[:2]
        matrix, side = actor.matrix[i], actor.sprite.shape[0]
        half = int(np.abs(matrix).sum(1).max() * side / 2) + 2
        cx, cy = actor.position[i]
        x1, y1 = max(0, math.floor(cx) - half), max(0, math.floor(cy) - half)
        x2, y2 = min(width, math.ceil(cx) + half), min(height, math.ceil(cy) + half)
        alpha = np.zeros((height, width), np.float32)
        if x1 < x2 and y1 < y2:
            middle = (side - 1) / 2
            shift = np.array([cx - 0.5 - x1, cy - 0.5 - y1]) - matrix @ (middle, middle)
            patch = warp(actor.sprite, np.concatenate([matrix, shift[:, None]], axis=1), (x2 - x1, y2 - y1))
            self.paint(patch, x1, y1)
            alpha[y1:y2, x1:x2] = patch[..., 3]
        self.layers.append((actor, alpha, float(alpha.sum())))

    def paint(self, patch: Array, x: int, y: int) -> None:
        """Lay pre-multiplied RGBA (h, w, 4) over the picture at column x, row y."""
        there = np.s_[y : y + patch.shape[0], x : x + patch.shape[1]]
        see_through = 1 - patch[..., 3]
        self.picture[there] *= see_through[..., None]
        self.picture[there] += patch[..., :3]
        for _, below, _ in self.layers:
            below[there] *= see_through


def warp(image: Array, affine: Array, size: tuple[int, int], border: int = cv2.BORDER_CONSTANT) -> Array:
    """A picture seen through an affine map `(2, 3)`, in a size (width, height)."""
    warped = cv2.warpAffine(image, affine, size, flags=cv2.INTER_LINEAR, borderMode=border)
    return np.asarray(warped, np.float32)


def _label(actor: Actor, visible: Array, in_view: float, i: int, options: SceneOptions) -> SyntheticObject | None:
    """The label of an actor from its visible alpha (H, W), or None when too little of it is to be seen."""
    area = float(visible.sum())
    whole = actor.area * abs(float(np.linalg.det(actor.matrix[i])))  # parts outside the frame included
    fraction = min(area / whole, 1.0)
    # a row or column counts when it shows about a pixel of the object, so that faint edges do not stretch the box
    columns, rows = np.flatnonzero(visible.sum(0) >= 1.0), np.flatnonzero(visible.sum(1) >= 1.0)
    if fraction < options.min_visible or not columns.size or not rows.size:
        return None
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    if min(box[2] - box[0], box[3] - box[1]) < options.min_side:
        return None
    return SyntheticObject(actor.track_id, actor.category, box, area < 0.9 * in_view, fraction)
