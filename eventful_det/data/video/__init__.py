"""Frames from anywhere: video files, cameras, network streams, folders of pictures, arrays, synthetic clips.

::

    with open_source("clip.mp4") as source:
        for frame in source:
            show(frame.image)

Sources are lazy and hold a few frames at most, however long the video.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterable, Iterator, Sized
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eventful_det.data.source import Source, VideoFrame, VideoSource
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video.decoder import SILENCE, Decoder, Skip, VideoFile
from eventful_det.data.video.live import RECONNECT, CapturedFrame, LiveSource
from eventful_det.data.video.pictures import read_image
from eventful_det.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Source", "VideoFrame", "VideoSource", "open_source"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")

_WEBCAMS = 100  # OpenCV takes greater numbers for the choice of a driver


def open_source(
    source: Source, *, ahead: int = 0, reconnect: float = RECONNECT, silence: float = SILENCE
) -> VideoSource:
    """Open a source of frames.

    Webcams and addresses without an end are live: a slow reader gets their newest frame, and a lost one is called
    again. Of everything else every frame is read.

    Args:
        source: a video or picture file, a folder or glob of pictures (in natural order), the number of a webcam, an
            RTSP, HTTP or other URL that FFmpeg knows, "synthetic" or "synthetic:SEED" for a clip rendered on the
            spot, an iterable of `(h, w, 3)` uint8 RGB arrays, or a `VideoSource`, which is returned as it is.
        ahead: frames that a thread reads ahead of the reader, where the source is not live.
        reconnect: seconds for which a live source that was lost is called again.
        silence: seconds to wait for an address to open, and for more of its data before it counts as lost.

    Raises:
        UserError: there is no such source, or it is none of these.
    """
    if isinstance(source, VideoSource):
        return source
    opened = _open(source, reconnect, silence)
    opened.ahead = ahead
    return opened


def _open(source: Source, reconnect: float, silence: float) -> VideoSource:
    if isinstance(source, str) and re.fullmatch(r"\d+", source, re.ASCII) and not os.path.exists(source):
        source = int(source)
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        if not 0 <= source < _WEBCAMS:
            raise UserError(f"there is no webcam {source}; expected a number from 0 to {_WEBCAMS - 1}")
        connect = partial(_Webcam, int(source))
        return LiveSource(f"webcam {source}", connect(), connect, reconnect)
    if isinstance(source, str) and "://" in source:
        decoder = Decoder(source, silence)
        again = partial(Decoder, source, silence)
        return LiveSource(decoder.name, decoder, again, reconnect) if decoder.live else VideoFile(decoder)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source))
    if isinstance(source, np.ndarray) and source.ndim == 3:
        return _Arrays([source])
    if isinstance(source, Iterable) and not isinstance(source, VideoSource):
        return _Arrays(source)
    raise UserError(
        f"a {type(source).__name__} is no source of frames; "
        "give a file, folder, glob, webcam number, URL or an iterable of arrays"
    )


def home_path(text: str) -> Path:
    """A path in which "~" stands for a home, where somebody has it; else it is a name like any other."""
    return Path(os.path.expanduser(text))


def _open_path(text: str) -> VideoSource:
    if re.fullmatch(r"synthetic(:\d+)?", text):
        return _Synthetic(int(text.partition(":")[2] or 0))
    path = home_path(text)
    if path.is_dir():
        return _Pictures(text, path.iterdir())
    if path.is_file():
        return _Pictures(text, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else VideoFile(Decoder(str(path)))
    if glob.has_magic(text) and "\0" not in text:
        return _Pictures(text, map(Path, _matching(str(path))))
    raise UserError(
        f"no such file or folder: '{text}'; "
        "a source is a video, a folder or glob of pictures, a webcam number, a URL, or synthetic"
    )


def _matching(pattern: str) -> Iterator[str]:
    """What fits a glob pattern. `**` enters each folder once, also where links lead in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    seen: set[str] = set()
    for top in glob.iglob(os.path.join(*parts[:place])) if place else ["."]:
        for folder, folders, _ in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
            if real not in seen:
                seen.add(real)
                yield from _matching(os.path.join(glob.escape(folder), *(parts[place + 1 :] or "*")))


class _Webcam:
    """A connection to a webcam."""

    def __init__(self, index: int) -> None:
        log = getattr(cv2.utils, "logging", cv2)  # OpenCV 4.9 has it one level up
        level = log.getLogLevel()
        log.setLogLevel(0)  # or a page of warnings about every backend that was tried
        self._capture = cv2.VideoCapture(index)
        log.setLogLevel(level)
        if not self._capture.isOpened():
            raise UserError(f"webcam {index} cannot be opened; is it connected and not in use?")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a slow reader should see the present
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or None

    def read_live(self, _: Skip) -> Iterator[CapturedFrame]:
        """What it sees, until it is unplugged."""
        while True:
            there, image = self._capture.read()
            if not there:
                return
            yield CapturedFrame(time.monotonic(), partial(_rgb, image))

    def close(self) -> None:
        """Let go of it."""
        self._capture.release()


class _Pictures(VideoSource):
    """Picture files, each once also where links lead in a circle; their sizes may differ."""

    def __init__(self, name: str, paths: Iterable[Path]) -> None:
        pictures = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        self._paths = sorted({(p.parent.resolve(), p.name): p for p in pictures}.values(), key=_natural)
        if not pictures:
            raise UserError(f"no pictures in '{name}'; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        super().__init__(name, None, len(self._paths))

    def _read(self) -> Iterator[VideoFrame]:
        for path in self._paths:
            try:
                image = read_image(path)
            except UserError as error:
                self._skip(path.name, error)
                continue
            yield VideoFrame(image)


class _Arrays(VideoSource):
    def __init__(self, arrays: Iterable[NDArray[np.uint8]]) -> None:
        super().__init__("arrays", None, len(arrays) if isinstance(arrays, Sized) else None)
        self.arrays = arrays

    def _read(self) -> Iterator[VideoFrame]:
        for i, image in enumerate(self.arrays):
            if not isinstance(image, np.ndarray):
                hint = "; give files one by one, or their folder" * isinstance(image, (str, os.PathLike))
                raise UserError(f"frame {i} is a {type(image).__name__}; expected (h, w, 3) uint8 RGB arrays{hint}")
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(f"frame {i} is {image.dtype} {image.shape}; expected (h, w, 3) uint8 RGB")
            yield VideoFrame(image)


class _Synthetic(VideoSource):
    """Three shots: a static camera, a moving one, a static one with fast objects."""

    shots = (1, 4, 5)  # indices of `render_video`, at which camera and motion alternate
    options = SceneOptions(frames=50, cut_fraction=0.0)

    def __init__(self, seed: int) -> None:
        super().__init__(f"synthetic clip {seed}", 25.0, len(self.shots) * self.options.frames)
        self._seed = seed

    def _read(self) -> Iterator[VideoFrame]:
        shots = (render_video(self.options, self._seed, index, "demo") for index in self.shots)
        for i, frame in enumerate(frame for shot in shots for frame in shot):
            yield VideoFrame(frame.image, i / 25.0)


def _rgb(image: Any) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
