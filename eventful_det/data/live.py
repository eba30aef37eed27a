"""Sources that do not wait: whoever reads too slowly should see the present, not an ever older past."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Iterator[T], Generic[T]):
    """Runs an iterator in a thread and hands out its newest item only; those overtaken are dropped.

    Errors of the iterator are raised at the reader, after the last item.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._changed = threading.Condition()
        self._waiting: list[T] = []  # at most one
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                with self._changed:
                    self._waiting = [item]
                    self._changed.notify()
                    if self._stopped:
                        break
        except BaseException as caught:
            error = caught
        with self._changed:
            self._stopped, self._error = True, error
            self._changed.notify()

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if self._waiting:
                return self._waiting.pop()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread; waits until its iterator has delivered its next item."""
        with self._changed:
            self._stopped = True
        self._thread.join()
