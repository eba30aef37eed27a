"""What happens in a synthetic video: backgrounds, occluders, cameras and objects that move.

A video is one or more *shots* (a cut starts the next). A shot is drawn once by ``make_shot``; after that
every position is known for every frame, so a frame costs only its warps.

Speeds follow the ILSVRC VID rule: an object is *slow*, *medium* or *fast* when the mean IoU with itself
over the 10 frames before and after is above 0.9, between, or below 0.7. For an object of size s that moves
v pixels per frame this IoU is about (s - 5.5 v) / (s + 5.5 v), hence the speeds below, in sizes per frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.data.synthetic.shapes import (
    TEXTURES,
    Array,
    checker,
    colour,
    dots,
    mix,
    noise,
    sprite,
    stripes,
)

MOTIONS = ("slow", "medium", "fast")
CAMERAS = ("static", "pan", "zoom", "handheld")
SPEED = {"slow": (0.0, 0.006), "medium": (0.014, 0.022), "fast": (0.045, 0.11)}  # object sizes per frame
BREATHING = {"slow": 0.02, "medium": 0.10, "fast": 0.22}  # relative amplitude of the change of scale
WOBBLE = {"slow": 0.02, "medium": 0.10, "fast": 0.30}  # amplitude of the rocking, radians
PAN_SPEED = {"slow": (0.6, 1.5), "medium": (0.6, 1.0), "fast": (2.0, 4.0)}  # peak, in pixels per frame at height 256
WORLD = 1.6  # the background is this much larger than the frame and is mirrored beyond


@dataclass(frozen=True, slots=True)
class Actor:
    """One object: its picture and where it is, shot time along the first axis."""

    track_id: int
    category: int
    sprite: Array  # (S, S, 4) pre-multiplied RGBA
    area: float  # sum of the sprite's alpha
    position: Array  # (F, 2) centre in frame pixels
    matrix: Array  # (F, 2, 2) sprite pixels -> frame pixels
    in_front: bool  # of the occluders


@dataclass(frozen=True, slots=True)
class Shot:
    """Everything between two cuts."""

    background: Array  # (H', W', 3)
    occluders: Array | None  # (H', W', 4) pre-multiplied RGBA
    camera: Array  # (F, 2, 3) affine, background pixels -> frame pixels
    actors: list[Actor]  # far to near


def make_shot(
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    frames: int,
    motion: str,
    camera: str,
    objects: tuple[int, int],
    object_size: tuple[float, float],
    occluders: bool,
    first_track: int,
) -> Shot:
    """Draw one shot.

    Args:
        rng: decides everything.
        size: (height, width) of the frame in pixels.
        frames: length of the shot, F.
        motion: one of ``MOTIONS``.
        camera: one of ``CAMERAS``.
        objects: fewest and most objects.
        object_size: smallest and largest object, as a fraction of the frame's shorter side.
        occluders: whether things of background texture stand in the way.
        first_track: track id of the first object.
    """
    height, width = size
    world = (round(height * WORLD), round(width * WORLD))
    background = make_background(rng, *world)
    pan, shake, zoom = _camera_path(rng, size, frames, motion, camera)
    centre = np.array([width, height]) / 2
    offset = centre - zoom[:, None] * (pan + shake + np.array([world[1], world[0]]) / 2)
    affine = np.concatenate([zoom[:, None, None] * np.eye(2), offset[:, :, None]], axis=2)

    count = int(rng.integers(objects[0], objects[1] + 1))
    shapes = rng.permutation(len(SYNTHETIC_SHAPES))
    low, high = (math.log(f * min(size)) for f in object_size)
    diameters = np.exp(rng.uniform(low, high, count))
    starts = _scatter(rng, size, diameters)
    actors = []
    for i in range(count):
        nearest = i == count - 1  # stays in view and in front, so that no frame is empty
        path = _path(rng, starts[i], diameters[i], size, frames, motion, stays=nearest)
        drift = pan if motion != "slow" and not nearest else np.zeros_like(pan)
        position = centre + zoom[:, None] * (path - drift - shake - centre)
        actors.append(
            _actor(
                rng,
                first_track + i,
                int(shapes[i % len(shapes)]),
                diameters[i],
                position,
                zoom,
                motion,
                background.mean((0, 1)),
                nearest or bool(rng.random() < 0.4),
            )
        )
    front = _occluders(rng, background, size) if occluders else None
    return Shot(background, front, affine, actors)


def make_background(rng: np.random.Generator, height: int, width: int) -> Array:
    """A muted, textured picture (height, width, 3), 0..255, with structure but none of the shapes."""
    cell = min(height, width)
    near, far = colour(rng, (0.05, 0.45), (0.25, 0.6)), colour(rng, (0.05, 0.45), (0.4, 0.85))
    picture = mix(near, far, noise(rng, height, width, cell / 2, 4))
    if rng.random() < 0.7:
        pattern = (stripes, checker, dots)[rng.integers(3)](rng, height, width, cell * rng.uniform(0.06, 0.3))
        tint = colour(rng, (0.05, 0.5), (0.3, 0.8))
        picture = mix(picture, tint, pattern * np.float32(rng.uniform(0.12, 0.3)))
    strokes = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(4, 14))):  # twigs and cracks: contrast that is no object
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.35, 24))
        walk = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) * cell * rng.uniform(0.01, 0.03)
        walk += rng.uniform((0, 0), (width, height))
        thickness = int(rng.integers(1, 5))
        cv2.polylines(strokes, [np.round(walk).astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    tint = colour(rng, (0.1, 0.6), (0.1, 0.9))
    picture = mix(picture, tint, strokes.astype(np.float32) / 255 * np.float32(rng.uniform(0.3, 0.7)))
    grain = 14 * (noise(rng, height, width, 4, 2) - 0.5)
    return np.clip(picture + grain[..., None], 0, 255).astype(np.float32)


def _occluders(rng: np.random.Generator, background: Array, size: tuple[int, int]) -> Array:
    """Posts and boulders (height, width, 4) of background texture, pre-multiplied RGBA."""
    height, width = background.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    unit = min(size)
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.uniform(0.12, 0.88) * width, rng.uniform(0.2, 0.8) * height
        if rng.random() < 0.5:
            half = unit * rng.uniform(0.05, 0.11)
            lean = rng.uniform(-0.15, 0.15) * height
            post = [(x - half - lean, 0), (x + half - lean, 0), (x + half + lean, height), (x - half + lean, height)]
            cv2.fillPoly(mask, [np.round(post).astype(np.int32)], 255, cv2.LINE_AA)
        else:
            angle = np.linspace(0, 2 * math.pi, 12, endpoint=False)
            radius = unit * rng.uniform(0.1, 0.2) * rng.uniform(0.75, 1.25, 12)
            stone = np.stack([x + 1.5 * radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
            cv2.fillPoly(mask, [np.round(stone).astype(np.int32)], 255, cv2.LINE_AA)
    alpha = cv2.GaussianBlur(mask, (0, 0), 0.7).astype(np.float32) / 255
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, height, width, unit * rng.uniform(0.08, 0.2))
    shade = background[::-1, ::-1] * np.float32(rng.choice((0.6, 1.35)))
    rgb = shade * (0.9 + 0.2 * texture)[..., None]
    edge = np.clip(cv2.GaussianBlur(alpha, (0, 0), unit * 0.012) * 1.6 - 0.6, 0, 1)  # darker rims give depth
    rgb *= (0.6 + 0.4 * edge)[..., None]
    return np.dstack([np.clip(rgb, 0, 255) * alpha[..., None], alpha]).astype(np.float32)


def _camera_path(
    rng: np.random.Generator, size: tuple[int, int], frames: int, motion: str, camera: str
) -> tuple[Array, Array, Array]:
    """Pan (F, 2), shake (F, 2) in pixels and zoom (F,) over time."""
    t = np.arange(frames, dtype=np.float64)
    unit = min(size) / 256
    pan, shake, zoom = np.zeros((frames, 2)), np.zeros((frames, 2)), np.ones(frames)
    if camera == "pan":
        amplitude = np.array([0.28 * size[1], 0.10 * size[0]]) * rng.uniform(0.6, 1.0, 2)
        rate = rng.uniform(*PAN_SPEED[motion]) * unit / amplitude[0]
        pan = amplitude * np.sin(rate * np.array([1.0, 0.7]) * t[:, None] + rng.uniform(0, 2 * math.pi, 2))
        pan -= pan[0]
    elif camera == "zoom":
        depth = {"slow": 0.03, "medium": 0.08, "fast": 0.14}[motion]
        zoom = 1 + depth * np.sin(2 * math.pi * t / rng.uniform(50, 90) + rng.uniform(0, 2 * math.pi))
    elif camera == "handheld":
        for period in (7.0, 17.0, 41.0):
            phase = rng.uniform(0, 2 * math.pi, 2)
            shake += rng.uniform(0.15, 0.5, 2) * unit * np.sin(2 * math.pi * t[:, None] / period + phase)
    return pan, shake, zoom


def _scatter(rng: np.random.Generator, size: tuple[int, int], diameters: Array) -> Array:
    """Starting points (N, 2) that overlap little, by best of 30 tries each."""
    chosen: list[Array] = []
    box = np.array([size[1], size[0]])
    for i, diameter in enumerate(diameters):
        tries = rng.uniform(np.minimum(0.4 * diameter, box / 2), np.maximum(box - 0.4 * diameter, box / 2), (30, 2))
        if chosen:
            others = zip(chosen, diameters[:i], strict=True)
            gaps = [np.linalg.norm(tries - c, axis=1) - 0.5 * (diameter + d) for c, d in others]
            chosen.append(tries[int(np.argmax(np.minimum(np.min(gaps, axis=0), 0.1 * box[1])))])
        else:
            chosen.append(tries[0])
    return np.array(chosen)


def _path(
    rng: np.random.Generator,
    start: Array,
    diameter: float,
    size: tuple[int, int],
    frames: int,
    motion: str,
    stays: bool,
) -> Array:
    """Centre (F, 2) of an object: a winding walk that turns back inside the frame or some way outside it."""
    t = np.arange(frames)
    sway = rng.uniform(0.1, 0.7) * np.sin(2 * math.pi * t / rng.uniform(40, 90) + rng.uniform(0, 2 * math.pi))
    heading = rng.uniform(0, 2 * math.pi) + sway
    step = rng.uniform(*SPEED[motion]) * diameter
    walk = np.cumsum(step * np.stack([np.cos(heading), 0.7 * np.sin(heading)], axis=1), axis=0)
    walk += start - walk[0]
    beyond = diameter * (-0.45 if stays else rng.uniform(0.2, 1.2))
    low = np.minimum(-beyond, np.array([size[1], size[0]]) / 2 - 1)
    span = np.maximum(np.array([size[1], size[0]]) + beyond - low, 2.0)
    fold = np.abs((walk - low) % (2 * span) - span)  # a triangle wave: turns back at both ends
    return np.asarray(low + span - fold)


def _actor(
    rng: np.random.Generator,
    track_id: int,
    shape: int,
    diameter: float,
    position: Array,
    zoom: Array,
    motion: str,
    against: Array,
    in_front: bool,
) -> Actor:
    frames = len(position)
    t = np.arange(frames)
    wave = np.sin(2 * math.pi * t / rng.uniform(30, 70) + rng.uniform(0, 2 * math.pi))
    scale = zoom * (1 + BREATHING[motion] * rng.uniform(0.3, 1.0) * wave)
    rock = np.sin(2 * math.pi * t / rng.uniform(25, 60) + rng.uniform(0, 2 * math.pi))
    angle = rng.uniform(-0.6, 0.6) + WOBBLE[motion] * rock
    if motion == "fast" and rng.random() < 0.4:
        angle = angle + rng.uniform(-0.06, 0.06) * t  # spins
    side = max(8, math.ceil(diameter * scale.max()))
    category = SYNTHETIC_SHAPES[shape]
    picture = sprite(rng, category.name, side, against)
    stretch = np.array([1.0, rng.uniform(0.8, 1.0)])
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cosine, -sine], axis=1), np.stack([sine, cosine], axis=1)], axis=1)
    matrix = turn * (diameter * scale / side)[:, None, None] * stretch
    return Actor(track_id, category.id, picture, float(picture[..., 3].sum()), position, matrix, in_front)
