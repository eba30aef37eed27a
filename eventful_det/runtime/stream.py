"""Detection in a video: lazy, in constant memory, with a budget that can be turned while it runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.transforms import fit_size, resize, to_tensor
from eventful_det.data.video import open_source
from eventful_det.errors import UserError
from eventful_det.gating.policy import Policy
from eventful_det.models.cost import FrameCost
from eventful_det.models.detector import Detector
from eventful_det.models.regions import Detections
from eventful_det.runtime.budget import policy_for
from eventful_det.runtime.refresh import SceneCuts


@dataclass(frozen=True)
class StreamResult:
    """One frame of a stream.

    Attributes:
        detections: boxes in pixels of the source frame, scores, labels.
        names: class names that the labels index.
        frame_index: from 0.
        timestamp: seconds since the start of the source, or None where it has no clock.
        cost: of this frame.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
        token_size: height and width of a token in pixels of the source frame; the map may reach beyond the frame.
        image: the source frame, `(h, w, 3)` uint8 RGB.
        held: the detector did not run; the detections are those of an earlier frame.
        stream: name of the source.
        frame_age: seconds from the capture of the frame to its detections; None unless the source is live.
        dropped: frames of a live source that were overtaken by newer ones so far.
    """

    detections: Detections
    names: tuple[str, ...]
    frame_index: int
    timestamp: float | None
    cost: FrameCost
    work: Tensor
    token_size: tuple[float, float]
    image: NDArray[np.uint8]
    held: bool = False
    stream: str = ""
    frame_age: float | None = None
    dropped: int = 0


class Stream(Iterator[StreamResult]):
    """Iterates over the results of one source. `budget` and `policy` may be set between any two frames."""

    def __init__(
        self,
        detector: Detector,
        source: Any,
        *,
        budget: float | int | Policy | None = None,
        max_frames: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: int = 1,
    ) -> None:
        """See `stream`."""
        if hold < 1:
            raise UserError(f"hold must be at least 1 (= every frame), got {hold}")
        rule = dataclasses.replace(detector.rule) if detector.rule is not None else None  # type: ignore[type-var]
        self.detector = detector.with_rule(rule)
        if budget is not None:
            self.budget = budget
        self.short_side = short_side or detector.config.short_side
        self.long_side = long_side or detector.config.long_side
        self.hold, self.max_frames = hold, max_frames
        self._cuts = SceneCuts() if scene_cuts else None
        self._state = detector.init_state()
        self._source = open_source(source)
        self._frames = iter(self._source)
        self._last: StreamResult | None = None

    @property
    def policy(self) -> Policy | None:
        """Which tokens are recomputed; None = dense."""
        return self.detector.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.detector.policy = policy

    @property
    def budget(self) -> Policy | None:
        """The policy that spends the budget; set tokens (int), a share of the tokens (float), or a policy."""
        return self.policy

    @budget.setter
    def budget(self, budget: float | int | Policy) -> None:
        self.policy = policy_for(budget)

    @property
    def state_bytes(self) -> int:
        """Bytes remembered of the stream between frames."""
        return self._state.nbytes

    def __next__(self) -> StreamResult:
        index = 0 if self._last is None else self._last.frame_index + 1
        done = self.max_frames is not None and index >= self.max_frames
        frame = None if done else next(self._frames, None)
        if frame is None:
            self.close()
            raise StopIteration
        cut = self._cuts is not None and self._cuts(frame.image) or frame.resumed
        same_size = self._last is not None and self._last.image.shape == frame.image.shape
        if self._last is not None and same_size and index % self.hold and not cut:
            idle = FrameCost(
                dict.fromkeys(self._last.cost.dense, 0), self._last.cost.dense, 0, self._last.cost.tokens, False
            )
            result = dataclasses.replace(
                self._last,
                frame_index=index,
                timestamp=frame.timestamp,
                cost=idle,
                work=self._last.work * 0,
                image=frame.image,
                held=True,
            )
        else:
            result = self._detect(frame.image, index, frame.timestamp, cut)
        source = self._source
        self._last = dataclasses.replace(result, stream=source.name, frame_age=frame.age, dropped=source.dropped)
        return self._last

    def _detect(self, image: NDArray[np.uint8], index: int, timestamp: float | None, cut: bool) -> StreamResult:
        began = time.perf_counter()
        height, width = image.shape[:2]
        inner = fit_size(height, width, self.short_side, self.long_side)
        frame = to_tensor(resize(image, *inner)).to(self.detector.device)
        prepared = time.perf_counter() - began
        (step,) = self.detector.step(frame[None], self._state, flush=cut)
        step.cost.seconds["other"] = step.cost.seconds.get("other", 0.0) + prepared
        scale = height / inner[0], width / inner[1]
        return StreamResult(
            detections=step.detections.scaled(scale[1], scale[0]),
            names=self.detector.names,
            frame_index=index,
            timestamp=timestamp,
            cost=step.cost,
            work=step.work,
            token_size=(self.detector.config.patch * scale[0], self.detector.config.patch * scale[1]),
            image=image,
        )

    def close(self) -> None:
        """Release the source; iteration ends."""
        self._source.close()
        self._frames = iter(())


def stream(detector: Detector, source: Any, **options: Any) -> Stream:
    """Detect in a video.

    Args:
        detector: in evaluation mode.
        source: a video file, webcam number, RTSP or HTTP URL, image folder or glob, or an iterable of
            `(h, w, 3)` uint8 RGB arrays.
        options:
            budget: tokens per frame (int), share of the tokens (float), or a policy; the detector's own if None.
            max_frames: stop after this many frames.
            short_side, long_side: of the network's input in pixels; the model's own if None.
            scene_cuts: recompute everything when another scene begins.
            hold: run the detector on every n-th frame only and hold its boxes in between (a baseline).

    Returns:
        An iterator over `StreamResult`; lazy, and constant in memory.

    Raises:
        UserError: the source cannot be opened.
    """
    return Stream(detector, source, **options)
