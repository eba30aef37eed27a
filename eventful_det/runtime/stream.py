"""Detection in a video: lazy, in constant memory, with a budget that can be turned while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from eventful_det.data.video import Source as Source
from eventful_det.data.video import open_source
from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, S, VideoDetector
from eventful_det.errors import UserError
from eventful_det.gating.selector import Budget, Selector
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.control import Budgeted, Stepper
from eventful_det.runtime.drift import Drift, DriftMonitor
from eventful_det.runtime.live import DetectorThread, LiveBoxes, detector_of
from eventful_det.runtime.motion.key_frames import Hold, hold_for
from eventful_det.runtime.session import KeyFrame, StreamResult, StreamSession


class Stream(Budgeted, Iterator[StreamResult]):
    """Iterates over the results of one source, lazily; `budget` may be set between any two frames.

    Args:
        detector: in evaluation mode.
        source: see `Source`.
        budget: what a frame may cost: a share of the tokens (float), tokens (int), `Gmacs(40)` or `Latency(0.05)`, of
            which the default policy makes the best; or a `Selector` of your own; None = the default selector.
        options: what is kept of a budget, and how old tokens may grow.
        rule: how tokens are recomputed.
        max_frames: stop after this many frames.
        short_side, long_side: of the network's input in pixels; the model's own if None.
        scene_cuts: recompute everything when another scene begins.
        hold: run the detector on every n-th frame only, or as `KeyFrames` say, and move its boxes in between. None =
            every second one, or fewer where the budget is small; 1 = every frame. See `Hold`.
        shadow_every: also run the dense detector on every n-th frame and report how far the detections of at least
            `shadow_score` drift from its; costs nothing of the budget and is counted nowhere else. 0 = never.
        timing: measure the seconds of each part, for which a GPU is waited for once per frame.
        live: every frame gets moved boxes at once, while the detector works in a thread, at its own pace; see
            `eventful_det.runtime.live`. For sources that come at the pace of a clock.

    Raises:
        UserError: the source cannot be opened, or an option is out of its range.
    """

    def __init__(
        self,
        detector: VideoDetector[S],
        source: Source,
        *,
        budget: Budget | Selector = None,
        options: BudgetOptions | None = None,
        rule: AnyRule = DEFAULT_RULE,
        max_frames: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: Hold = None,
        shadow_every: int = 0,
        shadow_score: float = 0.5,
        timing: bool = False,
        live: bool = False,
    ) -> None:
        if live and (hold is not None or shadow_every):
            raise UserError("a live stream runs the detector whenever it is idle; leave hold and shadow_every out")
        if shadow_every < 0:
            raise UserError(f"shadow_every must be a number of frames, or 0 for never, got {shadow_every}")
        self.rule, self.max_frames = rule, max_frames
        transform = detector.input_transform.with_sides(short_side, long_side)
        cuts, hold = (False, 1) if live else (scene_cuts, hold_for(hold, rule))  # live streams look for cuts themselves
        self._session: StreamSession[Any] = StreamSession(detector, transform, scene_cuts=cuts, hold=hold)
        self._stepper: Stepper[Any] = Stepper(detector, rule=rule, budget=budget, options=options, timing=timing)
        self._monitor: DriftMonitor[Any] | None = None
        if shadow_every:
            self._monitor = DriftMonitor(detector, transform, shadow_every, shadow_score)
        self._live: LiveBoxes | None = None
        if live:
            self._live = LiveBoxes(detector_of(self._stepper, self._session), DetectorThread(), scene_cuts)
        self._source = open_source(source)
        self._session.name = self._source.name
        self._frames = iter(self._source)
        self._count = 0

    @property
    def drift(self) -> Drift | None:
        """How the detections compare with dense ones, over all frames with a shadow; None without `shadow_every`."""
        return None if self._monitor is None else self._monitor.total

    @property
    def state_bytes(self) -> int:
        """Bytes remembered of the stream between frames."""
        return self._session.state.nbytes

    def __next__(self) -> StreamResult:
        done = self.max_frames is not None and self._count >= self.max_frames
        frame = None if done else next(self._frames, None)
        if frame is None:
            self.close()
            raise StopIteration
        self._count += 1
        if self._live is not None:
            shown = self._live.show(frame, self._source.dropped)
            assert shown is not None, "it waits for the first answer"
            return shown
        result = self._session.begin(frame, dropped=self._source.dropped)
        if isinstance(result, KeyFrame):
            (result,) = self._stepper.step([(self._session, result)])
        if self._monitor is None:
            return result
        drift = self._monitor.compare(result.frame_index, result.image, result.detections, result.cost)
        return dataclasses.replace(result, drift=drift)

    def _sessions(self) -> list[StreamSession[Any]]:
        return [self._session]

    def close(self) -> None:
        """Release the source; iteration ends."""
        if self._live is not None:
            self._live.thread.close()
        self._source.close()
        self._frames = iter(())
