"""A camera that is called until it answers, however long that takes, whose packets can be had."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from av.packet import Packet
from av.video import VideoStream

from eventful_det.data.video import VideoFrame, VideoSource, open_source
from eventful_det.data.video.decoder import Decoder, VideoFile
from eventful_det.data.video.live import CapturedFrame, Connection, LiveSource
from eventful_det.errors import UserError
from eventful_det.secrets import mask_secrets
from eventful_det.serving.playback import Playback

_SLOWEST = 1e-4  # frames per second; nobody can wait for much longer
Tap = Callable[["Packet[VideoStream]"], None]


class _NotYet:
    """A connection that is lost already, with which a camera begins: it is called as any other that was lost."""

    fps: float | None = None

    def __init__(self, name: str) -> None:
        self._name = name

    def read_live(self, _: Any) -> Iterator[CapturedFrame | None]:
        """Nothing comes."""
        raise UserError(f"{self._name} is not reached yet")

    def close(self) -> None:
        """Nothing to close."""


class Thinned(VideoSource):
    """At most so many frames per second of a live source.

    Args:
        source: live; closed with this one.
        rate: frames per second.
    """

    live = True

    def __init__(self, source: VideoSource, rate: float) -> None:
        rate = max(rate, _SLOWEST)
        super().__init__(source.name, min(rate, source.fps or rate))
        self._source, self._period = source, 1 / rate
        self._closed = threading.Event()

    @property
    def lost(self) -> bool:
        return self._source.lost

    def _read(self) -> Iterator[VideoFrame]:
        due = -math.inf
        for frame in self._source:
            self.skipped, self.reconnects = self._source.skipped, self._source.reconnects
            now = time.monotonic()
            if now < due - self._period / 10 and not frame.resumed:
                continue
            due = max(due, now - self._period) + self._period
            yield frame
            if isinstance(self._source, LiveSource):  # which has the newest frame afterwards, and made no other
                self._closed.wait(max(0.0, due - time.monotonic()))

    def close(self) -> None:
        self._closed.set()
        self._source.close()


def open_camera(place: str | int, tap: Tap, fps: float | None = None) -> VideoSource:
    """The frames of a camera; nothing it does makes them end.

    Args:
        place: an address; anything else is a source as for `open_source`, and files are played over and over.
        tap: called with each packet of addresses and files, in the thread that reads them.
        fps: frames per second at most.

    Raises:
        UserError: there is no such file or webcam. Addresses are called until they answer.
    """
    source: VideoSource
    if isinstance(place, str) and "://" in place:
        name = mask_secrets(place)
        source = LiveSource(name, _NotYet(name), partial(_connect, place, tap), math.inf)
    else:
        opened = open_source(place)
        if not opened.live:
            opened.close()
            opened = Playback(partial(_reopen, place, tap), opened.name)
        source = opened
    return source if fps is None else Thinned(source, fps)


def _connect(url: str, tap: Tap) -> Connection:
    decoder = Decoder(url)
    if not decoder.live:
        decoder.close()
        raise UserError(f"{decoder.name} is a video with an end, not a camera; give it as a file")
    decoder.tap = tap
    return decoder


def _reopen(place: str | int, tap: Tap) -> VideoSource:
    source = open_source(place)
    if isinstance(source, VideoFile):
        source.decoder.tap = tap
    return source
