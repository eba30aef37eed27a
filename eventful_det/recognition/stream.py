"""Action recognition in a video as it runs: lazy, in constant memory, with a budget that can be turned meanwhile."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.source import VideoFrame
from eventful_det.data.video import Source, open_source
from eventful_det.errors import UserError
from eventful_det.gating.convert import DEFAULT_RULE, AnyRule
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, Budget, Gmacs, Latency, Select, Selector
from eventful_det.gating.state import State
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.views import cover, crop_corners
from eventful_det.recognition.results import RecogniserStream, RecognitionStep, StepCost
from eventful_det.runtime.budget import selector_for
from eventful_det.runtime.control import Clock, Load
from eventful_det.runtime.scene_cuts import SceneCuts


class StreamingRecogniser(Protocol):
    """What a stream knows of a recogniser."""

    config: RecogniserConfig

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def init_state(self, batch: int = 1) -> State[RecogniserStream]:
        """An empty state."""

    def step_macs(self, tokens: int) -> int:
        """Multiply-adds of a step by `Rows` that recomputes so many tokens."""

    def step(
        self,
        tubelets: Sequence[Tensor],
        state: State[RecogniserStream],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
    ) -> list[RecognitionStep]:
        """Process the next tubelet of every stream."""


@dataclass(frozen=True)
class RecognitionResult:
    """One step of a stream: what happens in the window of tubelets that ends with it.

    Attributes:
        probabilities: of each head, `(classes,)`, on the CPU.
        names: class names of each head.
        frame_index: of the last frame of the tubelet, from 0.
        timestamp: of that frame in seconds since the start of the source, or None where it has no clock.
        cost: of this step; its seconds, not told apart by part, run from the tubelet to the probabilities.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
        image: that frame, `(h, w, 3)` uint8 RGB.
        held: never; every tubelet is looked at.
        stream: name of the source.
        frame_age: seconds from the capture of that frame to this result; None unless the source is live.
        dropped: frames of a live source that were overtaken by newer ones so far.
    """

    probabilities: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    frame_index: int
    timestamp: float | None
    cost: StepCost
    work: Tensor
    image: NDArray[np.uint8]
    held: bool = False
    stream: str = ""
    frame_age: float | None = None
    dropped: int = 0

    def top(self, count: int = 5, head: str | None = None) -> list[tuple[str, float]]:
        """The likeliest classes of a head, the first one if None, with their probabilities."""
        head = head or next(iter(self.names))
        scores, labels = self.probabilities[head].topk(min(count, len(self.names[head])))
        return [(self.names[head][i], p) for i, p in zip(labels.tolist(), scores.tolist(), strict=True)]


class FrameClock:
    """Chooses the frames of a source so that they come at the recogniser's rate.

    A source with timestamps is sampled by time: a frame is taken when it is nearer to its moment than the next would
    be. One without is taken to run at the recogniser's frame rate.

    Args:
        stride: frames from one taken to the next ...
        fps: ... at so many frames per second.
        source_fps: of the source; None = unknown.
    """

    def __init__(self, stride: int, fps: float, source_fps: float | None) -> None:
        self.stride, self.period = stride, stride / fps
        self._early = 0.5 / source_fps if source_fps else 0.0
        self._due: float | None = None
        self._seen = 0

    def takes(self, frame: VideoFrame) -> bool:
        """Whether the next frame of the source is one of those."""
        self._seen += 1
        if frame.timestamp is None:
            return (self._seen - 1) % self.stride == 0
        if self._due is None or not math.isclose(frame.timestamp, self._due, abs_tol=100 * self.period):
            self._due = frame.timestamp  # the first frame, or one behind a gap
        if frame.timestamp < self._due - self._early:
            return False
        self._due = max(self._due + self.period, frame.timestamp - self.period)
        return True


class RecognitionStream(Iterator[RecognitionResult]):
    """Iterates over the steps of one source, lazily; `budget` may be set between any two.

    Every tubelet gives a result: class probabilities over a sliding window of the last tubelets. The spatial state goes
    on from window to window.

    Args:
        recogniser: in evaluation mode.
        source: a video file, webcam number, RTSP or HTTP URL, image folder or glob, an iterable of `(h, w, 3)` uint8
            RGB arrays, or an open `VideoSource`.
        budget: what a step may cost: a share of the tokens (float), tokens (int), `Gmacs(4)` or `Latency(0.05)`, of
            which the default policy makes the best; or a `Selector` of your own; None = the default selector.
        rule: how tokens are recomputed.
        max_steps: stop after so many.
        scene_cuts: begin anew, with an empty window, when another scene begins.

    Raises:
        UserError: the source cannot be opened, or the budget is none.
    """

    def __init__(
        self,
        recogniser: StreamingRecogniser,
        source: Source,
        *,
        budget: Budget | Selector = None,
        rule: AnyRule = DEFAULT_RULE,
        max_steps: int | None = None,
        scene_cuts: bool = True,
    ) -> None:
        self.recogniser, self.rule, self.max_steps = recogniser, rule, max_steps
        self.budget = budget
        self._pace = Clock()
        self._state = recogniser.init_state()
        self._cuts = SceneCuts() if scene_cuts else None
        self._source = open_source(source)
        config = recogniser.config
        self._clock = FrameClock(config.stride, config.fps, self._source.fps)
        self._frames = iter(self._source)
        self._index, self._steps = -1, 0

    @property
    def budget(self) -> Budget | Selector:
        """What a step may cost, as it was set; None = the default selector."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | Selector) -> None:
        selector = selector_for(budget)
        if isinstance(selector.budget, (Gmacs, Latency)) and not isinstance(self.rule, Rows):
            raise UserError(f"a budget of {selector.budget} needs the rule Rows; give tokens or a share of them")
        self._selector, self._budget = selector, budget

    def _affordable(self) -> Selector:
        """The selector of the next step, its limit in tokens. Seconds are held by feedback, from the first step on."""
        limit = self._selector.budget
        if not isinstance(limit, (Gmacs, Latency)):
            return self._selector
        gmacs = limit.value if isinstance(limit, Gmacs) else self._pace.gmacs(1, limit.seconds)
        rows, cols = self.recogniser.config.grid
        macs = [self.recogniser.step_macs(tokens) for tokens in range(rows * cols + 1)]
        return dataclasses.replace(self._selector, budget=max(0, bisect.bisect_right(macs, 1e9 * gmacs) - 1))

    @property
    def state_bytes(self) -> int:
        """Bytes remembered of the stream between steps."""
        return self._state.nbytes

    def __next__(self) -> RecognitionResult:
        if self.max_steps is not None and self._steps >= self.max_steps:
            self.close()
            raise StopIteration
        tubelet: list[Tensor] = []
        cut = False
        for frame in self._frames:
            self._index += 1
            if not self._clock.takes(frame):
                continue
            if (self._cuts is not None and self._cuts(frame.image)) or frame.resumed:
                tubelet, cut = [], True  # the frames before it belong to no whole tubelet
            image = fit_frame(frame.image, self.recogniser.config)
            if tubelet and tubelet[0].shape != image.shape:
                tubelet = []
            tubelet.append(image)
            if len(tubelet) == self.recogniser.config.tubelet[0]:
                return self._step(torch.stack(tubelet), frame, cut)
        self.close()
        raise StopIteration

    def _step(self, tubelet: Tensor, frame: VideoFrame, cut: bool) -> RecognitionResult:
        began = time.perf_counter()
        (step,) = self.recogniser.step(
            [tubelet.to(self.recogniser.device)], self._state, rule=self.rule, selector=self._affordable(), flush=cut
        )
        probabilities = {head: values.cpu() for head, values in step.probabilities.items()}  # waits for a GPU
        seconds = time.perf_counter() - began
        step.cost.seconds["other"] = seconds
        whole = step.cost.recomputed == step.cost.tokens
        self._pace.observe(Load(1, step.cost.total / 1e9), seconds, whole)
        self._steps += 1
        return RecognitionResult(
            probabilities=probabilities,
            names=dict(self.recogniser.config.classes),
            frame_index=self._index,
            timestamp=frame.timestamp,
            cost=step.cost,
            work=step.work,
            image=frame.image,
            stream=self._source.name,
            frame_age=frame.age,
            dropped=self._source.dropped,
        )

    def close(self) -> None:
        """Release the source; iteration ends."""
        self._source.close()
        self._frames = iter(())


def fit_frame(image: NDArray[np.uint8], config: RecogniserConfig) -> Tensor:
    """A frame `(h, w, 3)` as the central crop that the recogniser looks at, `(3, h', w')` in [0, 1]."""
    if config.channels != 3:
        raise UserError(f"this recogniser takes {config.channels} channels; frames have 3")
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)
    x = cover(x[None], config.size)[0]
    ((top, left),) = crop_corners((x.shape[1], x.shape[2]), config.size, 1)
    return x[:, top : top + config.size[0], left : left + config.size[1]]
