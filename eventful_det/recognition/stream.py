"""Action recognition in a video as it runs: lazy, in constant memory, with a budget that can be turned meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eventful_det.data.video import Source, open_source
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule
from eventful_det.gating.selector import Budget, Selector
from eventful_det.recognition.session import RecognitionResult
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.control import Budgeted, NetworkStepper
from eventful_det.runtime.session import KeyFrame, OpensSessions


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
        recogniser: OpensSessions[RecognitionResult],
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
        self._stepper: NetworkStepper[Any, Any, RecognitionResult] = NetworkStepper(
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
                result = self._session.begin(frame, dropped=self._source.dropped)
                if result is None:
                    continue
                self._steps += 1
                if isinstance(result, KeyFrame):
                    (result,) = self._stepper.step([(self._session, result)])
                return result
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Release the source; iteration ends."""
        self._source.close()
        self._frames = iter(())
