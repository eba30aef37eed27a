"""What every source of frames is: an iterable of `VideoFrame`, lazy, in constant memory."""

from __future__ import annotations

import logging
import os
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eventful_det.data.background import BackgroundReader
from eventful_det.errors import UserError, printable

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


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
    """Frames in order, once. Whoever stops reading, and drops the iterator, ends its thread as `close` does.

    Attributes:
        name: for people; passwords in addresses are hidden.
        fps: frames per second, or None where there is no clock.
        frames: estimate of the number of frames, or None if unknown.
        live: frames come when they come, and a slow reader gets the newest; other sources are read without loss.
        remote: it comes over the network, so that reading it may take long.
        ahead: frames that a thread reads ahead of the reader; 0 = each is read when it is asked for.
        skipped: pieces of the source that could not be read or decoded so far.
        dropped: frames of a live source that were overtaken by newer ones so far.
        reconnects: how often a live source was lost and came back.
    """

    live = False
    remote = False

    def __init__(self, name: str, fps: float | None = None, frames: int | None = None) -> None:
        self.name, self.fps, self.frames = printable(name), fps, frames
        self.ahead = 0
        self.skipped = self.dropped = self.reconnects = 0
        # Weak, as threads refer to their source: nobody but those who read keeps the readers alive.
        self._iterator: weakref.ref[Iterator[VideoFrame]] | None = None
        self._reader: weakref.ref[BackgroundReader[Any]] | None = None

    @property
    def lost(self) -> bool:
        """Whether a live source is lost, and being called again."""
        return False

    def __iter__(self) -> Iterator[VideoFrame]:
        reading = None if self._iterator is None else self._iterator()
        if (
            isinstance(reading, GeneratorType) and reading.gi_frame is not None
        ):  # two readers would each get half of the frames
            raise UserError(f"{self.name} is being read already; open it once for each stream")
        iterator = self._iterate()
        self._iterator = weakref.ref(iterator)
        return iterator

    def _iterate(self) -> Iterator[VideoFrame]:
        empty = True
        for frame in self._frames():
            empty = False
            yield frame
        if empty:
            raise UserError(f"{self.name}: holds no frame that can be decoded")

    def _frames(self) -> Iterator[VideoFrame]:
        return self._in_background(self._read(), self.ahead) if self.ahead else self._read()

    def _in_background(self, items: Iterator[T], ahead: int = 1, newest: bool = False) -> BackgroundReader[T]:
        """Read in a thread, which is then the one that releases the source."""
        reader = BackgroundReader(items, ahead, newest=newest, finish=self._release)
        self._reader = weakref.ref(reader)
        return reader

    @abstractmethod
    def _read(self) -> Iterator[VideoFrame]:
        """The frames, in order."""

    def _release(self) -> None:
        """Let go of files, devices and connections; may be called again."""

    def close(self) -> None:
        """Release files, devices and connections. A thread that waits for the network releases them when it is done."""
        if self._reader is None:
            self._release()
        elif (reader := self._reader()) is not None:
            reader.close()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _skip(self, what: str, error: object) -> None:
        """Count a piece that cannot be read; warn of the first."""
        if not self.skipped:
            _LOG.warning("%s: skipping %s that cannot be decoded (%s), and others like it", self.name, what, error)
        self.skipped += 1


Source = int | str | os.PathLike[str] | Iterable[NDArray[np.uint8]] | VideoSource
"""A video file, webcam number, RTSP or HTTP URL, image folder or glob, an iterable of `(h, w, 3)` uint8 RGB arrays,
one such array, or an open `VideoSource`."""
