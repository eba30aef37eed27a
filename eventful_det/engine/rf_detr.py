"""A compiled RF-DETR: selected tokens are recomputed, in numbers of a short list; the decoder runs in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eventful_det.detectors.protocol import InputTransform
from eventful_det.detectors.rf_detr.model import EventfulRFDETR, Stretch, best_pairs
from eventful_det.detectors.rf_detr.parts import DecoderShape
from eventful_det.detectors.rf_detr.projector import everywhere, projector_macs
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.engine.backends import Backend
from eventful_det.engine.costs import BucketCosts
from eventful_det.engine.detector import CompiledDetector, CompiledStream
from eventful_det.files import JsonObject
from eventful_det.gating.comparison import compare
from eventful_det.gating.macs import Macs, ViTShape, attention_macs, dense_macs
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.selector import GateInput, RandomK, Select
from eventful_det.gating.whole_windows import bucket_sizes
from eventful_det.gating.windows import Regions


@dataclass(frozen=True)
class RFDETRConfig:
    """What is known of an RF-DETR beside its graphs.

    Attributes:
        names: of the classes.
        mean, std: of RGB in [0, 1].
        reciprocal, clamped: see `Parts`.
        min_score: detections below it are dropped.
        dropped: classes that are not reported.
        vit: sizes of the backbone, see `ViTShape`; windows as `regions`.
        regions: windows along a side.
        width: of what is kept of a token: the projector's first convolution.
        first, projector: MACs of that convolution and of the whole projector for one token.
        decoder: sizes of the decoder.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reciprocal: bool
    clamped: bool
    min_score: float
    dropped: tuple[int, ...]
    vit: JsonObject
    regions: int
    width: int
    first: int
    projector: int
    decoder: dict[str, int]

    @classmethod
    def of(cls, detector: EventfulRFDETR) -> RFDETRConfig:
        """That of a detector in PyTorch."""
        parts, shape = detector.parts, vars(detector.spec.shape)
        return cls(
            names=parts.names,
            mean=parts.mean,
            std=parts.std,
            reciprocal=parts.reciprocal,
            clamped=parts.clamped,
            min_score=detector.min_score,
            dropped=tuple(detector.dropped),
            vit={key: value for key, value in shape.items() if key != "window"},
            regions=detector.spec.regions,
            width=2 * parts.projector.hidden,
            first=parts.projector.first.conv.weight.numel(),
            projector=projector_macs(parts.projector, everywhere(parts.projector, (1, 1))),
            decoder=dict(vars(parts.decoder)),
        )

    @property
    def shape(self) -> ViTShape:
        """Sizes of the backbone."""
        values = self.vit | {"global_blocks": tuple(self.vit["global_blocks"])}
        return ViTShape(**values, window=Regions(self.regions))


@dataclass
class RFDETREngineStream(CompiledStream):
    """What a compiled RF-DETR remembers of one stream: the state of its `Rows`."""

    gate: RowsState | None = None


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens to recompute, `(r,)`."""

    tokens: Tensor


class CompiledRFDETR(CompiledDetector[RFDETREngineStream, ChosenTokens]):
    """An RF-DETR in a compiled engine: a `VideoDetector`.

    Args:
        config: of the detector.
        side: of its square inputs in pixels.
        buckets: numbers of tokens that are compiled: shares (float) or numbers (int); all of them are always in it.
        backend: runs the graphs.
    """

    rule: Rows

    def __init__(self, config: RFDETRConfig, side: int, buckets: tuple[float | int, ...], backend: Backend) -> None:
        super().__init__((side, side), config.vit["patch"], (config.mean, config.std), Rows(), backend)
        self.config, self.shape = config, config.shape
        self.sizes = bucket_sizes(buckets, self.grid[0] * self.grid[1])

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.names

    @property
    def input_transform(self) -> InputTransform:
        """Frames are stretched to squares."""
        side, config = self.size[0], self.config
        step = self.patch * config.regions
        return Stretch(side, side, self.patch, config.mean, step=step, reciprocal=config.reciprocal)

    @cached_property
    def dense_macs(self) -> dict[str, int]:
        """MACs of the dense detector on a frame, by part."""
        tokens = self.grid[0] * self.grid[1]
        return {
            "backbone": dense_macs(self.shape, self.grid, padded_linear=True).total,
            "projector": tokens * self.config.projector,
            "decoder": DecoderShape(**self.config.decoder).macs(tokens),
        }

    def warm_up(self) -> None:
        """Compile what gated frames need, so that no frame has to wait for it."""
        state, frame = self.init_state(), torch.zeros(3, *self.size)
        for count in self.sizes:
            self.step([frame], state, selector=RandomK(count))

    def _costs(self) -> BucketCosts:
        sizes = zip((1, *(size + 1 for size in self.sizes)), self.sizes, strict=False)
        prices = tuple((low, self._backbone_macs(size, False) + self._projector_macs(size)) for low, size in sizes)
        return BucketCosts(((0, self._backbone_macs(0, False)), *prices), "decoder", self.dense_macs["decoder"])

    def _backbone_macs(self, count: int, flush: bool) -> int:
        """MACs for so many tokens; windows are masks, so all queries meet all keys."""
        shape, tokens = self.shape, self.grid[0] * self.grid[1]
        rows = count + shape.prefix if count else 0
        products = rows * (tokens + shape.prefix)
        linear = Macs(count * shape.pixels * shape.dim + shape.depth * rows * shape.weights)
        gate = Macs(gate=0 if flush else tokens * shape.pixels)
        return (linear + gate + attention_macs(shape, products, products, rows, self.grid).times(shape.depth)).total

    def _projector_macs(self, count: int) -> int:
        """MACs when so many tokens are recomputed: all but the first convolution runs in full."""
        return self.dense_macs["projector"] - (self.grid[0] * self.grid[1] - count) * self.config.first

    def _new_stream(self, size: tuple[int, int], dense: bool) -> RFDETREngineStream:
        if dense:
            return RFDETREngineStream(size)
        shape, tokens, dtype = self.shape, self.grid[0] * self.grid[1], self.backend.dtype
        cache = (tokens + shape.prefix, 2, shape.heads, shape.dim // shape.heads)
        gate = RowsState(
            self.rule.layout,
            self.grid,
            reference=torch.zeros(tokens, shape.pixels),
            age=torch.ones(tokens, dtype=torch.int32),
            caches=[torch.zeros(cache, dtype=dtype) for _ in range(shape.depth)],
            output=torch.zeros(tokens, self.config.width, dtype=dtype),
            prefix=None,
        )
        return RFDETREngineStream(size, gate)

    def _choose(
        self, patches: list[Tensor], streams: list[RFDETREngineStream], select: Select, saliency: list[Tensor | None]
    ) -> Sequence[ChosenTokens]:
        states = [stream.gate for stream in streams if stream.gate is not None]
        gates = []
        for i, (now, state, weight) in enumerate(zip(patches, states, saliency, strict=True)):
            if state.frame:
                error, noise = compare(now, state.reference, 3, self._unit)
                gates.append(GateInput(error, state.age, state.frame, state.grid, weight, i, noise))
        asked = [gate.stream for gate in gates]
        indices = dict(zip(asked, select(gates) if gates else (), strict=True))
        choices = []
        for i, (now, state) in enumerate(zip(patches, states, strict=True)):
            index = self._filled(indices[i], state.age) if i in indices else torch.arange(len(now))
            state.frame += 1
            state.age.add_(1).index_fill_(0, index, 1)
            state.reference.index_copy_(0, index, now.index_select(0, index))
            choices.append(ChosenTokens(index))
        return choices

    def _filled(self, index: Tensor, age: Tensor) -> Tensor:
        """Selected tokens `(r,)`, and the stalest of the others up to the next number that is compiled."""
        count = next(size for size in (0, *self.sizes) if size >= len(index))
        stale = age.index_fill(0, index, -1).topk(count - len(index)).indices
        return torch.cat([index, stale])

    def _run_dense(self, image: Tensor, stream: RFDETREngineStream, watch: Stopwatch) -> dict[str, int]:
        self._detect(stream, *self.backend.run("dense", image[None]))
        watch.lap("backbone")  # all is one graph
        return self.dense_macs

    def _run_gated(
        self, stream: RFDETREngineStream, choice: ChosenTokens, flush: bool, watch: Stopwatch
    ) -> dict[str, int]:
        state, index = stream.gate, choice.tokens
        assert state is not None
        patches = state.reference.index_select(0, index)  # which has just been renewed there
        *kv, rows, tokens = self.backend.run("backbone", patches, index, *state.caches)
        for cache, new in zip(state.caches, kv, strict=True):
            cache.index_copy_(0, rows, new)
        state.output.index_copy_(0, index, tokens)
        watch.lap("backbone")
        self._detect(stream, *self.backend.run("heads", state.output))
        watch.lap("decoder")  # and projector, which is one graph with it
        count = len(index)
        projector = self._projector_macs(count)
        return self.dense_macs | {"backbone": self._backbone_macs(count, flush), "projector": projector}

    def _detect(self, stream: RFDETREngineStream, logits: Tensor, boxes: Tensor) -> None:
        """Set the detections: the best pairs of a query and a class."""
        config = self.config
        limits = config.min_score, config.clamped, config.dropped
        stream.detections = best_pairs(logits, boxes, stream.size, *limits)
