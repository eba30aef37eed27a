"""serving/playback.py: files at the pace of their clock."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np

from eventful_det.data.video import VideoFrame, VideoSource
from eventful_det.serving.playback import Playback


class Numbers(VideoSource):
    """Frames that know their index."""

    def __init__(self, count: int = 4, clock: bool = True) -> None:
        super().__init__("numbers", 50.0 if clock else None, count)
        self.count, self.clock = count, clock

    def _read(self) -> Iterator[VideoFrame]:
        for index in range(self.count):
            yield VideoFrame(np.full((2, 2, 3), index, np.uint8), index / 50 if self.clock else None)


def test_pace_and_turns() -> None:
    began = time.monotonic()
    frames = list(itertools.islice(Playback(Numbers, "numbers"), 11))
    assert time.monotonic() - began >= 10 / 50 - 0.001
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 1, 2, 3] * 2 + [0, 1, 2]
    times = [frame.timestamp or 0.0 for frame in frames]
    assert np.allclose(np.diff(times), 1 / 50)


def test_sources_without_a_clock_get_one() -> None:
    playback = Playback(lambda: Numbers(clock=False), "numbers")
    times = [frame.timestamp or 0.0 for frame in itertools.islice(playback, 6)]
    assert playback.fps == 25 and np.allclose(np.diff(times), 1 / 25)


def test_a_slow_reader_does_not_cause_a_rush() -> None:
    frames = iter(Playback(lambda: Numbers(100), "numbers"))
    next(frames)
    time.sleep(0.2)
    began = time.monotonic()
    for _ in range(5):
        next(frames)
    assert time.monotonic() - began >= 3.5 / 50


def test_closing_ends_the_wait() -> None:
    class Slow(Numbers):
        def _read(self) -> Iterator[VideoFrame]:
            yield VideoFrame(np.zeros((2, 2, 3), np.uint8), 0.0)
            yield VideoFrame(np.zeros((2, 2, 3), np.uint8), 1e6)

    playback = Playback(Slow, "slow")
    thread = threading.Thread(target=lambda: list(playback), daemon=True)
    thread.start()
    time.sleep(0.05)
    playback.close()
    thread.join(5)
    assert not thread.is_alive()


class Jumps(Numbers):
    """A recording whose clock jumps ahead by hours, and back."""

    def _read(self) -> Iterator[VideoFrame]:
        for stamp in (0.0, 0.02, 3600.0, 3600.02, 5.0, 5.02):
            yield VideoFrame(np.zeros((2, 2, 3), np.uint8), stamp)


def test_a_clock_that_jumps_neither_stops_nor_hurries_it() -> None:
    began = time.monotonic()
    times = [frame.timestamp or 0.0 for frame in itertools.islice(Playback(Jumps, "jumps"), 9)]
    assert np.allclose(np.diff(times), 1 / 50)
    assert 8 / 50 - 0.001 <= time.monotonic() - began < 5
