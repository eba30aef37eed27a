"""Many live streams on one detector or recogniser, and one budget.

::

    with StreamPool(load_detector(), budget=0.25) as pool:
        pool.add("rtsp://gate/stream", name="gate")
        pool.add("corridor.mp4")
        for results in pool:
            for result in results:
                print(result.stream, result.frame_index, len(result.detections))

Every round takes one frame of each stream that has one. The budget is that of a round, and goes where the changes are.
Where frames are held, the streams take turns, so that rounds cost alike.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast, overload

from eventful_det.data.source import Source
from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, InputTransform, S, VideoDetector
from eventful_det.detectors.results import StepResult
from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT, Budget, Selector
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.control import Budgeted, NetworkStepper
from eventful_det.runtime.live import DetectorThread, LiveBoxes, detector_of
from eventful_det.runtime.motion.key_frames import Hold, hold_for
from eventful_det.runtime.pool.feed import Feed
from eventful_det.runtime.pool.metrics import PoolMetrics, Tally
from eventful_det.runtime.session import (
    KeyFrame,
    OpensSessions,
    Result,
    Session,
    StreamOptions,
    StreamResult,
    StreamSession,
)

R = TypeVar("R", bound=Result)  # of a frame
_DEPARTED = 64  # streams that left, of which the metrics are kept
_PATIENCE = 0.5  # seconds to wait for a frame before looking again whether a stream is left


@dataclass
class _Member:
    """A stream of the pool.

    Attributes:
        boxes: of a live stream.
        next_key: the round in which its next key frame is due, if it has a frame in every round.
        settled: it takes turns with the others.
    """

    session: Session[Any, Any, Any]
    feed: Feed
    tally: Tally
    boxes: LiveBoxes | None = None
    next_key: int = 0
    settled: bool = False


class StreamPool(Budgeted, Iterator[list[R]], Generic[R]):
    """Detects, or recognises, in many streams at once.

    Streams may join and leave, and the budget may change, between any two rounds.
    `add`, `remove`, `metrics` and `budget` may be used from other threads than the one that runs the rounds.

    Args:
        detector: in evaluation mode; or a recogniser, which takes neither sides nor `hold`.
        budget: what a round may cost: a share of the tokens (float), tokens (int), `Gmacs(40)` or `Latency(0.05)`,
            which the streams share; or a `Selector`, which is asked about each stream alone unless its `assured` says
            otherwise; None = the default selector.
        options: what every stream may count on, what is kept of a budget, and how old tokens may grow.
        rule: how tokens are recomputed.
        short_side, long_side: of the network's input in pixels; the model's own if None.
        scene_cuts: recompute all of a stream when another scene begins in it.
        hold: run on every n-th frame of a stream only, or as `KeyFrames` say, and move its boxes in between; a scene
            cut ends that at once. The streams take turns, so that rounds cost alike, and the budget is for those whose
            turn it is. None = every second one, or fewer where the budget is small; 1 = every frame. See `Hold`.
        timing: measure the seconds of each part, for which a GPU is waited for once per round.
        live: every frame gets moved boxes at once, while the detector works in a thread, on one stream after the other,
            at its own pace; see `eventful_det.runtime.live`. The budget is that of one frame.

    Raises:
        UserError: `hold` is below 1, or given for live streams; or an option is not for recognisers.
    """

    @overload
    def __init__(
        self: StreamPool[StreamResult],
        detector: VideoDetector[S],
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: Hold = None,
        timing: bool = False,
        live: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        detector: OpensSessions[R],
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        scene_cuts: bool = True,
        timing: bool = False,
    ) -> None: ...

    def __init__(
        self,
        detector: VideoDetector[S] | OpensSessions[R],
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: Hold = None,
        timing: bool = False,
        live: bool = False,
    ) -> None:
        self._detector = detector
        self.rule = rule
        self._thread = DetectorThread() if live else None
        self._scene_cuts, self._hold = scene_cuts, hold_for(hold, rule)
        self._transform: InputTransform | None = None
        default = DEFAULT
        if isinstance(detector, OpensSessions):
            default = detector.selector
            if short_side is not None or long_side is not None or live:
                raise UserError("short_side, long_side and live are for detectors, not for a recogniser")
        else:
            self._transform = detector.input_transform.with_sides(short_side, long_side)
        self._session("")  # raises where an option is out of its range
        self._stepper: NetworkStepper[Any, Any, R] = NetworkStepper(
            detector, rule=rule, budget=budget, options=options, timing=timing, default=default
        )
        self._rounds = 0
        self._members: dict[str, _Member] = {}
        self._departed: dict[str, Tally] = {}
        self._lock = threading.Lock()
        self._arrived = threading.Event()

    @property
    def names(self) -> tuple[str, ...]:
        """The streams of the pool."""
        with self._lock:
            return tuple(self._members)

    def add(
        self,
        source: Source,
        *,
        name: str | None = None,
        live: bool | None = None,
        short_side: int | None = None,
        hold: Hold = None,
        track: bool = False,
        options: StreamOptions | None = None,
    ) -> str:
        """Let a stream join; its first frame is recomputed in full.

        Args:
            source: see `eventful_det.data.video.open_source`.
            name: by default that of the source; "-2" and so on is appended to one that is taken.
            live: whether only its newest frame counts, or all do; None = guess from the source.
            short_side, hold: as those of the pool, for this stream; None = those of the pool.
            track: give all its objects ids, the unsure as well, also where the network runs on every frame.
            options: see `StreamOptions`.

        Returns:
            The stream's name.

        Raises:
            UserError: the source cannot be opened, or is a stream already.
        """
        with self._lock:  # an iterator that two streams share would give each half of its frames
            shared = getattr(source, "arrays", source)
            if isinstance(shared, Iterator) and any(one.feed.drawn is shared for one in self._members.values()):
                raise UserError("this iterator is a stream of the pool already; give each stream one of its own")
        session = self._session("", short_side, hold, track, options)
        feed = Feed(source, live, self._arrived.set)
        with self._lock:
            unique = _unique(name or feed.name, self._members)
            self._departed.pop(unique, None)
            session.name = unique
            boxes = None
            if self._thread is not None:
                assert isinstance(session, StreamSession)
                stepper = cast(NetworkStepper[Any, StepResult, StreamResult], self._stepper)
                boxes = LiveBoxes(detector_of(stepper, session), self._thread, self._scene_cuts, track)
            self._members[unique] = _Member(session, feed, Tally(), boxes)
        self._arrived.set()
        return unique

    def configure(self, name: str, options: StreamOptions) -> None:
        """Give a stream other options from its next frame on; what it remembers stays.

        Raises:
            UserError: there is none of this name.
        """
        with self._lock:
            member = self._members.get(name)
        if member is None:
            raise UserError(self._missing(name))
        member.session.options = options

    def remove(self, name: str) -> None:
        """Let a stream leave.

        Raises:
            UserError: there is none of this name.
        """
        if not self._leave(name):
            raise UserError(self._missing(name))

    def step(self) -> list[R]:
        """One round: the next frame of every stream that has one, in one step of the detector.

        A stream that ended or failed leaves; `metrics` tells why.

        Returns:
            A result for each of these streams; empty if none has a frame yet.
        """
        with self._lock:
            members = list(self._members.values())
        begun = [(member, one) for member in members if (one := self._begin(member)) is not None]
        due = [(member, one) for member, one in begun if isinstance(one, KeyFrame)]
        _leave_to_others([member.session for member, _ in begun])
        sharing = [member.session for member in members]
        finished = iter(self._stepper.step([(m.session, key) for m, key in due], sharing) if due else ())
        self._rounds += bool(begun)
        results = []
        for member, one in begun:
            result = next(finished) if isinstance(one, KeyFrame) else one
            if isinstance(one, KeyFrame):
                self._schedule(member, one.regular, members)
            member.tally.count(result, member.session.state.nbytes)
            results.append(result)
        return results

    def __next__(self) -> list[R]:
        """The next round in which a stream has a frame; ends when no stream is left."""
        while self.names:
            self._arrived.clear()
            results = self.step()
            if results:
                return results
            self._arrived.wait(_PATIENCE)
        raise StopIteration

    def _sessions(self) -> list[StreamSession[Any]]:
        with self._lock:
            sessions = [member.session for member in self._members.values()]
        return [session for session in sessions if isinstance(session, StreamSession)]

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

    def _missing(self, name: str) -> str:
        return f"no stream {name!r} in the pool; there are: {', '.join(self.names) or 'none'}"

    def _session(
        self,
        name: str,
        short_side: int | None = None,
        hold: Hold = None,
        track: bool = False,
        options: StreamOptions | None = None,
    ) -> Session[Any, Any, Any]:
        hold, cuts = self._hold if hold is None else hold, self._scene_cuts
        if isinstance(self._detector, OpensSessions):
            if short_side is not None or hold is not None or track:
                raise UserError("short_side, hold and track are for detectors; a recogniser has no boxes")
            return self._detector.session(name=name, scene_cuts=cuts, options=options)
        assert self._transform is not None
        transform = self._transform.with_sides(short_side, None)
        if self._thread is not None:
            if hold is not None:
                raise UserError("live streams run the detector whenever it is idle; leave hold out")
            hold, cuts, track = 1, False, False  # `LiveBoxes` looks for cuts, and gives ids
        return StreamSession(
            self._detector, transform, name=name, scene_cuts=cuts, hold=hold, track=track, options=options
        )

    def _schedule(self, member: _Member, regular: bool, members: Sequence[_Member]) -> None:
        """Plan the next key frame of a stream; behind one out of turn it comes when the fewest others have theirs."""
        wait = math.ceil(member.session.left)
        member.settled &= regular
        if not member.settled and wait > 1:
            member.settled = True
            taken = Counter(one.next_key for one in members if one is not member)
            wait = max(range(1, wait + 1), key=lambda rounds: (-taken[self._rounds + rounds], rounds))
            member.session.left = wait
        member.next_key = self._rounds + wait

    def _begin(self, member: _Member) -> KeyFrame | R | None:
        """The next frame of a stream; None if it has none, which may be because it just left."""
        try:
            if member.boxes is not None:
                return cast("R | None", self._show(member.feed, member.boxes))
            while (frame := member.feed.poll()) is not None:
                if (one := member.session.begin(frame, dropped=member.feed.dropped)) is not None:
                    return cast("KeyFrame | R", one)
        except StopIteration:
            self._leave(member.session.name)
        except Exception as error:  # whatever is wrong with one source must not stop the others
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._leave(member.session.name, message)
        return None

    @staticmethod
    def _show(feed: Feed, boxes: LiveBoxes) -> StreamResult | None:
        """The boxes on the next frame of a live stream; one that ends before the first answer stays until that."""
        try:
            frame = feed.poll()
        except StopIteration:
            return boxes.late()
        return None if frame is None else boxes.show(frame, feed.dropped, wait=False)

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


def _leave_to_others(sessions: Iterable[Session[Any, Any, Any]]) -> None:
    """What quiet streams do not need of the budget pays for the key frames of busy ones."""
    holding = [session for session in sessions if isinstance(session, StreamSession) and session.auto]
    spare = sum(session.spare * session.options.priority for session in holding)
    owing = [session for session in holding if session.debt]
    for session in owing:
        session.relieve(spare / sum(one.options.priority for one in owing))


def _unique(name: str, taken: Container[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique
