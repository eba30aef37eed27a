"""Run a function over many items in worker processes, results in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from eventful_det.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map`` with processes: lazy to read, in the order of ``items``, in this process when ``workers`` is 1.

    An exception in a worker is raised here, and whatever has not been started then is not started any more.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # spawn, because the caller may have threads (a progress bar) that a fork would copy half of
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory; try again with --workers 1") from None


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    cv2.setNumThreads(1)  # the processes are the parallelism
