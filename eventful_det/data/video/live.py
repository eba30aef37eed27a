"""Cameras and streams from the network: they do not wait, and they come and go.

Whoever reads too slowly should see the present, not an ever older past; and a camera that restarts should not end the
program that watches it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eventful_det.data.source import VideoFrame, VideoSource
from eventful_det.errors import UserError

RECONNECT = 30.0  # seconds for which a stream that was lost is called again
_PAUSES = (0.25, 4.0)  # seconds between the calls: at first, and at most
_REASONS = 20  # that are logged while a stream is lost; some tell ports and addresses, which differ each time
_LATE = 1.0  # seconds; frames that are older are not worth decoding
_CALL = 1e-3  # seconds that the call for a frame that is there may take
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedFrame:
    """A frame that came, not yet turned into a picture.

    Attributes:
        captured: when, on the clock of `time.monotonic`.
        picture: makes the `(h, w, 3)` uint8 RGB picture.
    """

    captured: float
    picture: Callable[[], NDArray[np.uint8]]


class Connection(Protocol):
    """To a camera or server; used by one thread at a time."""

    fps: float | None

    def read_live(self, skip: Callable[[str, object], None]) -> Iterator[CapturedFrame | None]:
        """What comes; None stands for a frame that was passed over. Ends, or raises UserError, when it is lost."""

    def close(self) -> None:
        """Hang up."""


class LiveClock:
    """Tells when the frames of a stream were captured, and which are worth decoding.

    A frame for which its reader had to wait has just come: nothing lies in buffers before it, so it is of the present,
    whatever its time stamp says. FFmpeg makes up the stamps of formats that have none (JPEGs over HTTP, raw H.264: 25 a
    second), clocks of cameras drift, and streams that paused begin anew. Between such frames stamps tell the age: that
    of a frame is what it waited in buffers longer than the others, above all because its reader was slow. When frames
    get older than a second, all are passed over until a key frame comes in time.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._offset, self._stamp, self._late = math.inf, -math.inf, False

    def admit(self, stamp: float | None, key: bool, asked: float) -> float | None:
        """When a frame was captured; None if it is not worth decoding.

        Args:
            stamp: its time stamp in seconds; these grow within a stream.
            key: it can be decoded without those before it.
            asked: when its reader began to wait for it.
        """
        now = self._now()
        if stamp is None:
            return now
        just_come = now - asked > max((stamp - self._stamp) / 2, _CALL)
        anew = just_come or stamp < self._stamp
        self._offset = now - stamp if anew else min(now - stamp, self._offset)
        self._stamp = stamp
        captured = stamp + self._offset
        if now - captured > _LATE:
            self._late = True
        elif key:
            self._late = False
        return None if self._late else captured


class LiveSource(VideoSource):
    """The newest frame of a camera or stream; those that were overtaken are dropped and counted.

    A stream that is lost is called again, at growing intervals. One that broke off and does not come back is an error;
    one that ended and does not is over.

    Args:
        name: for people.
        connection: the first one, open.
        connect: opens another; raises UserError if there is none.
        reconnect: seconds for which a lost stream is called again.
    """

    live = True

    def __init__(
        self, name: str, connection: Connection, connect: Callable[[], Connection], reconnect: float = RECONNECT
    ) -> None:
        super().__init__(name, connection.fps)
        self._connection, self._connect, self._reconnect = connection, connect, reconnect
        self._passed_over = 0
        self._lost_at: float | None = None
        self._pause, self._logged = _PAUSES[0], set[str]()
        self._closed = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether it is lost, and being called again."""
        return self._lost_at is not None

    def _frames(self) -> Iterator[VideoFrame]:
        return self._read()

    def _read(self) -> Iterator[VideoFrame]:
        reader = self._in_background(self._follow(), newest=True)
        weakref.finalize(reader, self._closed.set)  # a lost stream is not called again when nobody waits for it
        began, connections = None, 0
        for connection, frame in reader:
            self.dropped = reader.dropped + self._passed_over
            began = frame.captured if began is None else began
            yield VideoFrame(frame.picture(), frame.captured - began, frame.captured, connection != connections)
            connections = connection

    def _follow(self) -> Iterator[tuple[int, CapturedFrame]]:
        """What comes over one connection after the other, with the number of the connection."""
        while True:
            error: UserError | None = None
            try:
                for frame in self._connection.read_live(self._skip):
                    if self._closed.is_set():
                        return
                    if frame is None:
                        self._passed_over += 1
                        continue
                    self._found()
                    yield self.reconnects, frame
            except UserError as caught:
                error = caught
            self._connection.close()
            connection = self._call_again(error)
            if connection is None:
                return
            self._connection = connection

    def _found(self) -> None:
        """A frame came."""
        if self._lost_at is not None:
            self.reconnects += 1
            _LOG.warning("%s: is back after %.1f s", self.name, time.monotonic() - self._lost_at)
        self._lost_at, self._pause = None, _PAUSES[0]

    def _call_again(self, error: UserError | None) -> Connection | None:
        """Another connection; None if the stream is over."""
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self._logged.clear()
        self._log_once(error or f"{self.name} ended")
        while (left := self._lost_at + self._reconnect - time.monotonic()) > 0:
            if self._closed.wait(min(self._pause, left)):
                return None
            self._pause = min(2 * self._pause, _PAUSES[1])
            try:
                return self._connect()
            except UserError as refused:
                self._log_once(refused)
        if error is not None:
            raise UserError(f"{error}; it did not come back within {self._reconnect:g} s")
        return None

    def _log_once(self, why: object) -> None:
        """Log why there is no picture; each reason once while the stream is lost, and not endlessly many."""
        if len(self._logged) < _REASONS and str(why) not in self._logged:
            self._logged.add(str(why))
            how_long = f" for {self._reconnect:g} s" if self._reconnect < math.inf else ""
            _LOG.warning("%s; calling again%s", why, how_long)

    def _release(self) -> None:
        self._connection.close()

    def close(self) -> None:
        """Hang up. A thread that waits for the network does so when it is done."""
        self._closed.set()
        super().close()
