"""The frames of one source as a pool reads them: in order, or, of a live source, the newest."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from eventful_det.data.relay import Relay
from eventful_det.data.video import VideoFrame, VideoSource, open_source


class Feed(Protocol):
    """Where a stream's frames come from."""

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones so far."""

    @property
    def lost(self) -> bool:
        """Whether the source is lost, and being called again."""

    def poll(self) -> VideoFrame | None:
        """The next frame, or None if there is none yet. Raises StopIteration at the end, and errors of the source."""

    def close(self) -> None:
        """Release the source."""


class FileFeed:
    """Every frame, in order; always ready. May be closed by another thread than the one that polls."""

    dropped, lost = 0, False

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


class ThreadFeed:
    """Frames that are read in a thread of their own, so that nobody waits for a camera or the network.

    Args:
        source: of the frames.
        live: the newest frame alone counts, those that were overtaken are dropped and counted; otherwise all do.
        arrived: called, in the thread, whenever there is something to poll.
    """

    def __init__(self, source: VideoSource, live: bool, arrived: Callable[[], None]) -> None:
        self._source = source
        frames = map(_captured, source) if live else iter(source)
        self._relay = Relay(frames, overtake=live, finish=source.close, arrived=arrived)

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones so far, here or in the source."""
        return self._relay.dropped + self._source.dropped

    @property
    def lost(self) -> bool:
        """Whether the source is lost, and being called again."""
        return self._source.lost

    def poll(self) -> VideoFrame | None:
        """The next frame, if it is there; errors come after the last one."""
        return self._relay.poll()

    def close(self) -> None:
        """Release the source; a thread that waits for its next frame ends when that comes."""
        if self._source.live:  # it can be closed while it is read, which ends the wait for its next frame
            self._source.close()
        self._relay.close()


def _captured(frame: VideoFrame) -> VideoFrame:
    """The frame with the time at which it was captured: now, if its source does not tell."""
    return frame if frame.captured is not None else dataclasses.replace(frame, captured=time.monotonic())


def open_feed(source: Any, live: bool | None, arrived: Callable[[], None]) -> tuple[Feed, str]:
    """Open a source; also its name for people.

    Args:
        source: as for `open_source`.
        live: whether only its newest frame counts; None = as the source says: cameras and streams from the network.
        arrived: called whenever a source that is read in a thread has something to poll.

    Raises:
        UserError: the source cannot be opened.
    """
    opened = open_source(source)
    live = opened.live if live is None else live
    threaded = live or opened.remote
    return ThreadFeed(opened, live, arrived) if threaded else FileFeed(opened), opened.name
