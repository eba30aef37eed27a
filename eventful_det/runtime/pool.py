"""Many live streams on one detector and one budget.

::

    with StreamPool(load_detector(), budget=0.25) as pool:
        pool.add("rtsp://gate/stream", name="gate")
        pool.add("corridor.mp4")
        for results in pool:
            for result in results:
                print(result.stream, result.frame_index, len(result.detections))

Every round takes one frame of each stream that has one. The budget is that of a round, and goes where the changes are.
With `hold` the detector runs on every n-th frame of a stream only, and the streams take turns.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eventful_det.data.video import VideoFrame
from eventful_det.errors import UserError
from eventful_det.gating.state import State
from eventful_det.models.detector import Detector, DetectorStream, StepResult
from eventful_det.runtime.budget import Budget
from eventful_det.runtime.feed import Feed, open_feed
from eventful_det.runtime.metrics import PoolMetrics, Tally
from eventful_det.runtime.refresh import SceneCuts
from eventful_det.runtime.sharing import Terms
from eventful_det.runtime.spender import Account, Spender
from eventful_det.runtime.stream import StreamResult, Viewer, check_hold

_DEPARTED = 64  # streams that left, of which the metrics are kept
_PATIENCE = 0.5  # seconds to wait for a frame before looking again whether a stream is left


@dataclass
class _Member:
    """A stream of the pool.

    Attributes:
        turn: of `hold` rounds the one in which the detector is to run.
        last: what was found last, while it may be held; held: frames since then, and those left out to meet the turn.
    """

    name: str
    feed: Feed
    cuts: SceneCuts | None
    tally: Tally
    turn: int = 0
    last: StreamResult | None = None
    held: int = 0
    account: Account = field(default_factory=Account)
    memory: DetectorStream | None = None


@dataclass(frozen=True)
class _Ready:
    """A stream with its next frame, as it came and as the detector sees it."""

    member: _Member
    frame: VideoFrame
    image: Tensor
    cut: bool
    seconds: float


class StreamPool(Iterator[list[StreamResult]]):
    """Detects in many streams at once. Streams may join and leave, and the budget may change, between any two rounds.

    `add`, `remove`, `metrics` and `budget` may be used from other threads than the one that runs the rounds.

    Args:
        detector: in evaluation mode; its own rule and policy stay as they are.
        budget: what a round may cost: a share of the tokens (float), tokens (int), `Gmacs(40)`, `Latency(0.05)`, or a
            policy, which is asked about each stream alone; the detector's own policy if None.
        terms: what tokens are worth under a budget, what every stream may count on, what is kept of it, and how old
            tokens may grow. Under a policy only the last counts, and only if terms are given.
        short_side, long_side: of the network's input in pixels; the model's own if None.
        scene_cuts: recompute all of a stream when another scene begins in it.
        hold: run on every n-th frame of a stream only and hold its boxes in between; a scene cut ends that at once. The
            streams take turns, so that rounds cost alike, and the budget is for those whose turn it is.

    Raises:
        UserError: `hold` is below 1.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        budget: Budget | None = None,
        terms: Terms | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: int = 1,
    ) -> None:
        check_hold(hold)
        self.detector = detector.with_rule(copy.copy(detector.rule))
        self._spender = Spender(self.detector, budget, terms)
        self._viewer = Viewer.of(detector.config, short_side, long_side)
        self._scene_cuts, self._hold, self._rounds = scene_cuts, hold, 0
        self._members: dict[str, _Member] = {}
        self._departed: dict[str, Tally] = {}
        self._lock = threading.Lock()
        self._arrived = threading.Event()

    @property
    def budget(self) -> Budget | None:
        """What a round may cost, as it was set; None = the detector's own policy decides."""
        return self._spender.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._spender.budget = budget

    @property
    def names(self) -> tuple[str, ...]:
        """The streams of the pool."""
        with self._lock:
            return tuple(self._members)

    def add(self, source: Any, *, name: str | None = None, live: bool | None = None) -> str:
        """Let a stream join; its first frame is recomputed in full.

        Args:
            source: see `eventful_det.data.video.open_source`.
            name: by default that of the source; "-2" and so on is appended to one that is taken.
            live: whether only its newest frame counts, or all do; None = guess from the source.

        Returns:
            The stream's name.

        Raises:
            UserError: the source cannot be opened, or is a stream already.
        """
        with self._lock:  # an iterator that two streams share would give each half of its frames
            if isinstance(source, Iterator) and any(one.feed.given is source for one in self._members.values()):
                raise UserError("this iterator is a stream of the pool already; give each stream one of its own")
        feed, title = open_feed(source, live, self._arrived.set)
        with self._lock:
            unique = _unique(name or title, self._members)
            self._departed.pop(unique, None)
            cuts = SceneCuts() if self._scene_cuts else None
            self._members[unique] = _Member(unique, feed, cuts, Tally(), self._free_turn())
        self._arrived.set()
        return unique

    def remove(self, name: str) -> None:
        """Let a stream leave.

        Raises:
            UserError: there is none of this name.
        """
        if not self._leave(name):
            raise UserError(f"no stream {name!r} in the pool; there are: {', '.join(self.names) or 'none'}")

    def step(self) -> list[StreamResult]:
        """One round: the next frame of every stream that has one, in one step of the detector.

        A stream that ended or failed leaves; `metrics` tells why.

        Returns:
            A result for each of these streams; empty if none has a frame yet.
        """
        with self._lock:
            members = list(self._members.values())
        polled = [one for member in members if (one := self._poll(member)) is not None]
        due = [one for one in polled if isinstance(one, _Ready)]
        told = iter(self._run(due) if due else ())
        self._rounds += bool(polled)
        return [next(told) if isinstance(one, _Ready) else one for one in polled]

    def __next__(self) -> list[StreamResult]:
        """The next round in which a stream has a frame; ends when no stream is left."""
        while self.names:
            self._arrived.clear()
            results = self.step()
            if results:
                return results
            self._arrived.wait(_PATIENCE)
        raise StopIteration

    def metrics(self) -> PoolMetrics:
        """What the streams did so far, those that left last included."""
        with self._lock:
            tallies = {name: (member.tally, True, member.feed.lost) for name, member in self._members.items()}
            tallies |= {name: (tally, False, False) for name, tally in self._departed.items()}
        return PoolMetrics({name: tally.metrics(active, lost) for name, (tally, active, lost) in tallies.items()})

    def close(self) -> None:
        """Let all streams leave."""
        for name in self.names:
            self._leave(name)

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_turn(self) -> int:
        """The turn that the fewest streams have."""
        taken = Counter(member.turn for member in self._members.values())
        return min(range(self._hold), key=lambda turn: taken[turn])

    def _poll(self, member: _Member) -> _Ready | StreamResult | None:
        """The next frame of a stream, or what is held on it; None if it has none, which may be because it just left."""
        try:
            frame = member.feed.poll()
            if frame is None:
                return None
            began = time.perf_counter()
            cut = member.cuts is not None and member.cuts(frame.image) or frame.resumed
            if not cut and self._holds(member, frame):
                return self._held(member, frame)
            image = self._viewer.look(frame.image, self.detector.device)
            return _Ready(member, frame, image, cut, time.perf_counter() - began)
        except StopIteration:
            self._leave(member.name)
        except Exception as error:  # whatever is wrong with one source must not stop the others
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._leave(member.name, message)
        return None

    def _holds(self, member: _Member, frame: VideoFrame) -> bool:
        """Whether the last boxes of a stream stand for its next frame."""
        if member.last is None or member.last.image.shape != frame.image.shape:
            return False
        return member.held < self._hold - 1

    def _held(self, member: _Member, frame: VideoFrame) -> StreamResult:
        """The last detections of a stream on its next frame."""
        assert member.last is not None
        result, dropped = member.last.held_on(frame, member.tally.frames), member.feed.dropped
        member.held += 1
        member.tally.count(result.cost, dropped, member.tally.state_bytes)
        return dataclasses.replace(result, frame_age=frame.age, dropped=dropped)

    def _run(self, due: list[_Ready]) -> list[StreamResult]:
        """One step of the detector on the next frames of some streams."""
        state = State([one.member.memory for one in due])
        steps = self._spender.step(
            [one.image for one in due],
            state,
            flush=[one.cut for one in due],
            accounts=[one.member.account for one in due],
            prepared=[one.seconds for one in due],
        )
        return [self._tell(*one) for one in zip(due, steps, state.streams, strict=True)]

    def _tell(self, one: _Ready, step: StepResult, memory: DetectorStream) -> StreamResult:
        """Remember what happened to a stream, and tell it."""
        member, frame = one.member, one.frame
        member.memory = memory
        result = self._viewer.tell(step, frame.image, member.tally.frames, frame.timestamp)
        dropped = member.feed.dropped
        member.tally.count(step.cost, dropped, memory.nbytes)
        result = dataclasses.replace(result, stream=member.name, frame_age=frame.age, dropped=dropped)
        ahead = (member.turn - self._rounds - 1) % self._hold + 1  # rounds until its turn
        regular = member.last is not None and member.held == self._hold - 1
        member.last, member.held = (result if self._hold > 1 else None), (0 if regular else self._hold - ahead)
        return result

    def _leave(self, name: str, error: str | None = None) -> bool:
        """Whether there was such a stream; the reasons are kept."""
        with self._lock:
            member = self._members.pop(name, None)
            if member is None:
                return False
            member.tally.error = error
            self._departed[name] = member.tally
            while len(self._departed) > _DEPARTED:
                self._departed.pop(next(iter(self._departed)))
        member.feed.close()
        self._arrived.set()
        return True


def _unique(name: str, taken: dict[str, _Member]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique
