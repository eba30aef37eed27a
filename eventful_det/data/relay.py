"""Hands items from one thread to another: all of them, or the newest."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_GRACE = 1.0  # seconds that `close` waits for the thread


class Relay(Iterator[T], Generic[T]):
    """Runs an iterator in a thread and hands out its items.

    Errors of the iterator are raised at the reader, after the last item.

    Args:
        items: the iterator; only the thread touches it.
        ahead: items that may wait for the reader.
        overtake: where a further item pushes the oldest waiting one out; otherwise it waits itself.
        finish: called in the thread when it is done with the iterator.
        arrived: called in the thread whenever there is something to poll.

    Attributes:
        dropped: items that were pushed out so far.
    """

    def __init__(
        self,
        items: Iterator[T],
        ahead: int = 1,
        *,
        overtake: bool = False,
        finish: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        self.dropped = 0
        self._items, self._overtake, self._finish, self._arrived = items, overtake, finish, arrived
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque(maxlen=ahead)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    break
                self._arrived()
        except BaseException as caught:
            error = caught
        try:
            self._finish()
        except BaseException as caught:
            error = error or caught
        with self._changed:
            self._stopped, self._error = True, error
            self._changed.notify_all()
        self._arrived()

    def _put(self, item: T) -> bool:
        """Let an item wait for the reader; False when there is none any more."""
        with self._changed:
            full = len(self._waiting) == self._waiting.maxlen
            if full and self._overtake:
                self.dropped += 1
            elif full:
                self._changed.wait_for(lambda: self._stopped or len(self._waiting) != self._waiting.maxlen)
            if self._stopped:
                return False
            self._waiting.append(item)
            self._changed.notify_all()
            return True

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            return self._take()

    def poll(self) -> T | None:
        """The next item, or None if there is none yet. Raises StopIteration at the end, and errors of the iterator."""
        with self._changed:
            return self._take() if self._waiting or self._stopped else None

    def _take(self) -> T:
        if self._waiting:
            self._changed.notify_all()
            return self._waiting.popleft()
        raise self._error if self._error is not None else StopIteration

    def close(self) -> None:
        """Stop the thread. One that waits inside its iterator ends by itself when that delivers, ends or fails."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_GRACE)
