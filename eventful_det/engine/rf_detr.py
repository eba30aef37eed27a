"""A compiled RF-DETR: selected tokens are recomputed, in numbers of a short list; the decoder runs in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.protocol import InputTransform
from eventful_det.detectors.rf_detr.model import EventfulRFDETR, Stretch, best_pairs
from eventful_det.detectors.rf_detr.parts import ConvNorm, DecoderShape, Parts
from eventful_det.detectors.rf_detr.projector import everywhere, projector_macs
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.engine.backends import Backend, Graph
from eventful_det.engine.detector import BucketCosts, CompiledDetector, CompiledStream
from eventful_det.engine.rows import CompiledRows, RowsGraph, for_grid
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.macs import ViTShape, dense_macs
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.selector import RandomK, Select
from eventful_det.gating.windows import Grid, Regions


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


@dataclass(frozen=True)
class FixedStretch(Stretch):
    """To squares of `side` alone."""

    side: int = 0

    def __post_init__(self) -> None:
        if self.short_side != self.side:
            raise UserError(f"short_side={self.short_side}: this engine takes {self.side}; export it with another size")


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
        self.config = config
        self.rows = CompiledRows(config.shape, self.grid, buckets, backend, self._unit, config.width)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.names

    @property
    def input_transform(self) -> InputTransform:
        """Frames are stretched to squares."""
        side, config = self.size[0], self.config
        step = self.patch * config.regions
        return FixedStretch(side, side, self.patch, config.mean, step=step, reciprocal=config.reciprocal, side=side)

    @cached_property
    def dense_macs(self) -> dict[str, int]:
        """MACs of the dense detector on a frame, by part."""
        tokens = self.rows.tokens
        return {
            "backbone": dense_macs(self.rows.shape, self.grid, padded_linear=True).total,
            "projector": tokens * self.config.projector,
            "decoder": DecoderShape(**self.config.decoder).macs(tokens),
        }

    def warm_up(self) -> None:
        """Compile what gated frames need, so that no frame has to wait for it."""
        state, frame = self.init_state(), torch.zeros(3, *self.size)
        for count in self.rows.sizes:
            self.step([frame], state, selector=RandomK(count))

    def _costs(self) -> BucketCosts:
        prices = self.rows.prices(lambda count: self._projector_macs(count) if count else 0)
        return BucketCosts(prices, "decoder", self.dense_macs["decoder"])

    def _projector_macs(self, count: int) -> int:
        """MACs when so many tokens are recomputed: all but the first convolution runs in full."""
        return self.dense_macs["projector"] - (self.rows.tokens - count) * self.config.first

    def _new_stream(self, size: tuple[int, int], dense: bool) -> RFDETREngineStream:
        return RFDETREngineStream(size, None if dense else self.rows.init_stream(None, self.grid))

    def _choose(
        self, patches: list[Tensor], streams: list[RFDETREngineStream], select: Select, saliency: list[Tensor | None]
    ) -> Sequence[ChosenTokens]:
        states = [stream.gate for stream in streams if stream.gate is not None]
        return [ChosenTokens(index) for index in self.rows.choose(patches, states, select, saliency)]

    def _run_dense(self, image: Tensor, stream: RFDETREngineStream, watch: Stopwatch) -> dict[str, int]:
        self._detect(stream, *self.backend.run("dense", image[None]))
        watch.lap("backbone")  # all is one graph
        return self.dense_macs

    def _run_gated(
        self, stream: RFDETREngineStream, choice: ChosenTokens, flush: bool, watch: Stopwatch
    ) -> dict[str, int]:
        state, index = stream.gate, choice.tokens
        assert state is not None
        self.rows.refresh(state, index)
        watch.lap("backbone")
        self._detect(stream, *self.backend.run("heads", state.output))
        watch.lap("decoder")  # and projector, which is one graph with it
        count = len(index)
        projector = self._projector_macs(count)
        return self.dense_macs | {"backbone": self.rows.macs(count, flush).total, "projector": projector}

    def _detect(self, stream: RFDETREngineStream, logits: Tensor, boxes: Tensor) -> None:
        """Set the detections: the best pairs of a query and a class."""
        config = self.config
        limits = config.min_score, config.clamped, config.dropped
        stream.detections = best_pairs(logits, boxes, stream.size, *limits)


class HeadsGraph(nn.Module):
    """Decoder, and projector after its first convolution: `(N, 2 C')` to logits `(Q, K)` and boxes `(Q, 4)`."""

    def __init__(self, detector: EventfulRFDETR, grid: Grid) -> None:
        super().__init__()
        self.model, self.parts, self.grid = detector.model, detector.parts, grid

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = project(self.parts, tokens, self.grid).T.unflatten(1, self.grid)[None]  # (1, C, H, W)
        logits, boxes = self.parts.decode(features)
        return logits[0], boxes[0]


class DenseGraph(nn.Module):
    """The dense network on an image `(1, 3, h, w)`, to logits `(Q, K)` and boxes `(Q, 4)`."""

    def __init__(self, detector: EventfulRFDETR, grid: Grid) -> None:
        super().__init__()
        self.spec, self.heads = for_grid(detector.spec, grid), HeadsGraph(detector, grid)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = self.spec.dense(image[0])  # (H, W, C)
        logits, boxes = self.heads(_point(self.heads.parts.projector.first, tokens.flatten(0, 1)))
        return logits, boxes


def project(parts: Parts, tokens: Tensor, grid: Grid) -> Tensor:
    """The dense projector after its first convolution, `(N, 2 C')` to `(N, C)`."""
    projector = parts.projector
    half, rest = tokens.split(projector.hidden, 1)
    maps = [rest]
    for step in projector.inner:
        x = F.conv2d(maps[-1].T.unflatten(1, grid)[None], step.conv.weight, padding=1)
        maps.append(step.after(x[0].flatten(1).T))
    return projector.norm(_point(projector.last, torch.cat([half, *maps[::2]], 1)))


def _point(step: ConvNorm, rows: Tensor) -> Tensor:
    """A 1x1 convolution of cells `(n, C)`."""
    return step.after(rows @ step.conv.weight.flatten(1).T)


def rf_detr_graphs(detector: EventfulRFDETR, side: int) -> Iterator[Graph]:
    """The graphs of an RF-DETR for square inputs.

    Raises:
        UserError: its backbone has no windows with a class token each, or rotary or relative positions.
    """
    spec, projector = detector.spec, detector.parts.projector
    if not isinstance(spec.window, Regions) or not spec.prefix_count or spec.rope is not None or spec.shape.rel_pos:
        raise UserError("an engine needs RF-DETR's own backbone, a windowed DINOv2")
    grid = spec.grid(side, side)
    yield Graph("dense", DenseGraph(detector, grid).eval(), (torch.zeros(1, 3, side, side),), ((),))

    def first(rows: Tensor) -> Tensor:
        """What the projector makes of each token by itself, `(p + r, C)` to `(r, 2 C')`."""
        return _point(projector.first, rows[spec.prefix_count :])

    yield RowsGraph(detector, spec, grid, first).described()
    cells = torch.zeros(grid[0] * grid[1], 2 * projector.hidden)
    yield Graph("heads", HeadsGraph(detector, grid).eval(), (cells,), ((),))
