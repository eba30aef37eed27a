"""One stream on its way through a detector: is there a scene cut? a key frame? resize, step, rescale.

A session decides and remembers; it does not run the detector, so that many sessions can share a step:

    frame -> begin -> (key frame) -> step of the detector -> finish -> result
                   -> (held frame) --------------------------------> result
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.source import VideoFrame
from eventful_det.detectors.protocol import Costed, InputTransform, Network, S, VideoDetector
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.detectors.saliency import token_saliency
from eventful_det.errors import UserError
from eventful_det.gating.selector import GateInput, Policy, Selector
from eventful_det.gating.state import State
from eventful_det.runtime.drift import Drift
from eventful_det.runtime.motion.boxes import EVERY_ID, BoxMover
from eventful_det.runtime.motion.key_frames import Hold, KeyFrames
from eventful_det.runtime.regions import Polygon, ignored_tokens
from eventful_det.runtime.scene_cuts import SceneCuts


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is the same in the results of all networks.

    Attributes:
        frame_index: from 0.
        timestamp: seconds since the start of the source, or None where it has no clock.
        cost: of this frame.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
        token_size: height and width of a token in pixels of the source frame; the map may reach beyond the frame.
        image: the source frame, `(h, w, 3)` uint8 RGB.
        held: the network did not run on this frame.
        stream: name of the source.
        frame_age: seconds from the capture of the frame to this result; None unless the source is live.
        dropped: frames of a live source that were overtaken by newer ones so far.
    """

    frame_index: int
    timestamp: float | None
    cost: FrameCost
    work: Tensor = field(repr=False)
    token_size: tuple[float, float] = field(repr=False)
    image: NDArray[np.uint8] = field(repr=False)
    held: bool = False
    stream: str = ""
    frame_age: float | None = None
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class StreamResult(Result):
    """One frame of a stream; for all else see `Result`.

    Attributes:
        detections: boxes in pixels of the source frame, scores, labels; on a held frame those of an earlier one, moved
            with their objects.
        names: class names that the labels index.
        drift: how the detections compare with dense ones, on frames on which these were made as well.
        zones: names of those that each detection is in, where there are zones.
    """

    detections: Detections
    names: tuple[str, ...] = field(repr=False)
    drift: Drift | None = None
    zones: tuple[tuple[str, ...], ...] | None = None

    def at_least(self, score: float) -> StreamResult:
        """The same without detections of a lower score."""
        keep = self.detections.scores >= score
        zones = self.zones and tuple(itertools.compress(self.zones, keep.tolist()))
        return dataclasses.replace(self, detections=self.detections[keep], zones=zones)

    def __str__(self) -> str:
        """In one line: the detections with a score of 0.5 or more, and the cost."""
        sure = self.at_least(0.5).detections
        found = zip(sure.labels.tolist(), sure.scores.tolist(), strict=True)
        names = ", ".join(f"{self.names[label]} {score:.2f}" for label, score in found) or "nothing"
        cost = f"{self.cost.total / 1e9:.2f} of {self.cost.dense_total / 1e9:.2f} GMACs"
        return f"{self.stream} frame {self.frame_index}: {names}; {cost}".strip()


@dataclass(frozen=True)
class KeyFrame:
    """A frame on which the detector has to run.

    Attributes:
        frame: of the source.
        image: `(3, h, w)` input of the detector; of a recogniser `(tt, 3, h, w)`.
        flush: recompute everything.
        regular: it came in its turn, not because the stream begins anew.
        dropped: frames of a live source that were overtaken so far.
        seconds: that it took so far, by part.
        expected: boxes of the frames before, moved to this one, in pixels of the input; None = there are none.
    """

    frame: VideoFrame
    image: Tensor
    flush: bool
    regular: bool
    dropped: int
    seconds: dict[str, float]
    expected: Detections | None = None


@dataclass(frozen=True)
class StreamOptions:
    """What a stream has for itself, whatever the others of its pool have; may be exchanged between any two frames.

    Attributes:
        policy: ranks its tokens; None = that of the budget.
        priority: a stream of priority 2 gets as much of a shared budget as two others; above 0.
        ignore: polygons in which nothing is looked for, of points (x, y) relative to width and height. Tokens that lie
            in them whole are recomputed on flushes only; what is detected there is left to the user.
    """

    policy: Policy | None = None
    priority: float = 1.0
    ignore: tuple[Polygon, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.priority < math.inf:
            raise UserError(f"priority must be above 0, got {self.priority}")


T_contra = TypeVar("T_contra", bound=Costed, contravariant=True)
R_co = TypeVar("R_co", bound=Result, covariant=True)


class Session(Protocol[S, T_contra, R_co]):
    """What steps and pools know of a stream: `StreamSession`, or that of a network of another kind.

    `T_contra` is what a step of the network gives, `R_co` the result of a frame.

    Attributes:
        name, state, options, auto, left, variable_macs: see `StreamSession`.
    """

    auto: bool
    name: str
    state: State[S]
    options: StreamOptions
    left: float
    variable_macs: float | None

    def begin(self, frame: VideoFrame, *, dropped: int = 0) -> KeyFrame | R_co | None:
        """Take in the next frame: an input for the network, a result without one, or None: it takes more frames."""

    def aim(self, gate: GateInput, key: KeyFrame) -> GateInput:
        """A gate with what the stream knows of its tokens."""

    def finish(self, key: KeyFrame, step: T_contra, price: float | None = None) -> R_co:
        """The result of an input."""


AnySession: TypeAlias = Session[Any, Any, R_co]


@runtime_checkable
class OpensSessions(Network[Any, Any], Protocol[R_co]):
    """A network that has sessions of its own kind."""

    @property
    def selector(self) -> Selector:
        """What is selected unless it is told."""

    def session(self, *, name: str, scene_cuts: bool, options: StreamOptions | None = None) -> AnySession[R_co]:
        """One for a stream; see `StreamSession`."""


class StreamSession(Generic[S]):
    """The frames of one stream, in their order.

    Args:
        detector: whose steps process the key frames.
        transform: makes its inputs.
        name: of the stream.
        scene_cuts: recompute everything when another scene begins.
        hold: see `KeyFrames`, boxes move with their objects between these; or every n-th frame, whatever moves. A scene
            cut, a new size and a camera that came back make a key frame at once. None = `DEFAULT_HOLD`, and fewer where
            `finish` is told that frames cost more than their budget.
        mover: makes what moves boxes between key frames; None = they stand still (a baseline).
        track: give all objects ids, the unsure as well, also where the network runs on every frame.
        options: see `StreamOptions`.

    Attributes:
        state: what the detector remembers of the stream.
        auto: nobody said on which frames it runs.
        left: frames until the next regular key frame; it may come earlier, see `KeyFrames`.
        spare: of the last frame, what it might have cost and nothing will take, as a share of that.
        variable_macs: MACs that the variable part of the detector takes on average, see `CostModel`; None = not known.

    Raises:
        UserError: `hold` is below 1.
    """

    def __init__(
        self,
        detector: VideoDetector[S],
        transform: InputTransform,
        *,
        name: str = "",
        scene_cuts: bool = True,
        hold: Hold = 1,
        mover: Callable[[], BoxMover] | None = BoxMover,
        track: bool = False,
        options: StreamOptions | None = None,
    ) -> None:
        self.detector, self.transform, self.name = detector, transform, name
        self.auto, self.key_frames, self.options = hold is None, KeyFrames.of(hold), options or StreamOptions()
        self.state = detector.init_state()
        self.variable_macs: float | None = None
        self._cuts = SceneCuts() if scene_cuts else None
        self._last: StreamResult | None = None
        follow = track or isinstance(hold, KeyFrames) or (hold or 1) > 1  # or when the first frame is held
        self._new_mover = partial(BoxMover, EVERY_ID) if track else mover
        self._mover = self._new_mover() if self._new_mover is not None and follow else None
        self.left = self.spare = 0.0
        self._due = 0.0  # frames until the next key frame where nothing is to be paid
        self._debt = 0.0  # frames that have to pay for the key frames so far
        self._tolerable = 0.0  # debt at which the network may run before its time
        self._frames = 0

    def begin(
        self, frame: VideoFrame, *, resized: NDArray[np.uint8] | None = None, dropped: int = 0
    ) -> KeyFrame | StreamResult:
        """Take in the next frame.

        Args:
            frame: of the source.
            resized: the same in the size of the detector's input, where that was made already.
            dropped: frames of a live source that were overtaken so far.

        Returns:
            A key frame, for `finish` after the detector's step; or the result of a held frame.
        """
        began = time.perf_counter()
        self.left, self._due = self.left - 1, self._due - 1
        self._debt, self.spare = max(self._debt - 1, -1.0), max(0.0, -self._debt)
        cut = (self._cuts is not None and self._cuts(frame.image)) or frame.resumed
        last = self._last if self._last is not None and self._last.image.shape == frame.image.shape else None
        moving = time.perf_counter()
        if self._mover is not None:
            if cut or last is None:
                self._mover.forget()  # what stood in another scene
            self._mover.move(frame.image)
        moved = time.perf_counter()
        if last is not None and not cut and not self._is_key_frame():
            return self._hold_boxes(last, frame, dropped, {"motion": moved - moving, "other": moving - began})
        regular = self._last is not None and self.left <= 0
        image = self.transform(frame.image if resized is None else resized).to(self.detector.device)
        expected = None
        if self._mover is not None and self._mover.following:
            expected = self.as_input(self._mover.boxes(), frame.image)
        seconds = {"motion": moved - moving, "other": time.perf_counter() - moved + moving - began}
        return KeyFrame(frame, image, cut, regular, dropped, seconds, expected)

    def aim(self, gate: GateInput, key: KeyFrame) -> GateInput:
        """The gate with the saliency of where objects are now, not of where they were on the last key frame.

        Tokens that the stream ignores are not eligible.
        """
        if gate.grid is None:
            return gate
        if key.expected is not None:
            boxes, scores = key.expected.boxes, key.expected.scores
            gate = gate._replace(saliency=token_saliency(boxes, scores, gate.grid, self.transform.token))
        if not self.options.ignore:
            return gate
        height, width = key.frame.image.shape[:2]
        y, x = self.transform.token_size(key.frame.image)
        ignored = ignored_tokens(self.options.ignore, gate.grid, (y / height, x / width))
        return gate.ignoring(ignored.to(gate.error.device))

    def finish(self, key: KeyFrame, step: StepResult, price: float | None = None) -> StreamResult:
        """The result of a key frame.

        Args:
            key: the frame.
            step: what the detector made of it.
            price: what the step cost, in what a frame may cost: so many frames, held ones included, pay for it. None =
                the tokens are chosen by somebody, and so are the frames: every one unless `hold` says otherwise.
        """
        image = key.frame.image
        self._debt += price or 0.0  # on average the budget is kept, however early the network runs
        self._tolerable = self._debt / 2
        self._due = 1 if self.auto and price is None else self.key_frames.every
        self.left = max(self._due, self._debt)
        if self._mover is None and self._new_mover is not None and self.left > 1:
            self._mover = self._new_mover()
            self._mover.move(image)
        detections = self.transform.restore(step.detections, image)
        return self._next(
            StreamResult(
                detections=detections if self._mover is None else self._mover.key(detections),
                names=self.detector.names,
                frame_index=self._frames,
                timestamp=key.frame.timestamp,
                cost=step.cost,
                work=step.work,
                token_size=self.transform.token_size(image),
                image=image,
                stream=self.name,
                frame_age=key.frame.age,
                dropped=key.dropped,
            )
        )

    @property
    def debt(self) -> float:
        """Frames, the next ones, that have to pay for the key frames so far."""
        return max(0.0, self._debt)

    def relieve(self, frames: float) -> None:
        """Others pay for so many frames of the debt; less than 0 = that is more by so many."""
        frames = min(frames, self.debt)
        self._debt -= frames
        self.left = max(min(self.left, self._due), self.left - frames)

    def as_input(self, detections: Detections, image: NDArray[np.uint8]) -> Detections:
        """Detections on a frame in pixels of the detector's input."""
        y, x = self.transform.token_size(image)
        return detections.scaled(self.transform.token / x, self.transform.token / y)

    def _is_key_frame(self) -> bool:
        """Whether the detector has to run although the scene goes on: the only place where that is decided."""
        early = self._mover is not None and self._debt <= self._tolerable and self.key_frames.early(self._mover)
        return self.left <= 0 or early

    def _hold_boxes(
        self, last: StreamResult, frame: VideoFrame, dropped: int, seconds: dict[str, float]
    ) -> StreamResult:
        """The result of a frame between key frames: the only place where that gets its boxes."""
        return self._next(
            dataclasses.replace(
                last,
                detections=last.detections if self._mover is None else self._mover.boxes(),
                frame_index=self._frames,
                timestamp=frame.timestamp,
                cost=dataclasses.replace(last.cost.idle(), seconds=seconds),
                work=torch.zeros_like(last.work),
                image=frame.image,
                held=True,
                frame_age=frame.age,
                dropped=dropped,
            )
        )

    def _next(self, result: StreamResult) -> StreamResult:
        self._last = result
        self._frames += 1
        return result
