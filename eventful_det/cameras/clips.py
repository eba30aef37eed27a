"""Snapshots and clips around events.

A camera's own H.264 is copied, from the key frame before the event on; other sources are encoded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.stream import VideoStream
from numpy.typing import NDArray

from eventful_det.cameras.library import ClipFile, Library
from eventful_det.data.video.writer import OPTIONS, VideoWriter
from eventful_det.errors import UserError

_COPIED = {"h264", "hevc"}  # codecs that are copied into mp4
_MEMORY = 64 * 2**20  # bytes of one camera that wait for an event
_GAP = 3600  # seconds; a longer leap is one of the clock
_LOG = logging.getLogger(__name__)


class _Copied(NamedTuple):
    """A packet of a camera: when it came, its bytes and times."""

    at: float
    data: bytes
    pts: int | None
    dts: int | None
    key: bool


class Recorder:
    """Clips of one camera. Packets come from its thread, frames and events from the detector's.

    Args:
        library: of clips.
        name: of the camera, and of its folder.
        on: whether anything is kept.
    """

    def __init__(self, library: Library, name: str, on: bool = True) -> None:
        self.on, self._library, self._name = on, library, name
        self._lock = threading.Lock()
        self._packets: deque[_Copied] = deque()
        self._frames: deque[tuple[float, NDArray[np.uint8]]] = deque()
        self._bytes = 0
        self._stream: Any = None  # of the camera; used in the camera's thread alone
        self._copies = False
        self._clip: _CopiedClip | _EncodedClip | None = None
        self._wanted: tuple[Path, float, float] | None = None  # file, when it began and ends

    def packet(self, packet: av.Packet[VideoStream]) -> None:
        """A packet of the camera, in the thread that reads it, while its connection is open."""
        stream = packet.stream if self.on and packet.stream.codec_context.name in _COPIED else None
        now = time.monotonic()
        with self._lock:
            if self._stream is not stream:  # what comes has to begin anew
                self._finish()
                self._stream, self._copies, self._bytes = stream, stream is not None, 0
                self._packets.clear()
                self._frames.clear()
            if stream is None:
                return
            copied = _Copied(now, bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
            self._packets.append(copied)
            self._bytes += len(copied.data)
            self._forget(now)
            self._record(copied, self._packets, partial(_CopiedClip, stream=stream), now)

    def frame(self, image: NDArray[np.uint8]) -> None:
        """A frame that was looked at."""
        if self._copies or not self.on:
            return
        now = time.monotonic()
        with self._lock:
            self._frames.append((now, image))
            most = max(1, _MEMORY // max(1, image.nbytes))
            while len(self._frames) > most or self._frames[0][0] < now - self._library.options.before:
                self._frames.popleft()
            self._record((now, image), self._frames, _EncodedClip, now)

    def trigger(self) -> str:
        """Something happened: keep the seconds around it.

        Returns:
            The clip, relative to the library's folder.
        """
        now, options = time.monotonic(), self._library.options
        with self._lock:
            if self._wanted is None:
                self._wanted = self._path("mp4"), now, now
            path, began, _ = self._wanted
            self._wanted = path, began, min(now + options.after, began + options.longest)
            return str(path.relative_to(self._library.folder))

    def snapshot(self, jpeg: bytes) -> str:
        """Keep a picture.

        Returns:
            Its file, relative to the library's folder.
        """
        path = self._path("jpg")
        with self._library.open(path) as file:
            file.write(jpeg)
        return str(path.relative_to(self._library.folder))

    def finish(self) -> None:
        """End a clip whose time is over, also where nothing more comes from the camera."""
        with self._lock:
            self._finish(time.monotonic())

    def close(self) -> None:
        """End the clip."""
        with self._lock:
            self._finish()

    def _path(self, kind: str) -> Path:
        at = datetime.now(UTC)
        while True:
            path = self._library.folder / self._name / f"{at.strftime('%Y-%m-%dT%H-%M-%S-%f')[:-3]}.{kind}"
            if not path.exists():  # the clock may have gone back
                return path
            at += timedelta(milliseconds=1)

    def _forget(self, now: float) -> None:
        """Drop packets that no clip needs: from the first key frame on that is late enough, clips can begin there."""
        start = now - self._library.options.before
        while self._bytes > _MEMORY or (len(self._packets) > 1 and self._packets[0].at < start):
            following = next((i for i, one in enumerate(self._packets) if i and one.key), None)
            if following is None:
                if self._bytes <= _MEMORY:
                    return
                following = len(self._packets)
            if self._bytes <= _MEMORY and self._packets[following].at > start:
                return
            for _ in range(following):
                self._bytes -= len(self._packets.popleft().data)

    def _record(
        self, item: Any, waiting: Iterable[Any], begin: Callable[[ClipFile], _CopiedClip | _EncodedClip], now: float
    ) -> None:
        """Take an item, the last of those `waiting`, into the clip that is wanted; one that begins has all of them."""
        if self._wanted is not None:
            items = [item] if self._clip is not None else waiting
            self._clip = self._clip or begin(self._library.open(self._wanted[0]))
            for one in items:
                self._clip.add(one)
        self._finish(now)

    def _finish(self, now: float = float("inf")) -> None:
        if self._wanted is None or now < self._wanted[2]:
            return
        if self._clip is not None:
            self._clip.close()
        self._clip = self._wanted = None


class _CopiedClip:
    """Packets of a camera as they are."""

    def __init__(self, file: ClipFile, stream: Any) -> None:
        self.file = file
        self._container: Any = av.open(file, "w", format="mp4", options=OPTIONS)
        self._out = self._container.add_stream_from_template(stream)
        if stream.codec_context.name == "hevc":
            self._out.codec_context.codec_tag = "hvc1"  # Apple's players take no other
        self._clock: Fraction = stream.time_base
        self._first: int | None = None
        self._last, self._step = -1, 1

    def add(self, item: Any) -> None:
        """The next packet; the first one has to be a key frame. Where the camera's clock leaps, it just follows."""
        if self._first is None and not item.key:
            return
        dts = item.dts if item.dts is not None else item.pts
        if dts is None:
            return
        self._first = dts if self._first is None else self._first
        step = dts - self._first - self._last
        if not 0 < step * self._clock <= _GAP:
            self._first += step - self._step
            step = self._step
        self._last, self._step = self._last + step, step
        packet = av.Packet(item.data)
        packet.stream, packet.time_base, packet.is_keyframe = self._out, self._clock, item.key
        packet.dts, packet.pts = self._last, (dts if item.pts is None else item.pts) - self._first
        try:
            self._container.mux(packet)
        except (FFmpegError, ValueError) as error:
            _LOG.warning("%s: a packet cannot be copied: %s", self.file.path.name, error)

    def close(self) -> None:
        """Finish the file."""
        if self._first is None:
            self.file.failed = True
        try:
            self._container.close()
        except FFmpegError as error:
            _LOG.warning("%s cannot be finished: %s", self.file.path.name, error)
        self.file.close()


class _EncodedClip:
    """Frames, encoded."""

    def __init__(self, file: ClipFile) -> None:
        self.file = file
        self._writer = VideoWriter(file.path, quality=26, file=file)  # type: ignore[arg-type]
        self._first: float | None = None

    def add(self, item: Any) -> None:
        """The next frame and its time."""
        at, image = item
        self._first = at if self._first is None else self._first
        try:
            self._writer.write(image, at - self._first)
        except UserError as error:
            _LOG.warning("%s", error)

    def close(self) -> None:
        """Finish the file."""
        try:
            self._writer.close()
        except UserError as error:
            _LOG.warning("%s", error)
        self.file.close()
