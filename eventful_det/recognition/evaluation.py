"""Recognisers on labelled clips: accuracy against multiply-adds, for one way of running them or for many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule
from eventful_det.gating.selector import LargestError, RandomOrder, Select, Selector
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
) -> list[Evaluation]:
    """See `evaluate`; takes the clips themselves, and runs each in several ways, which take turns clip by clip."""
    results: list[list[tuple[Scored, StepCost, float]]] = [[] for _ in ways]
    failed = {}
    for done, (segment, clip) in enumerate(clips, 1):
        if isinstance(clip, UserError):
            failed[segment.name] = str(clip)
        else:
            for way, entries in zip(ways, results, strict=True):
                options: dict[str, Any] = {"shared": way.shared, "hold": way.hold}
                seen: Clip = clip
                if way.one_frame:
                    view = frame_indices(len(clip), recogniser.config)[0]
                    seen = _OneFrame(clip, view[len(view) // 2])
                began = time.perf_counter()
                result = recognise(recogniser, seen, rule=way.rule, selector=way.selector, **options)
                seconds = time.perf_counter() - began
                scored = Scored(segment, {head: logits.cpu() for head, logits in result.logits.items()})
                entries.append((scored, result.cost, seconds))
        if on_clip is not None:
            on_clip(done)
    if not results[0]:
        reason = next(iter(failed.values()), "there are none")
        raise UserError(f"no clip can be read: {reason}")
    evaluations = []
    for way, entries in zip(ways, results, strict=True):
        scores, costs, times = zip(*entries, strict=True)
        macs, dense = sum(cost.total for cost in costs), sum(cost.dense_total for cost in costs)
        evaluations.append(Evaluation(way, scores, failed, macs / 1e9 / len(costs), dense / 1e9 / len(costs), times))
    return evaluations


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
