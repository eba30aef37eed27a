"""Synthetic clips in which the motion is the class: no single frame tells which.

::

    clip = render_action(ActionOptions(), seed=0, index=3, split="val")
    show(clip.frames, ACTIONS[clip.label])

A textured object moves before a textured background, a second one stands still in half of the clips, and in half of
them the camera pans. The same options, seed, split and index always give the same bits, in any process; classes and
cameras alternate over the indices.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.data.synthetic import Noise, Side, Size, warp
from eventful_det.data.synthetic.scene import make_background
from eventful_det.data.synthetic.shapes import Array, sprite
from eventful_det.errors import UserError
from eventful_det.options import Range, Share, convert_fields

ACTIONS = (
    "enter",
    "leave",
    "approach",
    "recede",
    "rise",
    "fall",
    "rotate",
    "appear",
    "vanish",
    "cross_left",
    "cross_right",
    "shake",
)
COVERAGE = 7  # cells along each side
_SWAPPED = {
    "x": ("cross_left", "cross_right"),
    "y": ("rise", "fall"),
    "time": ("enter", "leave", "approach", "recede", "rise", "fall", "appear", "vanish", "cross_left", "cross_right"),
}
CAMERAS = ("still", "pan")
_PAN = 0.3  # of a side: how far a camera pans at most
_SPRITE = 96  # pixels, the largest side of an object's picture
_DIRECTIONS = np.array([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)])


@dataclass(frozen=True)
class ActionOptions:
    """What the clips are like.

    Attributes:
        width, height: of the frame in pixels.
        frames: of a clip.
        object_size: smallest and largest object as a fraction of the frame's shorter side.
        noise: standard deviation of the sensor noise in grey levels (0..255).
        camera: "still", "pan", or "both" in turns.
        bystander: share of the clips in which a second object stands still.
    """

    width: Side = 112
    height: Side = 112
    frames: Annotated[int, Range(8)] = 32
    object_size: tuple[Size, Size] = (0.22, 0.42)
    noise: Noise = 2.0
    camera: Literal["still", "pan", "both"] = "both"
    bystander: Share = 0.5

    def __post_init__(self) -> None:
        convert_fields(self, "synthetic actions")
        if self.object_size[0] > self.object_size[1]:
            raise UserError(f"synthetic actions.object_size must be [least, most], got {list(self.object_size)}")


@dataclass(frozen=True)
class ActionClip:
    """A rendered clip.

    Attributes:
        frames: `(n, height, width, 3)` uint8 RGB.
        label: index into `ACTIONS`.
        camera: one of `CAMERAS`.
        coverage: `(n, 7, 7)` share of each cell of the frame that objects cover; to learn from, not to be recognised.
    """

    frames: NDArray[np.uint8]
    label: int
    camera: str
    coverage: NDArray[np.float32]


@dataclass
class _Motion:
    """An object over time: centre `(F, 2)` and diameter `(F,)` in pixels, angle `(F,)` in radians, opacity `(F,)`."""

    centre: Array
    diameter: Array
    angle: Array
    opacity: Array


def action_of(options: ActionOptions, index: int) -> tuple[int, str]:
    """Label and camera of a clip, without rendering it."""
    cameras = CAMERAS if options.camera == "both" else (options.camera,)
    return index % len(ACTIONS), cameras[index // len(ACTIONS) % len(cameras)]


def mirrored(clip: ActionClip, *axes: str) -> ActionClip:
    """A clip mirrored along "x", "y" or "time", and what it then shows."""
    frames, label, coverage = clip.frames, clip.label, clip.coverage
    for axis in axes:
        place = {"time": 0, "y": 1, "x": 2}[axis]
        frames, coverage = np.flip(frames, place), np.flip(coverage, place)
        pairs = _SWAPPED[axis]
        if ACTIONS[label] in pairs:
            label = ACTIONS.index(pairs[pairs.index(ACTIONS[label]) ^ 1])
    return ActionClip(np.ascontiguousarray(frames), label, clip.camera, np.ascontiguousarray(coverage))


def render_action(
    options: ActionOptions | None = None,
    seed: int = 0,
    index: int = 0,
    split: str = "val",
    frames: Sequence[int] | None = None,
) -> ActionClip:
    """Render a clip.

    Args:
        options: what the clips are like.
        seed: of the whole set, a non-negative integer.
        index: of the clip in its split.
        split: any name; different splits never share a clip.
        frames: only these, by number; None = all.
    """
    options = options or ActionOptions()
    label, camera = action_of(options, index)
    rng = np.random.default_rng([seed, zlib.crc32(f"action {split}".encode()), index])
    size = np.array([options.width, options.height], np.float64)
    pan = _pan(rng, size, options.frames, camera)
    margin = np.ceil(np.abs(pan).max(0)) + 1
    background = make_background(rng, *(int(side) for side in (size + 2 * margin)[::-1]))
    objects = [(_picture(rng, background), _motion(rng, ACTIONS[label], size, options))]
    if rng.random() < options.bystander:
        objects.insert(0, (_picture(rng, background), _still(rng, size, options)))
    images, coverage = [], []
    for i in range(options.frames) if frames is None else frames:
        shift = margin - pan[i]
        view = np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]])
        picture = warp(background, view, (options.width, options.height), cv2.BORDER_REFLECT_101)
        covered = np.zeros(picture.shape[:2], np.float32)
        for image, motion in objects:
            np.maximum(covered, _paint(picture, image, motion, i, pan[i]), out=covered)
        coverage.append(cv2.resize(covered, (COVERAGE, COVERAGE), interpolation=cv2.INTER_AREA))
        grain = np.random.default_rng([seed, index, i]).standard_normal(picture.shape, dtype=np.float32)
        images.append(np.clip(picture + np.float32(options.noise) * grain + 0.5, 0, 255).astype(np.uint8))
    return ActionClip(np.stack(images), label, camera, np.stack(coverage))


def _picture(rng: np.random.Generator, background: Array) -> Array:
    shape = SYNTHETIC_SHAPES[int(rng.integers(len(SYNTHETIC_SHAPES)))]
    return sprite(rng, shape.name, _SPRITE, background.mean((0, 1)))


def _pan(rng: np.random.Generator, size: Array, frames: int, camera: str) -> Array:
    """How far the picture has moved at each frame, `(F, 2)` pixels: at an even pace in one direction."""
    if camera == "still":
        return np.zeros((frames, 2))
    heading = rng.uniform(0, 2 * math.pi)
    reach = size * np.array([math.cos(heading), 0.5 * math.sin(heading)]) * rng.uniform(0.5, 1.0) * _PAN
    return np.asarray((np.linspace(0, 1, frames) - 0.5)[:, None] * reach)


def _still(rng: np.random.Generator, size: Array, options: ActionOptions) -> _Motion:
    frames, diameter = options.frames, rng.uniform(*options.object_size) * size.min()
    centre = np.tile(rng.uniform(0.15, 0.85, 2) * size, (frames, 1))
    return _Motion(centre, np.full(frames, diameter), np.full(frames, rng.uniform(0, 6)), np.ones(frames))


def _motion(rng: np.random.Generator, action: str, size: Array, options: ActionOptions) -> _Motion:
    """An object that stands still but for what its action says, which begins and ends somewhere in the clip."""
    motion = _still(rng, size, options)
    frames, diameter = options.frames, motion.diameter[0]
    begin, end = rng.uniform(0.0, 0.25), rng.uniform(0.7, 1.0)
    progress = np.clip((np.linspace(0, 1, frames) - begin) / (end - begin), 0, 1)  # (F,), 0 to 1
    inside = np.clip(motion.centre[0], 0.6 * diameter, size - 0.6 * diameter)
    motion.centre[:] = inside
    if action in ("enter", "leave"):
        direction = _DIRECTIONS[int(rng.integers(4))]
        edge = np.where(direction > 0, size + 0.6 * diameter, -0.6 * diameter)
        outside = np.where(direction != 0, edge, inside)
        part = 1 - progress if action == "enter" else progress
        motion.centre = inside + part[:, None] * (outside - inside)
    elif action in ("cross_left", "cross_right"):
        part = progress if action == "cross_right" else 1 - progress
        reach = size[0] + 1.2 * diameter
        motion.centre[:, 0] = part * reach - 0.6 * diameter
        motion.centre[:, 1] += (progress - 0.5) * rng.uniform(-0.2, 0.2) * size[1]
    elif action in ("rise", "fall"):
        span = rng.uniform(0.35, 0.55) * size[1]
        top = rng.uniform(0.5 * diameter, max(0.5 * diameter + 1, size[1] - span - 0.5 * diameter))
        part = progress if action == "fall" else 1 - progress
        motion.centre[:, 1] = top + part * span
    elif action in ("approach", "recede"):
        growth = rng.uniform(2.0, 2.8) ** (progress if action == "approach" else 1 - progress)
        motion.diameter = motion.diameter * 0.7 * growth
    elif action == "rotate":
        motion.angle = motion.angle + progress * rng.choice((-1, 1)) * rng.uniform(0.6, 1.4) * math.pi
    elif action in ("appear", "vanish"):
        moment, slow = rng.uniform(0.3, 0.7), rng.uniform(0.03, 0.2)
        part = np.clip((np.linspace(0, 1, frames) - moment) / slow + 0.5, 0, 1)
        motion.opacity = part if action == "appear" else 1 - part
    else:  # shake
        wave = np.sin(2 * math.pi * progress * rng.uniform(1.0, 1.5))  # slow enough for tubelets of four frames
        heading = rng.uniform(0, 2 * math.pi)
        swing = np.array([math.cos(heading), math.sin(heading)]) * rng.uniform(0.4, 0.7) * diameter
        motion.centre = motion.centre + wave[:, None] * swing
    return motion


def _paint(picture: Array, image: Array, motion: _Motion, i: int, shift: Array) -> Array:
    """Draw an object on frame i of a picture `(H, W, 3)` moved by `shift`; returns how much it covers, `(H, W)`."""
    opacity = np.float32(motion.opacity[i])
    if not opacity:
        return np.zeros(picture.shape[:2], np.float32)
    scale, side = motion.diameter[i] / image.shape[0], image.shape[0]
    cosine, sine = math.cos(motion.angle[i]) * scale, math.sin(motion.angle[i]) * scale
    turn = np.array([[cosine, -sine], [sine, cosine]])
    offset = motion.centre[i] + shift - 0.5 - turn @ np.full(2, (side - 1) / 2)
    patch = opacity * warp(image, np.column_stack([turn, offset]), (picture.shape[1], picture.shape[0]))
    picture *= 1 - patch[..., 3:]
    picture += patch[..., :3]
    return patch[..., 3]
