"""The frames of one source as a pool reads them: in order, or, of a live source, the newest."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from eventful_det.data.background import BackgroundReader
from eventful_det.data.video import Source, VideoFrame, open_source

_PATIENCE = 0.5  # seconds; a local source that takes longer for a frame is not waited for until it has one


class Feed:
    """Frames that are read in a thread of their own, so that nobody waits for a camera, the network or a slow iterable.

    Args:
        given: a source as for `open_source`.
        live: the newest frame alone counts, those that were overtaken are dropped and counted; otherwise all do. None =
            as the source says: cameras and streams from the network are live.
        arrived: called, in the thread, whenever there is something to poll.

    Raises:
        UserError: the source cannot be opened, or is being read already.
    """

    def __init__(self, given: Source, live: bool | None, arrived: Callable[[], None]) -> None:
        self._source = source = open_source(given)
        self.drawn = getattr(source, "arrays", source)  # of an iterator there is only one reader
        live = source.live if live is None else live
        frames = map(_captured, source) if live else iter(source)
        self._reader = BackgroundReader(frames, newest=live, finish=source.close, arrived=arrived)
        self._patience = self._patient = 0.0 if live or source.remote else _PATIENCE

    @property
    def name(self) -> str:
        """Of the source, for people."""
        return self._source.name

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones so far, here or in the source."""
        return self._reader.dropped + self._source.dropped

    @property
    def lost(self) -> bool:
        """Whether the source is lost, and being called again."""
        return self._source.lost

    def poll(self) -> VideoFrame | None:
        """The next frame, or None if there is none yet.

        Files are waited for, so that each of their frames has its round; one that hangs is waited for once.

        Raises:
            StopIteration: the source has ended. Errors of the source come after its last frame.
        """
        frame = self._reader.poll(self._patience)
        self._patience = 0.0 if frame is None else self._patient
        return frame

    def close(self) -> None:
        """Release the source; a thread that waits for its next frame ends when that comes."""
        if self._source.live:  # it can be closed while it is read, which ends the wait for its next frame
            self._source.close()
        self._reader.close()


def _captured(frame: VideoFrame) -> VideoFrame:
    """The frame with the time at which it was captured: now, if its source does not tell."""
    return frame if frame.captured is not None else dataclasses.replace(frame, captured=time.monotonic())
