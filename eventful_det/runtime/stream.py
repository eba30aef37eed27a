"""Detection in a video: lazy, in constant memory, with a budget that can be turned while it runs."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.transforms import fit_size, resize, to_tensor
from eventful_det.data.video import VideoFrame, open_source
from eventful_det.errors import UserError
from eventful_det.gating.policy import Policy
from eventful_det.models.config import ModelConfig
from eventful_det.models.cost import FrameCost
from eventful_det.models.detector import Detector, StepResult
from eventful_det.models.roi_heads import Detections
from eventful_det.runtime.budget import Budget
from eventful_det.runtime.drift import Drift, Shadow
from eventful_det.runtime.scene_cuts import SceneCuts
from eventful_det.runtime.sharing import Terms
from eventful_det.runtime.spender import Account, Spender


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
        drift: how the detections compare with dense ones, on frames on which these were made as well.
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
    drift: Drift | None = None

    def held_on(self, frame: VideoFrame, index: int) -> StreamResult:
        """The same detections on a later frame of the same size, on which the detector does not run."""
        return dataclasses.replace(
            self,
            frame_index=index,
            timestamp=frame.timestamp,
            cost=self.cost.idle(),
            work=torch.zeros_like(self.work),
            image=frame.image,
            held=True,
        )


@dataclass(frozen=True)
class Viewer:
    """Turns frames of a source into inputs of a detector, and its outputs back into pixels of the source.

    Attributes:
        config: of the detector.
        short_side, long_side: of the input in pixels.
    """

    config: ModelConfig
    short_side: int
    long_side: int

    @staticmethod
    def of(config: ModelConfig, short_side: int | None = None, long_side: int | None = None) -> Viewer:
        """With the model's own sides where none are given."""
        return Viewer(config, short_side or config.short_side, long_side or config.long_side)

    def look(self, image: NDArray[np.uint8], device: torch.device) -> Tensor:
        """A frame `(h, w, 3)` as input `(3, h', w')` of the detector."""
        height, width = image.shape[:2]
        inner = fit_size(height, width, self.short_side, self.long_side)
        return to_tensor(resize(image, *inner)).to(device)

    def tell(self, step: StepResult, image: NDArray[np.uint8], index: int, timestamp: float | None) -> StreamResult:
        """What a step found in a frame."""
        height, width = image.shape[:2]
        inner = fit_size(height, width, self.short_side, self.long_side)
        scale = height / inner[0], width / inner[1]
        return StreamResult(
            detections=step.detections.scaled(scale[1], scale[0]),
            names=self.config.classes,
            frame_index=index,
            timestamp=timestamp,
            cost=step.cost,
            work=step.work,
            token_size=(self.config.patch * scale[0], self.config.patch * scale[1]),
            image=image,
        )


def check_hold(hold: int) -> None:
    """Raise a UserError unless every `hold`-th frame is something to run on."""
    if hold < 1:
        raise UserError(f"hold must be at least 1 (= every frame), got {hold}")


class Stream(Iterator[StreamResult]):
    """Iterates over the results of one source. `budget` and `policy` may be set between any two frames."""

    def __init__(
        self,
        detector: Detector,
        source: Any,
        *,
        budget: Budget | None = None,
        terms: Terms | None = None,
        max_frames: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scene_cuts: bool = True,
        hold: int = 1,
        shadow_every: int = 0,
    ) -> None:
        """See `stream`."""
        check_hold(hold)
        if shadow_every < 0:
            raise UserError(f"shadow_every must be a number of frames, or 0 for never, got {shadow_every}")
        self.detector = detector.with_rule(copy.copy(detector.rule))
        self._spender = Spender(self.detector, budget, terms)
        self._account = Account()
        self._viewer = Viewer.of(detector.config, short_side, long_side)
        self.hold, self.max_frames = hold, max_frames
        self._cuts = SceneCuts() if scene_cuts else None
        self._shadow = Shadow(detector, self._viewer, shadow_every) if shadow_every else None
        self._state = detector.init_state()
        self._source = open_source(source)
        self._frames = iter(self._source)
        self._last: StreamResult | None = None

    @property
    def policy(self) -> Policy | None:
        """Which tokens are recomputed where no budget decides; None = dense."""
        return self.detector.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.budget = policy

    @property
    def budget(self) -> Budget | None:
        """What a frame may cost, as it was set; None = the detector's own policy decides."""
        return self._spender.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._spender.budget = budget

    @property
    def drift(self) -> Drift | None:
        """How the detections compare with dense ones, over all frames with a shadow; None without `shadow_every`."""
        return None if self._shadow is None else self._shadow.total

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
            result = self._last.held_on(frame, index)
        else:
            result = self._detect(frame.image, index, frame.timestamp, cut)
        source = self._source
        self._last = dataclasses.replace(result, stream=source.name, frame_age=frame.age, dropped=source.dropped)
        if self._shadow is None:
            return self._last
        return dataclasses.replace(self._last, drift=self._shadow.compare(index, frame.image, result.detections))

    def _detect(self, image: NDArray[np.uint8], index: int, timestamp: float | None, cut: bool) -> StreamResult:
        began = time.perf_counter()
        frame = self._viewer.look(image, self.detector.device)
        prepared = time.perf_counter() - began
        (step,) = self._spender.step([frame], self._state, [cut], [self._account], [prepared])
        return self._viewer.tell(step, image, index, timestamp)

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
            budget: what a frame may cost: a share of the tokens (float), tokens (int), `Gmacs(40)`, `Latency(0.05)`,
                or a policy; the detector's own policy if None.
            terms: what tokens are worth under a budget, what is kept of it, how old tokens may grow. Under a policy
                only the last counts, and only if terms are given.
            max_frames: stop after this many frames.
            short_side, long_side: of the network's input in pixels; the model's own if None.
            scene_cuts: recompute everything when another scene begins.
            hold: run the detector on every n-th frame only and hold its boxes in between (a baseline).
            shadow_every: also run the dense detector on every n-th frame and report how far the detections drift from
                its; costs nothing of the budget and is counted nowhere else. 0 = never.

    Returns:
        An iterator over `StreamResult`; lazy, and constant in memory.

    Raises:
        UserError: the source cannot be opened.
    """
    return Stream(detector, source, **options)
