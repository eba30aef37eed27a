"""Drives a pool of streams in a thread of its own; whoever watches, however slowly, does not hold it up."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

from eventful_det.data.video import VideoSource
from eventful_det.runtime.tracking import Tracker
from eventful_det.serving.channel import Channel, Mark, Shot
from eventful_det.serving.pool import StreamPool

T = TypeVar("T")
_IDLE = 0.01  # seconds to wait when no stream has a frame
_LOG = logging.getLogger(__name__)


class Engine:
    """The one thread that uses the detector. Everyone else asks it to do something between two rounds.

    Args:
        pool: of streams; the engine closes it.
        track: give objects ids.

    Attributes:
        channels: by name, in the order of joining; read them under `lock`.
        on_news: called in the engine's thread after every round and every change.
    """

    def __init__(self, pool: StreamPool, track: bool = False) -> None:
        self.pool, self.track = pool, track
        self.lock = threading.Lock()
        self.channels: dict[str, Channel] = {}
        self.on_news: Callable[[], None] = lambda: None
        self._wishes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the present round; close and release all streams."""
        self._wishes.put(None)
        self._thread.join()
        self.pool.close()
        for channel in self.channels.values():
            channel.release()

    def ask(self, wish: Callable[[], T]) -> Future[T]:
        """Have something done between two rounds."""
        answer: Future[T] = Future()

        def grant() -> None:
            try:
                answer.set_result(wish())
            except BaseException as error:
                answer.set_exception(error)

        self._wishes.put(grant)
        return answer

    def set_budget(self, budget: Any) -> Future[None]:
        """Have every frame from now on cost no more than `budget`."""
        return self.ask(lambda: setattr(self.pool, "budget", budget))

    def add(self, source: VideoSource, title: str, name: str, release: Callable[[], None]) -> Future[str]:
        """Have a stream join; its name is `name`, with a number when that is taken."""

        def join() -> str:
            tracker = Tracker(source.fps) if self.track else None
            numbered = (f"{name}-{i}" for i in itertools.count(2))
            free = next(n for n in itertools.chain([name], numbered) if n not in self.channels)
            own = self.pool.add(source, name=free, live=True)
            with self.lock:
                self.channels[own] = Channel(own, title, release, tracker)
            return own

        return self.ask(join)

    def remove(self, name: str) -> Future[None]:
        """Have a stream leave."""

        def leave() -> None:
            if name in self.pool.names:
                self.pool.remove(name)
            with self.lock:
                channel = self.channels.pop(name, None)
            if channel is not None:
                channel.release()

        return self.ask(leave)

    def newest(self, name: str, seen: int = 0) -> tuple[Shot, list[Mark]] | None:
        """The newest frame of a stream, and the marks of all frames after the one numbered `seen`.

        None if there is no newer frame, or no such stream.
        """
        with self.lock:
            channel = self.channels.get(name)
            if channel is None or channel.newest is None or channel.newest.sequence == seen:
                return None
            return channel.newest, [mark for mark in channel.history if mark.sequence > seen]

    def _run(self) -> None:
        quiet = False
        while True:
            patience = None if not self.pool.names else _IDLE if quiet else 0.0
            try:
                wish = self._wishes.get(timeout=patience)
            except queue.Empty:
                quiet = not self._round()
                continue
            if wish is None:
                return
            wish()
            self.on_news()

    def _round(self) -> bool:
        """One frame of every stream that has one; whether there was any."""
        try:
            results = self.pool.step()
        except Exception as error:
            _LOG.exception("a round failed")
            self._end(self.pool.names, f"{type(error).__name__}: {error}")
            return False
        with self.lock:
            for result in results:
                self.channels[result.stream].show(result)
        gone = self.channels.keys() - set(self.pool.names)
        self._end([name for name in gone if self.channels[name].status in ("starting", "running")])
        if results:
            self.on_news()
        return bool(results)

    def _end(self, names: Collection[str], error: str | None = None) -> None:
        """Note that streams have left the pool, or take them out because of an error."""
        if not names:
            return
        streams = self.pool.metrics().streams
        for name in names:
            if name in self.pool.names:
                self.pool.remove(name)
            with self.lock:
                self.channels[name].end(error or streams[name].error)
        self.on_news()
