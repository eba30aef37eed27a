"""Videos for tests: whole, damaged and unusual."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def encode(
    path: Path,
    images: list[Image],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """A video of some codec and container, with B-frames where the codec has them.

    Frame i is shown at i / 25 s, or at `times[i]` / 25 s. Pixels have the ratio `aspect` of width to height.
    """
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = pix_fmt, 4_000_000
        stream.codec_context.gop_size = 10
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, image in zip(times or range(len(images)), images, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damage(path: Path) -> Path:
    """Overwrite a sixth of the frames of an mp4 file with noise."""
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + len(data) // 3, data.index(b"mdat") + len(data) // 2
    data[begin:end] = random.Random(0).randbytes(end - begin)
    path.write_bytes(data)
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut the end off."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def rotate(path: Path, angle: int) -> Path:
    """Let players of an mp4 file turn it clockwise by a multiple of 90 degrees, as phones do."""
    cos, sin = round(np.cos(np.deg2rad(angle))), round(np.sin(np.deg2rad(angle)))
    return display(path, cos, sin, -sin, cos)


def display(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Let players of an mp4 file show a stored pixel (x, y) at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of a version 0 header: a, b, u, c, d, v, ...
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        data[matrix + place : matrix + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


def encode_side_by_side(path: Path, streams: list[tuple[list[Image], Disposition]]) -> Path:
    """Several video streams in one file."""
    with av.open(str(path), "w") as container:
        pairs: list[tuple[Any, list[Image]]] = []
        for images, disposition in streams:
            cover = disposition == Disposition.attached_pic
            stream: Any = container.add_stream("png" if cover else "mpeg4", rate=25)
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "rgb24" if cover else "yuv420p"
            stream.disposition, stream.bit_rate = disposition.value, 4_000_000
            pairs.append((stream, images))
        for stream, images in pairs:
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    return path


def encode_sound(path: Path) -> Path:
    """A second of silence without a picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_change(path: Path, images: list[Image]) -> Path:
    """A transport stream whose pictures get smaller midway."""
    half = len(images) // 2
    small = [np.ascontiguousarray(image[:64, :96]) for image in images[half:]]
    parts = [encode(path.with_suffix(f".{i}.ts"), p, "mpeg2video") for i, p in enumerate((images[:half], small))]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    return path
