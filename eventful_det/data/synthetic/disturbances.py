"""What fixed cameras see that is no object: noise, light, weather, codecs, and cameras that are not so fixed.

::

    for frame in disturb(render_video(SceneOptions()), "lamp_flicker", seed=0):
        show(frame.image)

A disturbance takes the frames of a synthetic video and gives them disturbed, with boxes where the objects then are.
The same seed always gives the same bits, but for `low_bit_rate`, whose bits are those of the encoder.
"""

from __future__ import annotations

import io
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.synthetic import SyntheticFrame, SyntheticObject
from eventful_det.data.synthetic.shapes import Array
from eventful_det.errors import UserError
from eventful_det.options import nearest

Frames = Iterator[SyntheticFrame]
Disturbance = Callable[[Frames, np.random.Generator], Frames]

_LAMP = (0.75, 0.25)  # where a lamp stands, (x, y) as shares of the frame
_PERIOD = 8  # frames between steps of light
_LEAST = 0.3  # of a box must remain in the frame


def disturb(frames: Iterable[SyntheticFrame], name: str, seed: int) -> Frames:
    """Frames of a synthetic video, disturbed.

    Args:
        frames: of one video, all of one size.
        name: of a disturbance in `DISTURBANCES`.
        seed: decides everything that is random.

    Raises:
        UserError: there is no such disturbance.
    """
    if name not in DISTURBANCES:
        raise UserError(f"unknown disturbance {name!r}; {nearest(name, DISTURBANCES)}")
    return DISTURBANCES[name](iter(frames), np.random.default_rng([seed, zlib.crc32(name.encode())]))


def _pixelwise(change: Callable[[Array, int, np.random.Generator], Array]) -> Disturbance:
    """A disturbance that changes pictures, float32 `(h, w, 3)` and number of the frame, one by one."""

    def disturbance(frames: Frames, rng: np.random.Generator) -> Frames:
        for i, frame in enumerate(frames):
            yield replace(frame, image=_whole(change(frame.image.astype(np.float32), i, rng)))

    return disturbance


def _whole(picture: Array) -> NDArray[np.uint8]:
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


def _noise(level: float) -> Disturbance:
    """Noise of so many grey levels at each pixel."""

    def change(picture: Array, _: int, rng: np.random.Generator) -> Array:
        return picture + np.float32(level) * rng.standard_normal(picture.shape, np.float32)

    return _pixelwise(change)


def _night(picture: Array, _: int, rng: np.random.Generator) -> Array:
    """A dark scene at high gain: shot noise, which grows with the root of the light, and read noise."""
    picture = np.float32(0.5) * picture
    return picture + np.sqrt(1.5 * picture + 36) * rng.standard_normal(picture.shape, np.float32)


def _lamp_flicker(picture: Array, i: int, _: np.random.Generator) -> Array:
    """A lamp on the mains, sampled by the shutter: it swings by an eighth."""
    return picture * np.float32(1 + 0.125 * math.sin(2.4 * i))


def _exposure_steps(picture: Array, i: int, _: np.random.Generator) -> Array:
    """The camera adjusts itself by 12 grey levels and back."""
    return picture + np.float32(12 * (i // _PERIOD % 2))


def _white_balance(picture: Array, i: int, _: np.random.Generator) -> Array:
    """Warmer by a tenth, and back."""
    return picture * np.asarray((1.1, 1, 0.9) if i // _PERIOD % 2 else (1, 1, 1), np.float32)


def _infra_red(picture: Array, i: int, _: np.random.Generator) -> Array:
    """After some frames the camera switches to infra-red light: no colours, less contrast, brighter."""
    grey = picture.mean(axis=2, keepdims=True)
    return picture if i < _PERIOD else np.broadcast_to(0.7 * grey + 40, picture.shape).astype(np.float32)


def _insects(picture: Array, _: int, rng: np.random.Generator) -> Array:
    """Five bright insects around a lamp, at other places on every frame."""
    height, width = picture.shape[:2]
    places = rng.normal((_LAMP[0] * width, _LAMP[1] * height), 0.06 * height, (5, 2))
    for x, y in places.round().astype(int):
        cv2.circle(picture, (int(x), int(y)), max(1, height // 128), (235, 235, 225), -1, cv2.LINE_AA)
    return picture


def _rain(picture: Array, _: int, rng: np.random.Generator) -> Array:
    """Drops that are lit by a lamp, as streaks."""
    height, width = picture.shape[:2]
    places = rng.normal((_LAMP[0] * width, _LAMP[1] * height), 0.08 * height, (12, 2))
    drops = np.zeros((height, width), np.float32)
    for x, y in places.round().astype(int):
        cv2.line(drops, (int(x), int(y)), (int(x) + 1, int(y) + height // 32), 1.0, 1, cv2.LINE_AA)
    return picture + np.float32(45) * drops[..., None]


def _swaying_trees(picture: Array, i: int, _: np.random.Generator) -> Array:
    """The left edge of the frame, an eighth of it, sways by up to two pixels."""
    height, width = picture.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    sway = np.clip(1 - x / (0.125 * width), 0, 1) ** 0.5 * np.sin(0.9 * i + y / 20)
    swayed = cv2.remap(picture, x + 2 * sway.astype(np.float32), y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(swayed, np.float32)


def _low_bit_rate(frames: Frames, _: np.random.Generator) -> Frames:
    """Encoded and decoded with as few bits as the cheapest cameras use; every twelfth frame is a key frame."""
    kept = list(frames)
    if not kept:
        return
    height, width = (n - n % 2 for n in kept[0].image.shape[:2])  # yuv420p has no odd sizes
    film = io.BytesIO()
    with av.open(film, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "36", "g": "12"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame in kept:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image[:height, :width], format="rgb24")))
        container.mux(stream.encode(None))
    film.seek(0)
    with av.open(film, "r") as decoder:
        for frame, decoded in zip(kept, decoder.decode(video=0), strict=True):
            image = frame.image.copy()
            image[:height, :width] = decoded.to_ndarray(format="rgb24")
            yield replace(frame, image=image)


def _camera_shake(frames: Frames, rng: np.random.Generator) -> Frames:
    """A mast in the wind: the picture jumps by about a pixel."""
    for frame in frames:
        yield _moved(frame, 1.0, *rng.normal(0, 1, 2))


def _ptz(frames: Frames, _: np.random.Generator) -> Frames:
    """The camera looks at a part of the scene, pans across it and back."""
    zoom = 1.4
    for i, frame in enumerate(frames):
        height, width = frame.image.shape[:2]
        across = (1 - math.cos(0.1 * i)) / 2
        yield _moved(frame, zoom, -across * (zoom - 1) * width, -(zoom - 1) / 2 * height)


def _moved(frame: SyntheticFrame, zoom: float, x: float, y: float) -> SyntheticFrame:
    """A frame magnified about its corner and moved by (x, y) pixels, its boxes as well."""
    height, width = frame.image.shape[:2]
    affine = np.array([[zoom, 0, x], [0, zoom, y]])
    image = cv2.warpAffine(frame.image, affine, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    objects = (_moved_object(one, zoom, (x, y), (width, height)) for one in frame.objects)
    return replace(frame, image=np.asarray(image, np.uint8), objects=[one for one in objects if one is not None])


def _moved_object(
    one: SyntheticObject, zoom: float, shift: tuple[float, float], size: tuple[int, int]
) -> SyntheticObject | None:
    whole = [zoom * value + offset for value, offset in zip(one.box, itertools.cycle(shift), strict=False)]
    x1, y1, x2, y2 = (
        min(max(value, 0.0), float(side)) for value, side in zip(whole, itertools.cycle(size), strict=False)
    )
    left = (x2 - x1) * (y2 - y1) / ((whole[2] - whole[0]) * (whole[3] - whole[1]))
    return replace(one, box=(x1, y1, x2, y2), visible_fraction=one.visible_fraction * left) if left > _LEAST else None


DISTURBANCES: dict[str, Disturbance] = {
    "noise_12": _noise(12),
    "noise_20": _noise(20),
    "night": _pixelwise(_night),
    "lamp_flicker": _pixelwise(_lamp_flicker),
    "exposure_steps": _pixelwise(_exposure_steps),
    "white_balance": _pixelwise(_white_balance),
    "infra_red": _pixelwise(_infra_red),
    "insects": _pixelwise(_insects),
    "rain": _pixelwise(_rain),
    "swaying_trees": _pixelwise(_swaying_trees),
    "low_bit_rate": _low_bit_rate,
    "camera_shake": _camera_shake,
    "ptz": _ptz,
}
"""By name. All but the last two leave the camera where it is."""
