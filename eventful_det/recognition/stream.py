"""Action recognition in a video as it runs: lazy, in constant memory, with a budget that can be turned meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from eventful_det.data.video import Source, open_source
from eventful_det.detectors.protocol import Network
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule
from eventful_det.gating.selector import Budget, Selector
from eventful_det.recognition.results import RecogniserStream, RecognitionStep
from eventful_det.recognition.session import RecognitionResult, RecognitionSession
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.control import Budgeted, NetworkStepper
from eventful_det.runtime.session import StreamOptions


class StreamingRecogniser(Network[RecogniserStream, RecognitionStep], Protocol):
    """What a stream knows of a recogniser."""

    @property
    def selector(self) -> Selector:
        """What is selected unless it is told."""

    def session(self, *, name: str, scene_cuts: bool, options: StreamOptions | None = None) -> RecognitionSession:
        """One for a stream."""


class RecognitionStream(Budgeted, Iterator[RecognitionResult]):
    """Iterates over the steps of one source, lazily; `budget` may be set between any two.

    Every tubelet gives a result: class probabilities over a sliding window of the last tubelets. The spatial state goes
    on from window to window.

    Args:
        recogniser: in evaluation mode.
        source: see `Source`.
        budget: what a step may cost: a share of the tokens (float), tokens (int), `Gmacs(4)` or `Latency(0.05)`, of
            which the default policy makes the best; or a `Selector` of your own; None = the default selector.
        options: what is kept of a budget, and how old tokens may grow.
        rule: how tokens are recomputed.
        max_steps: stop after so many.
        scene_cuts: begin anew, with an empty window, when another scene begins.
        timing: measure the seconds of each part, for which a GPU is waited for once per step.

    Raises:
        UserError: the source cannot be opened, the budget is none, or the rule cannot hold it.
    """

    def __init__(
        self,
        recogniser: StreamingRecogniser,
        source: Source,
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        max_steps: int | None = None,
        scene_cuts: bool = True,
        timing: bool = False,
    ) -> None:
        self.rule, self.max_steps = rule, max_steps
        self._stepper: NetworkStepper[RecogniserStream, RecognitionStep, RecognitionResult] = NetworkStepper(
            recogniser, rule=rule, budget=budget, options=options, timing=timing, default=recogniser.selector
        )
        self._source = open_source(source)
        self._session = recogniser.session(name=self._source.name, scene_cuts=scene_cuts)
        self._frames = iter(self._source)
        self._steps = 0

    @property
    def state_bytes(self) -> int:
        """Bytes remembered of the stream between steps."""
        return self._session.state.nbytes

    def __next__(self) -> RecognitionResult:
        if self.max_steps is None or self._steps < self.max_steps:
            for frame in self._frames:
                key = self._session.begin(frame, dropped=self._source.dropped)
                if key is not None:
                    self._steps += 1
                    (result,) = self._stepper.step([(self._session, key)])
                    return result
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Release the source; iteration ends."""
        self._source.close()
        self._frames = iter(())
