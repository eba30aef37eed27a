"""`stream`, the method that all detectors share."""

from __future__ import annotations

from typing import Protocol

from eventful_det.data.source import Source
from eventful_det.detectors.protocol import AnyRule, S, VideoDetector
from eventful_det.gating.selector import Budget, Selector
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.motion.key_frames import Hold
from eventful_det.runtime.stream import Stream


class _Streaming(VideoDetector[S], Protocol[S]):
    """A detector that says by which rule it streams."""

    @property
    def rule(self) -> AnyRule:
        """How tokens are recomputed in `stream` unless it is told."""


class StreamingDetector:
    """Gives a `VideoDetector` with a `rule` its method `stream`."""

    def stream(
        self: _Streaming[S],
        source: Source,
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule | None = None,
        max_frames: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: Hold = None,
        shadow_every: int = 0,
        shadow_score: float = 0.5,
        timing: bool = False,
        live: bool = False,
    ) -> Stream:
        """Detect in a video, lazily and in constant memory; see `eventful_det.runtime.stream.Stream`."""
        return Stream(
            self,
            source,
            budget=budget,
            options=options,
            rule=self.rule if rule is None else rule,
            max_frames=max_frames,
            short_side=short_side,
            long_side=long_side,
            scene_cuts=scene_cuts,
            hold=hold,
            shadow_every=shadow_every,
            shadow_score=shadow_score,
            timing=timing,
            live=live,
        )
