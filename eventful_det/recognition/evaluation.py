"""Recognisers on labelled clips: accuracy against multiply-adds, for one way of running them or for many."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule
from eventful_det.gating.selector import LargestError, RandomOrder, Select, Selector
from eventful_det.outputs import write_text
from eventful_det.recognition.accuracy import Accuracy, Scored, accuracy
from eventful_det.recognition.clips import Clip, recognise
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segment, Segments
from eventful_det.recognition.data.views import frame_indices
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.results import StepCost
from eventful_det.recognition.session import DEFAULT


@dataclass(frozen=True)
class Way:
    """One way of running a recogniser over a clip; see `recognise`.

    Attributes:
        name: for tables.
        rule, selector, shared, hold: as of `recognise`.
        one_frame: show the frame in the middle of the first view alone (a baseline, which sees no motion).
    """

    name: str
    rule: AnyRule = DEFAULT_RULE
    selector: Select = DEFAULT
    shared: bool = True
    hold: int = 1
    one_frame: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What came of a way.

    Attributes:
        way: that was evaluated.
        scored: the segments.
        failed: segments that could not be read, and why.
        gmacs: 1e9 multiply-adds per clip.
        dense_gmacs: those of the dense recogniser on the same tubelets.
        times: seconds of each clip, of the recogniser alone.
    """

    way: Way
    scored: tuple[Scored, ...]
    failed: dict[str, str]
    gmacs: float
    dense_gmacs: float
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median of a clip."""
        return statistics.median(self.times)

    @property
    def accuracy(self) -> dict[str, Accuracy]:
        """Top-1 and top-5 of each head, and of verb and noun together."""
        return accuracy(self.scored)


def evaluate(
    recogniser: Recogniser,
    segments: Segments,
    way: Way | None = None,
    on_clip: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run a recogniser over segments of videos.

    Args:
        recogniser: in evaluation mode.
        segments: what to look at; those that cannot be read are reported.
        way: of running it; None = the default rule and selector, with shared tubelets.
        on_clip: told how many clips are done.

    Raises:
        UserError: no segment can be read.
    """
    way = way or Way("default")
    clips = read_clips(segments.items, recogniser.config, way.shared)
    return evaluate_clips(recogniser, clips, [way], on_clip)[0]


def evaluate_clips(
    recogniser: Recogniser,
    clips: Iterable[tuple[Segment, Clip | UserError]],
    ways: Sequence[Way],
    on_clip: Callable[[int], None] | None = None,
    kept: Path | None = None,
) -> list[Evaluation]:
    """See `evaluate`; takes the clips themselves, and runs each in several ways, which take turns clip by clip.

    With a folder `kept`, what came of each clip is kept there, and a killed run goes on where it was. Whoever names the
    folder sees to it that recogniser and code are the same; ways and videos are looked at here.
    """
    results: list[list[_Look]] = [[] for _ in ways]
    segments = []
    failed = {}
    for done, (segment, clip) in enumerate(clips, 1):
        if isinstance(clip, UserError):
            failed[segment.name] = str(clip)
        else:
            path = None if kept is None else kept / f"{_key(segment, ways)}.json"
            looks = None if path is None else _load(path)
            if looks is None:
                looks = [_look(recogniser, clip, way) for way in ways]
                if path is not None:
                    write_text(path, json.dumps([_plain(look) for look in looks]))
            segments.append(segment)
            for look, entries in zip(looks, results, strict=True):
                entries.append(look)
        if on_clip is not None:
            on_clip(done)
    if not results[0]:
        reason = next(iter(failed.values()), "there are none")
        raise UserError(f"no clip can be read: {reason}")
    evaluations = []
    for way, entries in zip(ways, results, strict=True):
        logits, costs, times = zip(*entries, strict=True)
        scores = tuple(map(Scored, segments, logits))
        macs, dense = sum(cost.total for cost in costs), sum(cost.dense_total for cost in costs)
        evaluations.append(Evaluation(way, scores, failed, macs / 1e9 / len(costs), dense / 1e9 / len(costs), times))
    return evaluations


class _Look(NamedTuple):
    """What came of a clip: logits `(classes,)` of each head, what it cost, and the seconds that took."""

    logits: dict[str, Tensor]
    cost: StepCost
    seconds: float


def _look(recogniser: Recogniser, clip: Clip, way: Way) -> _Look:
    if way.one_frame:
        view = frame_indices(len(clip), recogniser.config)[0]
        clip = _OneFrame(clip, view[len(view) // 2])
    began = time.perf_counter()
    result = recognise(recogniser, clip, rule=way.rule, selector=way.selector, shared=way.shared, hold=way.hold)
    seconds = time.perf_counter() - began
    return _Look({head: logits.cpu() for head, logits in result.logits.items()}, result.cost, seconds)


def _key(segment: Segment, ways: Sequence[Way]) -> str:
    """What the results of a clip depend on; its video is known by its place, size and time."""
    about = segment.video.stat()
    return hashlib.sha256(repr((segment, about.st_size, about.st_mtime_ns, ways)).encode()).hexdigest()[:32]


def _plain(look: _Look) -> tuple[dict[str, list[float]], dict[str, object], float]:
    """As JSON holds it."""
    logits = {head: values.tolist() for head, values in look.logits.items()}
    return logits, dataclasses.asdict(look.cost), look.seconds


def _load(path: Path) -> list[_Look] | None:
    """What was kept of a clip, if anything."""
    try:
        return [
            _Look({head: torch.tensor(values) for head, values in logits.items()}, StepCost(**cost), seconds)
            for logits, cost, seconds in json.loads(path.read_text())
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def sweep_ways(parts: Sequence[int] = (2, 4, 8, 16), shared: bool = True, steps: int = 16) -> Iterator[Way]:
    """The ways that a sweep compares: dense, and 1/2, 1/4, ... of the tokens by each rule, or of the tubelets.

    Of views of `steps` tubelets at least one is looked at.
    """
    yield Way("dense", rule=Dense(), shared=shared)
    yield Way("one frame", rule=Dense(), shared=shared, one_frame=True)
    for part in parts:
        share = 1 / part
        yield Way(f"rows 1/{part}", selector=DEFAULT.within(share), shared=shared)
        yield Way(f"random 1/{part}", selector=Selector(RandomOrder(), share), shared=shared)
        yield Way(f"paper 1/{part}", rule=Paper(), selector=Selector(LargestError(), share), shared=shared)
        if part <= steps:
            yield Way(f"held 1/{part}", rule=Dense(), shared=shared, hold=part)


@dataclass(frozen=True)
class _OneFrame:
    """A clip that shows one of its frames alone."""

    clip: Clip
    index: int

    def __len__(self) -> int:
        return len(self.clip)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return self.clip[[self.index] * len(indices)]
