"""The frames of one source as a pool reads them: in order, or, of a live source, the newest."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from eventful_det.data.video import VideoFrame, VideoSource, open_source

_GRACE = 1.0  # seconds to wait for a thread that may be waiting for its source


class Feed(Protocol):
    """Where a stream's frames come from."""

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones so far."""

    def poll(self) -> VideoFrame | None:
        """The next frame, or None if there is none yet. Raises StopIteration at the end, and errors of the source."""

    def close(self) -> None:
        """Release the source."""


class FileFeed:
    """Every frame, in order; always ready. May be closed by another thread than the one that polls."""

    dropped = 0

    def __init__(self, source: VideoSource) -> None:
        self._source, self._frames = source, iter(source)
        self._lock = threading.Lock()  # a decoder must not be closed while it decodes, nor used afterwards
        self._closed = False

    def poll(self) -> VideoFrame | None:
        """The next frame."""
        with self._lock:
            if self._closed:
                raise StopIteration
            return next(self._frames)

    def close(self) -> None:
        """Release the source."""
        with self._lock:
            self._closed = True
            self._source.close()


class LiveFeed:
    """The newest frame, read in a thread of its own; those that were overtaken are dropped and counted."""

    def __init__(self, source: VideoSource, arrived: Callable[[], None]) -> None:
        """`arrived` is called, in the thread, whenever there is something to poll."""
        self._source, self._arrived = source, arrived
        self._overtaken = 0
        self._lock = threading.Lock()
        self._newest: VideoFrame | None = None
        self._end: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read, name=f"feed {source.name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones so far, here or in the source."""
        return self._overtaken + self._source.dropped

    def poll(self) -> VideoFrame | None:
        """The newest frame that was not polled before; errors come after the last frame."""
        with self._lock:
            newest, self._newest = self._newest, None
            if newest is None and self._end is not None:
                raise self._end
            return newest

    def close(self) -> None:
        """Release the source; a thread that waits for its next frame ends when that comes."""
        self._closed = True
        if self._source.live:  # it can be closed while it is read, which ends the wait for its next frame
            self._source.close()
        self._thread.join(_GRACE)

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for frame in self._source:
                if self._closed:
                    break
                if frame.captured is None:
                    frame = dataclasses.replace(frame, captured=time.monotonic())
                with self._lock:
                    self._overtaken += self._newest is not None
                    self._newest = frame
                self._arrived()
        except Exception as error:
            end = error
        finally:
            self._source.close()
        with self._lock:
            self._end = end
        self._arrived()


def open_feed(source: Any, live: bool | None, arrived: Callable[[], None]) -> tuple[Feed, str]:
    """Open a source; also its name for people.

    Args:
        source: as for `open_source`.
        live: whether only its newest frame counts; None = as the source says: cameras and streams from the network.
        arrived: called whenever a live source has something to poll.

    Raises:
        UserError: the source cannot be opened.
    """
    opened = open_source(source)
    return LiveFeed(opened, arrived) if (opened.live if live is None else live) else FileFeed(opened), opened.name
