"""Files played as if they were cameras: by the clock, over and over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from eventful_det.data.video import VideoFrame, VideoSource

_FPS = 25.0  # of sources without a clock
_GAP = 10.0  # seconds; a clock that goes back, or further ahead than this at once, is not believed


class Playback(VideoSource):
    """A source at the pace of its clock. A detector that is slower than the clock misses frames, as with a camera.

    Args:
        reopen: opens the source, for every turn anew.
        name: for people.
    """

    live = True

    def __init__(self, reopen: Callable[[], VideoSource], name: str) -> None:
        with reopen() as source:
            super().__init__(name, source.fps or _FPS)
        self._reopen = reopen
        self._closed = threading.Event()

    def _read(self) -> Iterator[VideoFrame]:
        began, timestamp = time.monotonic(), 0.0  # when the first frame was due; of the next frame, over all turns
        period = 1 / (self.fps or _FPS)
        while not self._closed.is_set():
            last = 0.0  # of the source's own clock
            with self._reopen() as source:
                source.skipped = self.skipped  # what is told once is not told again on every turn
                for index, frame in enumerate(source):
                    own = index / _FPS if frame.timestamp is None else frame.timestamp
                    timestamp += own - last if 0 <= own - last <= _GAP else period
                    last = own
                    late = time.monotonic() - began - timestamp
                    if self._closed.wait(max(0.0, -late)):
                        return
                    began += max(0.0, late)  # decoding is slower than the clock: do not hurry afterwards
                    yield VideoFrame(frame.image, timestamp)
                self.skipped = source.skipped
            timestamp += period

    def close(self) -> None:
        self._closed.set()
