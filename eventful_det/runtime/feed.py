"""The frames of one source as a pool reads them: in order, or, of a live source, the newest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from eventful_det.data.video import VideoFrame, VideoSource, open_source


@dataclass(frozen=True)
class Arrival:
    """A frame, and when it was captured on the monotonic clock in seconds; None where frames wait to be read."""

    frame: VideoFrame
    captured: float | None = None


class Feed(Protocol):
    """Where a stream's frames come from.

    Attributes:
        dropped: frames that were overtaken by newer ones so far.
    """

    dropped: int

    def poll(self) -> Arrival | None:
        """The next frame, or None if there is none yet. Raises StopIteration at the end, and errors of the source."""

    def close(self) -> None:
        """Release the source."""


class FileFeed:
    """Every frame, in order; always ready."""

    def __init__(self, source: VideoSource) -> None:
        self.dropped = 0
        self._source, self._frames = source, iter(source)

    def poll(self) -> Arrival | None:
        """The next frame."""
        return Arrival(next(self._frames))

    def close(self) -> None:
        """Release the source."""
        self._source.close()


class LiveFeed:
    """The newest frame, read in a thread of its own; those that were overtaken are dropped and counted."""

    def __init__(self, source: VideoSource, arrived: Callable[[], None]) -> None:
        """`arrived` is called, in the thread, whenever there is something to poll."""
        self.dropped = 0
        self._source, self._arrived = source, arrived
        self._lock = threading.Lock()
        self._newest: Arrival | None = None
        self._end: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read, name=f"feed {source.name}", daemon=True)
        self._thread.start()

    def poll(self) -> Arrival | None:
        """The newest frame that was not polled before; errors come after the last frame."""
        with self._lock:
            newest, self._newest = self._newest, None
            if newest is None and self._end is not None:
                raise self._end
            return newest

    def close(self) -> None:
        """Release the source; a thread that waits for its next frame ends with it."""
        self._closed = True
        self._thread.join(timeout=1.0)
        self._source.close()

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for frame in self._source:
                if self._closed:
                    break
                with self._lock:
                    self.dropped += self._newest is not None
                    self._newest = Arrival(frame, time.monotonic())
                self._arrived()
        except Exception as error:
            end = error
        with self._lock:
            self._end = end
        self._arrived()


def open_feed(source: Any, live: bool | None, arrived: Callable[[], None]) -> tuple[Feed, str]:
    """Open a source; also its name for people.

    Args:
        source: as for `open_source`.
        live: whether only its newest frame counts; None = guess: webcams, and URLs of unknown length.
        arrived: called whenever a live source has something to poll.

    Raises:
        UserError: the source cannot be opened.
    """
    opened = open_source(source)
    if live is None:
        camera = isinstance(source, int) or isinstance(source, str) and source.isdigit()
        live = camera or "://" in opened.name and opened.frames is None
    return LiveFeed(opened, arrived) if live else FileFeed(opened), opened.name
