"""Frames from anywhere: video files, cameras, network streams, folders of pictures, arrays, synthetic clips.

::

    with open_source("clip.mp4") as source:
        for frame in source:
            show(frame.image)

Sources are lazy and hold a few frames at most, however long the video.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.error import ExitError, FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from eventful_det.data.live import Newest
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_TIMEOUT = (15.0, 10.0)  # seconds to wait for a network stream to open, and for more of its data
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoFrame:
    """One frame.

    Attributes:
        image: `(h, w, 3)` uint8 RGB.
        timestamp: seconds since the source's first frame, or None where it has no clock.
        captured: of a live source, when the frame was captured on the clock of `time.monotonic`, as far as can be told
            at this end; None otherwise.
        resumed: it is the first frame behind a gap, in which the source was lost.
    """

    image: NDArray[np.uint8]
    timestamp: float | None = None
    captured: float | None = None
    resumed: bool = False

    @property
    def age(self) -> float | None:
        """Seconds since the frame was captured; None unless the source is live."""
        return None if self.captured is None else max(0.0, time.monotonic() - self.captured)


class VideoSource(Iterable[VideoFrame]):
    """Frames in order, once.

    Attributes:
        name: for people.
        fps: frames per second, or None where there is no clock.
        frames: estimate of the number of frames, or None if unknown.
        live: frames come when they come, and a slow reader gets the newest; other sources are read without loss.
        skipped: pieces of the source that could not be read or decoded so far.
        dropped: frames of a live source that were overtaken by newer ones so far.
    """

    live = False

    def __init__(self, name: str, fps: float | None = None, frames: int | None = None) -> None:
        self.name, self.fps, self.frames = name, fps, frames
        self.skipped = self.dropped = 0

    def __iter__(self) -> Iterator[VideoFrame]:
        empty = True
        for frame in self._read():
            empty = False
            yield frame
        if empty:
            raise UserError(f"{self.name}: holds no frame that can be decoded")

    @abstractmethod
    def _read(self) -> Iterator[VideoFrame]:
        """The frames, in order."""

    def close(self) -> None:
        """Release files, devices and connections."""

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _skip(self, what: str, error: object) -> None:
        """Count a piece that cannot be read; warn of the first."""
        if not self.skipped:
            _LOG.warning("%s: skipping %s that cannot be decoded (%s), and others like it", self.name, what, error)
        self.skipped += 1


def open_source(source: Any) -> VideoSource:
    """Open a source of frames.

    Args:
        source: a video or picture file, a folder or glob of pictures (in natural order), the number of a webcam, an
            RTSP, HTTP or other URL that FFmpeg knows, "synthetic" or "synthetic:SEED" for a clip rendered on the
            spot, an iterable of `(h, w, 3)` uint8 RGB arrays, or a `VideoSource`.

    Raises:
        UserError: there is no such source, or it is none of these.
    """
    if isinstance(source, VideoSource):
        return source
    if isinstance(source, (int, np.integer)):
        return _Webcam(int(source))
    if isinstance(source, (str, os.PathLike)):
        return _open_named(os.fspath(source))
    if isinstance(source, Iterable):
        return _Arrays(source)
    raise UserError(
        f"a {type(source).__name__} is no source of frames; "
        "give a file, folder, glob, webcam number, URL or an iterable of arrays"
    )


def _open_named(text: str) -> VideoSource:
    if text.isdigit():
        return _Webcam(int(text))
    if re.fullmatch(r"synthetic(:\d+)?", text):
        return _Synthetic(int(text.partition(":")[2] or 0))
    if "://" in text:
        return _Decoder(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _Pictures(text, [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES])
    if path.is_file():
        return _Pictures(text, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else _Decoder(str(path))
    if glob.has_magic(text):
        found = map(Path, glob.glob(str(path), recursive=True))
        return _Pictures(text, [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES])
    raise UserError(
        f"no such file or folder: {text!r}; "
        "a source is a video, a folder or glob of pictures, a webcam number, a URL, or synthetic"
    )


class _Decoder(VideoSource):
    """A video file or URL, decoded by FFmpeg. Of a live stream a slow reader gets the newest frames."""

    def __init__(self, url: str) -> None:
        self._remote = "://" in url
        options = {"rtsp_transport": "tcp"} if url.startswith("rtsp") else {}
        try:
            self._container = av.open(url, timeout=_TIMEOUT if self._remote else None, options=options)
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"cannot open {url} as a video: {_reason(error)}") from error
        videos = self._container.streams.video
        if not videos or self._container.format.name == "tty":  # FFmpeg renders text files as pictures
            self._container.close()
            raise UserError(f"{url} holds no video")
        self._stream = videos[0]
        rate = self._stream.average_rate or self._stream.guessed_rate
        seconds = None if self._container.duration is None else self._container.duration / av.time_base
        fps = float(rate) if rate else None
        frames = self._stream.frames or (round(seconds * fps) if seconds and fps else None)
        super().__init__(url, fps, frames)
        self.live = self._remote and seconds is None
        self._newest = Newest(self._decode()) if self.live else None

    def _read(self) -> Iterator[VideoFrame]:
        return self._decode() if self._newest is None else iter(self._newest)

    def _decode(self) -> Iterator[VideoFrame]:
        reformatter, clock = VideoReformatter(), float(self._stream.time_base or 0)
        first: int | None = None
        for packet in self._packets():
            try:
                decoded = self._stream.codec_context.decode(packet)
            except FFmpegError as error:
                self._skip("a packet", _reason(error))
                continue
            for frame in decoded:
                first = frame.pts if first is None else first
                image = np.asarray(reformatter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
                if frame.rotation % 360:
                    image = np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
                yield VideoFrame(image, None if first is None or frame.pts is None else (frame.pts - first) * clock)

    def _packets(self) -> Iterator[Any]:
        """Packets, then None, which flushes the decoder."""
        while True:
            try:
                # An empty packet would put the decoder into its final state; some AVI files hold them midway.
                yield from (packet for packet in self._container.demux(self._stream) if packet.size)
                break
            except IndexError:  # PyAV stumbles over packets of streams that turn up midway; it can go on behind them
                continue
            except FFmpegError as error:
                if self._remote:
                    raise UserError(f"{self.name} broke off: {_reason(error)}") from error
                self._skip("the rest", _reason(error))
                break
        yield None

    def close(self) -> None:
        if self._newest is not None:
            self._newest.close()
        self._container.close()


class _Webcam(VideoSource):
    live = True

    def __init__(self, index: int) -> None:
        log = cv2.utils.logging
        level = log.getLogLevel()
        log.setLogLevel(log.LOG_LEVEL_SILENT)  # or a page of warnings about every backend that was tried
        self._capture = cv2.VideoCapture(index)
        log.setLogLevel(level)
        if not self._capture.isOpened():
            raise UserError(f"webcam {index} cannot be opened; is it connected and not in use?")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a slow reader should see the present
        super().__init__(f"webcam {index}", self._capture.get(cv2.CAP_PROP_FPS) or None)

    def _read(self) -> Iterator[VideoFrame]:
        began = None
        while True:
            there, image = self._capture.read()
            if not there:
                return
            now = time.monotonic()
            began = now if began is None else began
            yield VideoFrame(_rgb(image), now - began)

    def close(self) -> None:
        self._capture.release()


class _Pictures(VideoSource):
    """Picture files; their sizes may differ."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        if not paths:
            raise UserError(f"no pictures in {name!r}; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        super().__init__(name, None, len(paths))
        self._paths = sorted(paths, key=_natural)

    def _read(self) -> Iterator[VideoFrame]:
        for path in self._paths:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                self._skip(path.name, "not a readable picture")
            else:
                yield VideoFrame(_rgb(image))


class _Arrays(VideoSource):
    def __init__(self, arrays: Iterable[Any]) -> None:
        super().__init__("arrays", None, len(arrays) if isinstance(arrays, Sized) else None)
        self._arrays = arrays

    def _read(self) -> Iterator[VideoFrame]:
        for i, image in enumerate(self._arrays):
            if not isinstance(image, np.ndarray):
                raise UserError(f"frame {i} is a {type(image).__name__}; expected (h, w, 3) uint8 RGB arrays")
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
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _reason(error: BaseException) -> str:
    """What FFmpeg says, without its codes and our path."""
    if isinstance(error, ExitError):  # raised by PyAV's timeouts
        return "timed out"
    return str(getattr(error, "strerror", None) or error)
