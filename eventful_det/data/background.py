"""Reading in a thread: ahead of the reader without loss, or always the newest item."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_JOIN_SECONDS = 1.0  # that `close` waits for the thread


class BackgroundReader(Iterator[T], Generic[T]):
    """Runs an iterator in a thread and hands out its items.

    Errors of the iterator are raised at the reader, after the last item. The thread ends with `close`, and when nobody
    refers to this object any more; one that waits inside its iterator does so when that delivers, ends or fails.

    Args:
        items: the iterator; only the thread touches it. It must not refer to this object.
        ahead: items that may wait for the reader.
        newest: where a further item pushes the oldest waiting one out; otherwise it waits itself.
        finish: called in the thread when it is done with the iterator.
        arrived: called in the thread whenever there is something to poll.
    """

    def __init__(
        self,
        items: Iterator[T],
        ahead: int = 1,
        *,
        newest: bool = False,
        finish: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue: _Queue[T] = _Queue(ahead, newest)
        # The thread knows the queue, not this object: so it does not keep alive what nobody reads any more.
        self._thread = threading.Thread(
            target=self._queue.fill, args=(items, finish, arrived), name="background-reader", daemon=True
        )
        weakref.finalize(self, self._queue.stop)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Items that were pushed out so far."""
        return self._queue.dropped

    def __next__(self) -> T:
        return self._queue.take()

    def poll(self, seconds: float = 0.0) -> T | None:
        """The next item, or None if there is none within some seconds.

        Raises:
            StopIteration: there will be no further one. Errors of the iterator are raised here, too.
        """
        return self._queue.take() if self._queue.wait(seconds) else None

    def close(self) -> None:
        """Stop the thread."""
        self._queue.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)


class _Queue(Generic[T]):
    """What the thread and its reader share."""

    def __init__(self, ahead: int, newest: bool) -> None:
        self.dropped = 0
        self._newest = newest
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque(maxlen=ahead)
        self._error: BaseException | None = None
        self._stopped = False

    def fill(self, items: Iterator[T], finish: Callable[[], None], arrived: Callable[[], None]) -> None:
        """The thread."""
        error: BaseException | None = None
        try:
            for item in items:
                if not self._put(item):
                    break
                del item  # or it would be kept until the next one comes
                arrived()
        except BaseException as caught:
            error = caught
        try:
            finish()
        except BaseException as caught:
            error = error or caught
        with self._changed:
            self._stopped, self._error = True, error
            self._changed.notify_all()
        arrived()

    def _put(self, item: T) -> bool:
        """Let an item wait for the reader; False when there is none any more."""
        with self._changed:
            full = len(self._waiting) == self._waiting.maxlen
            if full and self._newest:
                self.dropped += 1
            elif full:
                self._changed.wait_for(lambda: self._stopped or len(self._waiting) != self._waiting.maxlen)
            if self._stopped:
                return False
            self._waiting.append(item)
            self._changed.notify_all()
            return True

    def wait(self, seconds: float | None = None) -> bool:
        """Whether `take` would not wait, after some seconds at most."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._waiting or self._stopped, seconds))

    def take(self) -> T:
        with self._changed:
            self.wait()
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            raise self._error if self._error is not None else StopIteration

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
