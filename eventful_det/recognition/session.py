"""One stream on its way through a recogniser: frames become tubelets, and their logits probabilities.

It has the form of `eventful_det.runtime.session`, so that streams and pools run it as they run detection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.source import VideoFrame
from eventful_det.errors import UserError
from eventful_det.gating.selector import GateInput, LargestError, Selector
from eventful_det.gating.state import State
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.views import cover, crop_corners
from eventful_det.recognition.results import RecogniserStream, RecognitionStep
from eventful_det.runtime.scene_cuts import SceneCuts
from eventful_det.runtime.session import KeyFrame, Result, StreamOptions

DEFAULT = Selector(LargestError(2.0), 0.35)
"""What is selected where nobody says otherwise: without boxes, what changed most matters most."""


@dataclass(frozen=True, kw_only=True)
class RecognitionResult(Result):
    """One step of a stream: what happens in the window of tubelets that ends with it.

    The frame is the last of its tubelet; none is held. For all else see `Result`.

    Attributes:
        probabilities: of each head, `(classes,)`, on the CPU.
        names: class names of each head.
    """

    probabilities: Mapping[str, Tensor]
    names: Mapping[str, tuple[str, ...]]

    def top(self, count: int = 5, head: str | None = None) -> list[tuple[str, float]]:
        """The likeliest classes of a head, the first one if None, with their probabilities.

        Raises:
            UserError: the number is below 1, or there is no such head.
        """
        head = head or next(iter(self.names))
        if count < 1 or head not in self.names:
            raise UserError(f"top: expected a number from 1 and one of {', '.join(self.names)}; got {count}, {head!r}")
        scores, labels = self.probabilities[head].topk(min(count, len(self.names[head])))
        return [(self.names[head][i], p) for i, p in zip(labels.tolist(), scores.tolist(), strict=True)]


class FrameClock:
    """Chooses the frames of a source so that they come at the recogniser's rate.

    A source with timestamps is sampled by time: a frame is taken when it is nearer to its moment than the next is
    likely to be. One without is taken to run at the recogniser's frame rate.

    Args:
        stride: frames from one taken to the next ...
        fps: ... at so many frames per second.
    """

    def __init__(self, stride: int, fps: float) -> None:
        self.stride, self.period = stride, stride / fps
        self._due: float | None = None
        self._last = math.inf  # timestamp of the frame before
        self._seen = 0

    def takes(self, frame: VideoFrame) -> bool:
        """Whether the next frame of the source is one of those."""
        self._seen += 1
        now = frame.timestamp
        if now is None:
            return (self._seen - 1) % self.stride == 0
        early, self._last = 0.5 * max(0.0, now - self._last), now
        if self._due is None or not math.isclose(now, self._due, abs_tol=100 * self.period):
            self._due = now  # the first frame, or one behind a gap
        if now < self._due - early:
            return False
        self._due = max(self._due + self.period, now - self.period)
        return True


class RecognitionSession:
    """The frames of one stream, in their order; see `eventful_det.runtime.session.StreamSession`.

    Args:
        config: of the recogniser.
        state: empty, of one stream.
        device: where the recogniser computes.
        name: of the stream.
        scene_cuts: begin anew, with an empty window, when another scene begins.
        options: see `StreamOptions`; regions cannot be ignored.

    Attributes:
        auto, left, variable_macs: have no meaning here: every tubelet is looked at, and costs what is known in advance.
    """

    auto = False
    left = 0.0
    variable_macs: float | None = None

    def __init__(
        self,
        config: RecogniserConfig,
        state: State[RecogniserStream],
        device: torch.device,
        *,
        name: str = "",
        scene_cuts: bool = True,
        options: StreamOptions | None = None,
    ) -> None:
        self.config, self.state, self.device, self.name = config, state, device, name
        self.options = options or StreamOptions()
        self._cuts = SceneCuts() if scene_cuts else None
        self._clock = FrameClock(config.stride, config.fps)
        self._tubelet: list[Tensor] = []
        self._cut = False
        self._index = -1

    @property
    def options(self) -> StreamOptions:
        """See `StreamOptions`."""
        return self._options

    @options.setter
    def options(self, options: StreamOptions) -> None:
        if options.ignore:
            raise UserError("ignore: a recogniser looks at the whole of its crop; leave the regions out")
        self._options = options

    def begin(self, frame: VideoFrame, *, dropped: int = 0) -> KeyFrame | None:
        """Take in the next frame; None until a tubelet is complete."""
        began = time.perf_counter()
        self._index += 1
        if not self._clock.takes(frame):
            return None
        if (self._cuts is not None and self._cuts(frame.image)) or frame.resumed:
            self._tubelet, self._cut = [], True  # the frames before it belong to no whole tubelet
        self._tubelet.append(fit_frame(frame.image, self.config))
        if len(self._tubelet) < self.config.tubelet[0]:
            return None
        tubelet, cut = torch.stack(self._tubelet).to(self.device), self._cut
        self._tubelet, self._cut = [], False
        return KeyFrame(frame, tubelet, cut, True, dropped, {"other": time.perf_counter() - began})

    def aim(self, gate: GateInput, key: KeyFrame) -> GateInput:  # noqa: ARG002 (of the protocol)
        """The gate itself: where what matters, nobody knows."""
        return gate

    def finish(self, key: KeyFrame, step: RecognitionStep, price: float | None = None) -> RecognitionResult:  # noqa: ARG002
        """The result of a tubelet."""
        image = key.frame.image
        side = min(image.shape[0] / step.work.shape[0], image.shape[1] / step.work.shape[1])
        return RecognitionResult(
            probabilities={head: values.cpu() for head, values in step.probabilities.items()},
            names=self.config.classes,
            frame_index=self._index,
            timestamp=key.frame.timestamp,
            cost=step.cost,
            work=step.work,
            token_size=(side, side),
            image=image,
            stream=self.name,
            frame_age=key.frame.age,
            dropped=key.dropped,
        )


def fit_frame(image: NDArray[np.uint8], config: RecogniserConfig) -> Tensor:
    """A frame `(h, w, 3)` as the central crop that the recogniser looks at, `(3, h', w')` in [0, 1]."""
    if config.channels != 3:
        raise UserError(f"this recogniser takes {config.channels} channels; frames have 3")
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)
    x = cover(x[None], config.size)[0]
    ((top, left),) = crop_corners((x.shape[1], x.shape[2]), config.size, 1)
    return x[:, top : top + config.size[0], left : left + config.size[1]]
