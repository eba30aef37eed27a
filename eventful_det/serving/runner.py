"""Drives a pool of streams in a thread of its own; whoever watches, however slowly, does not hold it up."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import Selector
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.motion.key_frames import Hold
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.rescoring import Rescorer
from eventful_det.runtime.session import StreamOptions
from eventful_det.runtime.tracking import Tracker
from eventful_det.serving.sources import OpenedSource
from eventful_det.serving.views import AnyPool, AnyResult, CostSample, Follower, LatestFrame, StreamView

AUTO = "auto"  # the budget with which the selector that the pool had at first decides
_STUCK = 120.0  # seconds without a round
_LOG = logging.getLogger(__name__)


class PoolRunner:
    """Runs the rounds of a pool. All methods may be called from any thread.

    Args:
        pool: of streams; closed with the runner.
        max_streams: at the same time.
        track: give objects ids.
        rescore: judge boxes by the last frames, not by one alone.
        min_score: detections of a lower score are not shown.

    Attributes:
        views: by name, in the order of joining; hold `lock` to read them.
        on_round: called in the runner's thread after every round.
    """

    def __init__(
        self,
        pool: AnyPool,
        *,
        max_streams: int = 16,
        track: bool = False,
        rescore: bool = False,
        min_score: float = 0.0,
    ) -> None:
        self.pool: StreamPool[Any] = pool
        self.max_streams, self.track, self.rescore, self.min_score = max_streams, track, rescore, min_score
        self.lock = threading.Lock()
        self.views: dict[str, StreamView] = {}
        self.on_round: Callable[[], None] = lambda: None
        self._own_budget = pool.budget if isinstance(pool.budget, Selector) else None
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._round_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the present round; close and release all streams."""
        self._stopped.set()
        self.pool.close()
        self._wake.set()
        self._thread.join()
        for view in self.views.values():
            view.release()

    def set_budget(self, text: str) -> None:
        """Have rounds from now on cost no more than this: "25%", "40 GMACs", "50ms", "96 tokens", or "auto".

        Raises:
            UserError: the budget cannot be understood, or the detector's rule cannot hold it.
        """
        if self.pool.rule == Dense():
            raise UserError("the detector is dense (gate=dense); it has no budget to set")
        self.pool.budget = self._own_budget if text.strip().lower() == AUTO else parse_budget(text)

    def add(
        self,
        opened: OpenedSource,
        *,
        short_side: int | None = None,
        hold: Hold = None,
        options: StreamOptions | None = None,
        follow: Follower | None = None,
    ) -> str:
        """Have a stream join.

        Args:
            opened: the stream.
            short_side, hold, options: its own, see `StreamPool.add`.
            follow: works over its results in place of the usual followers; its objects have ids. Such a stream always
                has room: the server was started for it.

        Returns:
            Its unique name.

        Raises:
            UserError: there are too many streams already.
        """
        followers: list[Follower] = [Rescorer()] if self.rescore else []
        if self.track:
            followers.append(Tracker(opened.source.fps))
        if self.min_score:
            followers.append(lambda result: result.at_least(self.min_score))
        if follow is not None:
            followers = [follow]
        tracked = follow is not None
        with self.lock:
            if follow is None:
                self.check_room()
            numbered = (f"{opened.name}-{i}" for i in itertools.count(2))
            free = next(n for n in itertools.chain([opened.name], numbered) if n not in self.views)
            name = self.pool.add(
                opened.source, name=free, short_side=short_side, hold=hold, track=tracked, options=options
            )
            self.views[name] = StreamView(opened.title, opened.release, followers)
        self._wake.set()
        return name

    def check_room(self) -> None:
        """Raises UserError if there are too many streams for another one."""
        if len(self.views) >= self.max_streams:
            raise UserError(f"there are {self.max_streams} streams already; remove one first")

    def remove(self, name: str) -> bool:
        """Have a stream leave; whether there was one."""
        with self.lock:
            view = self.views.pop(name, None)
        if view is None:
            return False
        with contextlib.suppress(UserError):  # it may have left by itself
            self.pool.remove(name)
        view.release()
        return True

    @property
    def stuck(self) -> bool:
        """Whether the detector does nothing although there are streams that deliver frames."""
        waiting = any(one.active and not one.lost for one in self.pool.metrics().streams.values())
        return not self._thread.is_alive() or (waiting and time.monotonic() - self._round_at > _STUCK)

    def newest(self, name: str) -> LatestFrame | None:
        """The newest frame of a stream; None if it has none, or there is no such stream."""
        with self.lock:
            view = self.views.get(name)
            return None if view is None else view.newest

    def unseen(self, name: str, seen: int, *, late: bool = False) -> list[tuple[LatestFrame, list[CostSample]]]:
        """What is kept of a stream after the frame numbered `seen`, oldest first.

        Args:
            late: leave out all but the newest frame.

        Returns:
            Each frame with the costs of it and of those that are missing before it.
        """
        with self.lock:
            view = self.views.get(name)
            if view is None or view.newest is None:
                return []
            if view.newest.number < seen:  # another stream of the same name
                seen = 0
            frames = [frame for frame in view.frames if frame.number > seen][-1 if late else 0 :]
            since = [seen, *(frame.number for frame in frames)]
            costs = [[one for one in view.history if a < one.number <= b] for a, b in itertools.pairwise(since)]
            return list(zip(frames, costs, strict=True))

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                results = next(self.pool, None)
            except Exception as error:
                _LOG.exception("a round failed")
                self._give_up(f"the detector failed: {type(error).__name__}: {error}")
                continue
            if results is None:  # there is no stream
                self._wake.wait()
                self._wake.clear()
                self._round_at = time.monotonic()
            else:
                self._round_at = time.monotonic()
                self._show(results)
            self.on_round()

    def _show(self, results: Sequence[AnyResult]) -> None:
        with self.lock:
            for result in results:
                view = self.views.get(result.stream)
                if view is None:  # it left during the round
                    continue
                try:
                    view.show(result)
                except Exception as error:  # whatever is wrong with one stream must not stop the others
                    _LOG.exception("%s: a frame cannot be shown", result.stream)
                    view.error = f"{type(error).__name__}: {error}"

    def _give_up(self, error: str) -> None:
        """Stop all streams; viewers see why."""
        with self.lock:
            for view in self.views.values():
                view.error = view.error or error
        self.pool.close()
