"""A compiled ViTDet: whole windows are recomputed, and its heads run on tiles of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.data.video.transforms import Image, fit_size
from eventful_det.detectors.protocol import InputTransform
from eventful_det.detectors.stopwatch import Stopwatch
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.detector import Detector, padded_size
from eventful_det.detectors.vitdet.incremental import HeadsState, refresh_regions
from eventful_det.detectors.vitdet.pooling import pool_regions
from eventful_det.detectors.vitdet.roi_heads import POOL, Reader, SingleHead
from eventful_det.engine.backends import Backend
from eventful_det.engine.detector import BucketCosts, CompiledDetector, CompiledStream
from eventful_det.engine.vitdet.graphs import check_exportable
from eventful_det.engine.vitdet.tiles import Geometry
from eventful_det.errors import UserError
from eventful_det.gating.macs import dense_macs
from eventful_det.gating.selector import RandomK, Select
from eventful_det.gating.whole_windows.rule import (
    Chosen,
    Windows,
    WindowsState,
    cache_shape,
    global_blocks,
    new_state,
    windows_macs,
)
from eventful_det.gating.windows import windows_of

_LOG = logging.getLogger(__name__)
_REGION_STEPS = 4  # the region head is compiled for quarters of the proposals


def widescreen_size(config: ModelConfig) -> tuple[int, int]:
    """(height, width) of the inputs that a detector makes of frames of 16:9."""
    short = min(config.short_side, round(config.long_side * 9 / 16))
    return padded_size((short, round(short * 16 / 9)), config)


@dataclass(frozen=True)
class FittedInput(InputTransform):
    """To inputs that fit into those of an engine, portrait ones too.

    Attributes:
        largest: (height, width) of an input in pixels.
    """

    largest: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.short_side > min(self.largest) or self.long_side > max(self.largest):
            raise UserError(
                f"short_side={self.short_side}, long_side={self.long_side}: this engine takes "
                f"{self.largest[0]} x {self.largest[1]} pixels at most; export it with another size"
            )

    def _size(self, image: Image) -> tuple[int, int]:
        height, width = super()._size(image)
        scale = min(1.0, self.largest[0] / height, self.largest[1] / width)
        return max(1, round(scale * height)), max(1, round(scale * width))


@dataclass
class ViTDetStream(CompiledStream):
    """What a compiled ViTDet remembers of one stream.

    Attributes:
        heads: maps of the pyramid and the heads, each with one more row at its end, for what lies outside.
    """

    gate: WindowsState | None = None
    heads: HeadsState | None = None


class _RegionHead(SingleHead):
    """A region head whose layers are a graph, run for a quarter, a half, ... of all proposals."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config)
        self.backend, self.step = backend, -(-config.proposals // _REGION_STEPS)

    def _predict(self, read: Reader, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = read(proposals).permute(0, 2, 3, 1)  # (n, 7, 7, C), as it lies in memory
        count = len(pooled)
        pooled = F.pad(pooled, (0, 0, 0, 0, 0, 0, 0, -count % self.step))
        if not len(pooled):
            pooled = pooled.new_zeros(self.step, *pooled.shape[1:])
        logits, deltas = self.backend.run("regions", pooled)
        return logits[:count].clone(), deltas[:count].clone()

    def warm_up(self) -> None:
        """Compile all steps."""
        for count in range(1, _REGION_STEPS + 1):
            pooled = torch.zeros(count * self.step, POOL, POOL, self.config.channels, dtype=self.backend.dtype)
            self.backend.run("regions", pooled)


class CompiledViTDet(CompiledDetector[ViTDetStream, Chosen]):
    """A ViTDet in a compiled engine: a `VideoDetector`.

    Non-maximum suppression and the reading of regions are PyTorch's.

    Args:
        config: of the detector.
        size: (height, width) of its inputs in pixels, multiples of 32; smaller frames are padded.
        rule: with the numbers of windows that are compiled.
        backend: runs the graphs.
    """

    rule: Windows

    def __init__(self, config: ModelConfig, size: tuple[int, int], rule: Windows, backend: Backend) -> None:
        super().__init__(size, config.patch, (config.pixel_mean, config.pixel_std), rule, backend)
        self.config = config
        with torch.device("meta"):  # sizes and settings; the weights are in the graphs
            self._plain = Detector(config).eval()
            self._regions = _RegionHead(config, backend).eval()
        self.shape, self.head_weights = self._plain.spec.shape, self._plain.head_weights
        self._side = check_exportable(self.shape, self._plain.roi_heads)
        self.geometry = Geometry(self.grid, self._side, config.rpn_convs)
        self._windows = windows_of(self.grid, self._side, self.device).count
        self._padded: set[tuple[int, int]] = set()  # sizes of frames that were warned of
        self._inside = torch.cat([self.geometry.layout.inside, torch.tensor([False])]).float()[:, None]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.config.classes

    @property
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, as large as fits."""
        sides, token = (min(self.size), max(self.size)), self.patch
        return FittedInput(*sides, token, self.config.pixel_mean, largest=self.size)

    @cached_property
    def dense_macs(self) -> dict[str, int]:
        """MACs of the dense detector on a frame, by part."""
        heads = self.head_weights.dense(self.grid, self.config.proposals)
        return {"backbone": dense_macs(self.shape, self.grid).total, **heads}

    def warm_up(self) -> None:
        """Compile what gated frames need, so that no frame has to wait for it."""
        state, frame = self.init_state(), torch.zeros(3, *self.size)
        for count in self.rule.sizes(self._windows):
            share = -(-count * self.grid[0] * self.grid[1] // self._windows)
            self.step([frame], state, selector=RandomK(share))
        self._regions.warm_up()

    def _costs(self) -> BucketCosts:
        tokens, sizes = self.grid[0] * self.grid[1], (0, *self.rule.sizes(self._windows))
        numbers = [self.rule.windows_for(selected, tokens, self._windows) for selected in range(tokens + 1)]
        prices = tuple((numbers.index(size), sum(self._macs(size, 0, False).values())) for size in sizes)
        return BucketCosts(prices, "roi", self.head_weights.regions * self.config.proposals)

    def _macs(self, count: int, regions: int, flush: bool) -> dict[str, int]:
        """MACs by part of a frame with so many windows."""
        heads = dict.fromkeys(("pyramid", "rpn", "roi"), 0)
        if count:
            heads = self.head_weights.macs(dataclasses.replace(self.geometry.sizes(count), regions=regions))
        return {"backbone": windows_macs(self.shape, self.grid, count, everything=flush).total, **heads}

    def _new_stream(self, size: tuple[int, int], dense: bool) -> ViTDetStream:
        self._warn_of_padding(size)
        if dense:
            return ViTDetStream(size)
        shape, ratios, dtype = self.shape, len(self.config.anchor_ratios), self.backend.dtype
        caches = [torch.zeros(cache_shape(shape, self.grid), dtype=dtype) for _ in global_blocks(shape)]
        geometry, channels = self.geometry, self.config.channels
        heads = HeadsState(
            self.grid,
            inner=torch.zeros(geometry.nowhere + 1, channels, dtype=dtype),
            feature=torch.zeros(geometry.nowhere + 1, channels, dtype=dtype),
            hidden=[],
            logits=torch.zeros((geometry.anchors + 1) * ratios),
            deltas=torch.zeros((geometry.anchors + 1) * ratios, 4),
        )
        return ViTDetStream(size, new_state(self.grid, shape.pixels, 0, caches, torch.zeros(0)), heads=heads)

    def _warn_of_padding(self, size: tuple[int, int]) -> None:
        """Say so once where PyTorch would pad frames of this size less."""
        config, sides = self.config, (min(self.size), max(self.size))
        if self.size == widescreen_size(config):
            sides = config.short_side, config.long_side
        needed, same_shape = padded_size(size, config), padded_size(fit_size(*size, *sides), config)
        if needed == self.size or size in self._padded:
            return
        self._padded.add(size)
        height, width = needed if same_shape == self.size else same_shape
        _LOG.warning(
            "frames of %d x %d in an engine for %d x %d: padded more or less than in PyTorch, so boxes differ; "
            "for them, export with size=[%d,%d]",
            *(*size, *self.size, height, width),
        )

    def _choose(
        self, patches: list[Tensor], streams: list[ViTDetStream], select: Select, saliency: list[Tensor | None]
    ) -> Sequence[Chosen]:
        gates = [stream.gate for stream in streams if stream.gate is not None]
        return self.rule.choose(patches, gates, select, saliency, self._side, 3, self._unit)

    def _run_dense(self, image: Tensor, stream: ViTDetStream, watch: Stopwatch) -> dict[str, int]:
        feature, logits, deltas = self.backend.run("dense", image[None])
        watch.lap("backbone")  # and pyramid and proposals, which are one graph with it
        layout = self.geometry.layout
        proposals = self._plain.proposal_generator.select(layout.sizes, logits, deltas, stream.size)
        watch.lap("rpn")

        def read(boxes: list[Tensor]) -> Tensor:
            return pool_regions(feature, layout, torch.cat(boxes), self.config.canonical_box)

        output = self._regions.score(read, [proposals], [stream.size])
        stream.detections = self._regions.select(output, stream.size)
        watch.lap("roi")
        backbone = dense_macs(self.shape, self.grid, padded_linear=True).total
        return {"backbone": backbone, **self.head_weights.dense(self.grid, len(proposals))}

    def _run_gated(self, stream: ViTDetStream, choice: Chosen, flush: bool, watch: Stopwatch) -> dict[str, int]:
        windows, heads = choice.windows, stream.heads
        assert heads is not None
        self._refresh_tokens(stream, choice)
        watch.lap("backbone")
        tiled = [self.geometry.is_tiled(level, len(windows)) for level in range(len(self._cells))]
        self._refresh_pyramid(heads, windows, tiled)
        watch.lap("pyramid")
        self._refresh_proposals(heads, windows, tiled)
        anchors = self.geometry.anchors * len(self.config.anchor_ratios)
        select = self._plain.proposal_generator.select
        sizes = self.geometry.layout.sizes
        proposals = select(sizes, heads.logits[:anchors], heads.deltas[:anchors], stream.size)
        watch.lap("rpn")
        output, judged = refresh_regions(self._regions, proposals, choice.tokens, heads, stream.size)
        stream.detections = self._regions.select(output, stream.size)
        watch.lap("roi")
        return self._macs(len(windows), judged, flush)

    def _refresh_tokens(self, stream: ViTDetStream, choice: Chosen) -> None:
        """The ViT on some windows, and the pyramid before its 3x3 convolutions."""
        gate, heads = stream.gate, stream.heads
        assert gate is not None and heads is not None
        patches = choice.patches(gate.reference)  # which has just been renewed there
        *kv, cells = self.backend.run("backbone", patches, choice.windows, *gate.caches)
        for cache, rows in zip(gate.caches, kv, strict=True):
            cache.index_copy_(0, choice.windows, rows)
        own = torch.cat([level.own.index_select(0, choice.windows) for level in self.geometry.levels], 1)  # (W, cells)
        heads.inner.index_copy_(0, own.flatten(), cells.flatten(0, 1))

    def _refresh_pyramid(self, heads: HeadsState, windows: Tensor, tiled: Sequence[bool]) -> None:
        """The levels around some windows."""
        levels = self.geometry.levels
        (rows,) = self.backend.run("pyramid", *self._tiles(heads.inner, windows, tiled[: len(levels)], 0))
        numbers = [
            level.write.index_select(0, windows).flatten() if tiled[i] else self._cells[i]
            for i, level in enumerate(levels)
        ]
        heads.feature.index_copy_(0, torch.cat(numbers), rows)
        heads.feature.index_copy_(0, self._cells[-1], heads.feature.index_select(0, self._even))  # p6

    def _refresh_proposals(self, heads: HeadsState, windows: Tensor, tiled: Sequence[bool]) -> None:
        """Objectness and deltas around some windows."""
        inputs = self._tiles(heads.feature, windows, tiled, 1)
        if self.config.rpn_convs > 1:
            inputs += self._tiles(self._inside, windows, tiled, 1)
        logits, deltas = self.backend.run("proposals", *inputs)
        levels, place = self.geometry.levels, self.geometry.layout.place
        places = [
            levels[i].places.index_select(0, windows).flatten() if tiled[i] else place[cells]
            for i, cells in enumerate(self._cells)
        ]
        for values, rows in ((heads.logits, logits), (heads.deltas, deltas)):
            values.view(-1, rows.shape[1]).index_copy_(0, torch.cat(places), rows)

    def _tiles(self, values: Tensor, windows: Tensor, tiled: Sequence[bool], stage: int) -> list[Tensor]:
        """What the first (0) or second (1) kind of convolution reads of each level, `(tiles, h, w, C)`."""
        inputs = []
        for level, there in enumerate(tiled):
            if there:
                read = self.geometry.levels[level].read[stage].index_select(0, windows)  # (W, s, s)
                inputs.append(values.index_select(0, read.flatten()).view(*read.shape, -1))
            else:
                whole = self.geometry.layout.view(level, values).permute(0, 2, 3, 1)  # (1, h + 2, w + 2, C)
                more = self.config.rpn_convs - 1 if stage else 0
                inputs.append(F.pad(whole, (0, 0, more, more, more, more)) if more else whole)
        return inputs

    @cached_property
    def _cells(self) -> list[Tensor]:
        """The cells of each level without its border."""
        layout = self.geometry.layout
        return [
            layout.numbers(level, torch.arange(rows)[:, None], torch.arange(cols)).flatten()
            for level, (rows, cols) in enumerate(layout.sizes)
        ]

    @cached_property
    def _even(self) -> Tensor:
        """The cells of p5 that are those of p6."""
        layout = self.geometry.layout
        rows, cols = layout.sizes[-1]
        return layout.numbers(3, 2 * torch.arange(rows)[:, None], 2 * torch.arange(cols)).flatten()
