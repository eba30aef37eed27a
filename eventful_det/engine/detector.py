"""`CompiledDetector`: a `VideoDetector` whose steps are compiled graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, InputTransform, exactly
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.streaming import StreamingDetector
from eventful_det.engine.backends import Backend, OnCPU
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.rules import per_stream
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, StreamState, TensorTree
from eventful_det.gating.windows import Grid


@dataclass
class CompiledStream(TensorTree):
    """What a compiled detector remembers of one stream, heads apart.

    Attributes:
        size: (height, width) of the last frame in pixels.
        gate: state of the rule; None under the dense rule.
        detections: of the last frame.
    """

    size: tuple[int, int]
    gate: StreamState | None = None
    detections: Detections | None = None


class Choice(Protocol):
    """What is recomputed of a frame."""

    @property
    def tokens(self) -> Tensor:
        """`(r,)` flat indices."""


S = TypeVar("S", bound=CompiledStream)
C = TypeVar("C", bound=Choice)


@dataclass(frozen=True)
class BucketCosts:
    """Costs by how many tokens are selected: a `CostModel`.

    Attributes:
        prices: MACs without the variable part for 0, 1, ... N selected tokens, as ranges of numbers that cost the same:
            (first, MACs) ascending.
        variable: the part of which only a bound is known.
        most: MACs of that part.
    """

    prices: tuple[tuple[int, int], ...]
    variable: str
    most: int

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """See `CostModel.macs`."""
        total = _prices(self, grid[0] * grid[1]).to(order.device)[: len(order) + 1].clone()
        total[1:] += self.most if variable is None else variable
        return total

    def everything(self, grid: Grid) -> int:
        """See `CostModel.everything`."""
        return self.prices[-1][1] + self.most


@lru_cache(maxsize=64)
def _prices(costs: BucketCosts, tokens: int) -> Tensor:
    """`(N + 1,)` MACs for 0, 1, ... N selected tokens."""
    ends = [first for first, _ in costs.prices[1:]] + [tokens + 1]
    counts = torch.tensor([end - first for (first, _), end in zip(costs.prices, ends, strict=True)])
    return torch.tensor([macs for _, macs in costs.prices]).repeat_interleave(counts)


class CompiledDetector(OnCPU, StreamingDetector, ABC, Generic[S, C]):
    """A detector for video in a compiled engine, for frames of one size: a `VideoDetector`.

    Gate and boxes are PyTorch's, in float32. All that is remembered of a stream belongs to the caller.

    Args:
        size: (height, width) of its inputs in pixels; smaller frames are padded at the bottom and right.
        patch: side of a token in pixels.
        normal: mean and standard deviation of RGB in [0, 1].
        rule: how tokens are recomputed.
        backend: runs the graphs.

    Attributes:
        rule: as given; the only one beside `Dense`.
        grid: tokens of a frame.
    """

    def __init__(
        self,
        size: tuple[int, int],
        patch: int,
        normal: tuple[Sequence[float], Sequence[float]],
        rule: AnyRule,
        backend: Backend,
    ) -> None:
        self.size, self.patch, self.rule, self.backend = size, patch, rule, backend
        self.grid: Grid = (size[0] // patch, size[1] // patch)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normal)
        self._shift, self._scale = -mean / std, 1 / std
        self._unit = float(std.mean()) / 0.5  # of the gate's errors, as in `Rows`

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""

    @property
    @abstractmethod
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, as large as fits."""

    @property
    @abstractmethod
    def dense_macs(self) -> dict[str, int]:
        """MACs of the dense detector on a frame, by part."""

    @abstractmethod
    def warm_up(self) -> None:
        """Compile what gated frames need, so that no frame has to wait for it."""

    @abstractmethod
    def _costs(self) -> BucketCosts:
        """What frames will cost under the engine's rule."""

    @abstractmethod
    def _new_stream(self, size: tuple[int, int], dense: bool) -> S:
        """What is remembered of a stream before its first frame."""

    @abstractmethod
    def _choose(
        self, patches: list[Tensor], streams: list[S], select: Select, saliency: list[Tensor | None]
    ) -> Sequence[C]:
        """What is recomputed of each stream; the states of their gates are updated."""

    @abstractmethod
    def _run_dense(self, image: Tensor, stream: S, watch: Stopwatch) -> dict[str, int]:
        """The dense network on a normalised image, setting the stream's detections; MACs by part."""

    @abstractmethod
    def _run_gated(self, stream: S, choice: C, flush: bool, watch: Stopwatch) -> dict[str, int]:
        """The network on what was chosen, from the reference of the gate, setting detections; MACs by part."""

    def init_state(self, batch: int = 1) -> State[S]:
        """An empty state for `batch` streams."""
        return State([None] * batch)

    def cost_model(self, rule: AnyRule) -> BucketCosts:
        """What frames will cost.

        Raises:
            UserError: under the dense rule.
        """
        if rule == Dense():
            raise UserError("costs are known in advance under the engine's own rule only")
        return self._costs()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self,
        frames: Sequence[Tensor],
        state: State[S],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[StepResult]:
        """Detect in the next frame of every stream; see `VideoDetector.step`.

        Args:
            frames: `(3, h, w)` of each stream, RGB in [0, 1], not larger than `size`.
            state: of the streams, updated in place.
            rule: `Dense()`, or that of this engine, which is also what the default stands for, exact or not.
            selector: which tokens are recomputed.
            flush: streams to recompute in full.
            timing: measure the seconds of each part.

        Raises:
            UserError: the numbers of frames and streams differ, a frame is too large, or the rule is another.
        """
        if rule not in (DEFAULT_RULE, exactly(DEFAULT_RULE), self.rule, Dense()):  # streams never share a product
            raise UserError(
                f"this engine was exported with {self.rule}; it cannot follow {rule}. Use its own or Dense()"
            )
        flushes = [flush] * len(state) if isinstance(flush, bool) else flush
        watch, dense = Stopwatch(self.device, timing), rule == Dense()
        with self.backend.around():
            images = [self._prepare(frame) for frame in per_stream("frames", list(frames), state)]
            streams = [self._stream(state, i, frame, dense) for i, frame in enumerate(frames)]
            watch.lap("other")
            choices: Sequence[C | None] = [None] * len(streams)
            begins = [stream.detections is None for stream in streams]
            if not dense:
                choices, begins = self._gate(images, streams, flushes, selector)
            watch.lap("backbone")
            shared = {part: seconds / len(streams) for part, seconds in watch.seconds().items()}
            results = []
            for image, stream, choice, begin in zip(images, streams, choices, begins, strict=True):
                own = Stopwatch(self.device, timing)
                result = self._run(image, stream, choice, begin, own)
                parts = own.seconds()
                result.cost.seconds.update(parts | {part: parts.get(part, 0.0) + shared[part] for part in shared})
                results.append(result)
        return results

    def _stream(self, state: State[S], i: int, frame: Tensor, dense: bool) -> S:
        """A stream, begun anew for a frame of another size or after frames under another rule."""
        stream, size = state.streams[i], (frame.shape[-2], frame.shape[-1])
        if stream is None or stream.size != size or (stream.gate is None) != dense:
            state.streams[i] = stream = self._new_stream(size, dense)
        return stream

    def _prepare(self, frame: Tensor) -> Tensor:
        """Normalise a frame and pad it to the engine's size."""
        (height, width), (_, h, w) = self.size, frame.shape
        if h > height or w > width:
            raise UserError(
                f"a frame of {h} x {w} does not fit an engine for {height} x {width}; export it for that size"
            )
        image = torch.addcmul(self._shift, frame, self._scale)
        return image if (h, w) == (height, width) else F.pad(image, (0, width - w, 0, height - h))

    def _gate(
        self, images: Sequence[Tensor], streams: list[S], flushes: Sequence[bool], select: Select
    ) -> tuple[Sequence[C], list[bool]]:
        """What is recomputed of every stream, and which of them begin anew."""
        begins, patches, saliency = [], [], []
        for image, stream, new in zip(images, streams, flushes, strict=True):
            assert stream.gate is not None
            if new:
                stream.gate.frame = 0
            found = stream.detections
            begins.append(stream.gate.frame == 0)
            patches.append(self._patches(image))
            saliency.append(None if found is None else token_saliency(found.boxes, found.scores, self.grid, self.patch))
        return self._choose(patches, streams, select, saliency), begins

    def _patches(self, image: Tensor) -> Tensor:
        """An image `(3, h, w)` as patches `(N, 3 * patch^2)`."""
        (rows, cols), p = self.grid, self.patch
        x = image.unflatten(2, (cols, p)).unflatten(1, (rows, p))  # (3, H, p, W, p)
        return x.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)

    def _run(self, image: Tensor, stream: S, choice: C | None, flush: bool, watch: Stopwatch) -> StepResult:
        """One frame of one stream; `choice` None = dense."""
        tokens, everything = self.grid[0] * self.grid[1], self.dense_macs
        if choice is None:
            macs = self._run_dense(image, stream, watch)
            index = torch.arange(tokens)
        else:
            index = choice.tokens
            if len(index) or stream.detections is None:
                macs = self._run_gated(stream, choice, flush, watch)
            else:
                macs = {**dict.fromkeys(everything, 0), "backbone": tokens * 3 * self.patch**2}  # the gate's
        assert stream.detections is not None
        cost = FrameCost(macs, everything, len(index), tokens, flush)
        work = torch.zeros(tokens).index_fill_(0, index, 1.0)
        return StepResult(stream.detections.clone(), cost, work.view(self.grid))
