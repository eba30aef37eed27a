"""The parts of a detector that are compiled: functions of tensors, whose shapes follow from the number of windows.

A 3x3 convolution of the heads runs as an ordinary dense one on tiles: windows with a halo, or a level as a whole where
that has fewer cells. What is around is read from maps that the caller keeps, as lists of cells, see `models.cells`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.vitdet.cells import Layout, layout_of
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.macs import HeadSizes, level_sizes
from eventful_det.detectors.vitdet.roi_heads import POOL, SingleHead
from eventful_det.detectors.vitdet.rpn import ProposalHead
from eventful_det.detectors.vitdet.vitdet import ConvNorm, ViTDetBackbone
from eventful_det.errors import UserError
from eventful_det.gating.macs import ViTShape
from eventful_det.gating.whole_windows import cache_shape, global_blocks, run_windows, tables_of
from eventful_det.gating.windows import Grid, windows_of

_CPU = torch.device("cpu")
_STAGES = 4  # levels p2 to p5 are made from tokens; p6 is every other cell of p5


def check_exportable(shape: ViTShape, heads: nn.Module) -> int:
    """The side of the windows.

    Raises:
        UserError: the detector has none, or windows that the pyramid cannot halve, or a cascade of region heads.
    """
    side = shape.window
    if not isinstance(side, int) or side < 2 or side % 2:
        raise UserError("an engine needs a backbone with windows of an even number of tokens along a side")
    if not isinstance(heads, SingleHead):
        raise UserError("an engine needs a single region head; a cascade runs in PyTorch alone")
    return side


@dataclass(frozen=True)
class LevelTiles:
    """The windows of a frame on one level, as numbers of cells.

    Attributes:
        own: `(windows, s^2)` the cells of each, s along a side; `Geometry.nowhere` outside of the level.
        read, write: the same with a halo, for every 3x3 convolution: `(windows, side, side)` what is read, cell 0 (a
            border, always zero) outside, and `(windows, side^2)` what is written.
        places: as the last of `write`, but numbered as predictions are.
    """

    own: Tensor
    read: tuple[Tensor, Tensor]
    write: Tensor
    places: Tensor


@dataclass(frozen=True)
class Geometry:
    """Where windows lie on the levels of a pyramid.

    Attributes:
        grid: tokens of the frame.
        window: side of a window in tokens.
        convs: 3x3 convolutions of the proposal head.
    """

    grid: Grid
    window: int
    convs: int

    @cached_property
    def layout(self) -> Layout:
        """The cells of all levels."""
        return layout_of(tuple(level_sizes(self.grid)), _CPU)

    @property
    def nowhere(self) -> int:
        """Number of a cell past the last, to which what lies outside is written."""
        return self.layout.starts[-1]

    @property
    def anchors(self) -> int:
        """Cells of all levels without borders."""
        return sum(self.layout.lengths)

    def side(self, level: int) -> int:
        """Cells of a window along a side."""
        return 4 * self.window >> level

    @cached_property
    def levels(self) -> list[LevelTiles]:
        """The windows on p2 to p5."""
        return [self._tiles(level) for level in range(_STAGES)]

    def is_tiled(self, level: int, count: int) -> bool:
        """Whether so many windows with their halos have fewer cells than the level."""
        if level >= _STAGES:
            return False
        return count * (self.side(level) + 2 * (1 + self.convs)) ** 2 < self.layout.lengths[level]

    def sizes(self, count: int) -> HeadSizes[int]:
        """At how many places the heads run for so many windows; regions are left out."""
        cells = self.layout.lengths
        around = [
            [
                count * (self.side(level) + 2 * (1 + halo)) ** 2 if self.is_tiled(level, count) else cells[level]
                for level in range(len(cells))
            ]
            for halo in range(self.convs + 1)
        ]
        # Of several convolutions the first run further out, so that the last has what it reads.
        rpn = [
            sum(
                count * (self.side(level) + 2 * (1 + 2 * self.convs - done)) ** 2
                if self.is_tiled(level, count)
                else cells[level]
                for level in range(len(cells))
            )
            for done in range(1, self.convs + 1)
        ]
        tokens = count * self.window**2
        return HeadSizes(
            (tokens, tokens, tokens, tokens // 4), tuple(around[0][:_STAGES]), tuple(rpn), sum(around[-1]), 0
        )

    def _tiles(self, level: int) -> LevelTiles:
        inside = [self._cells(level, halo) for halo in (0, 1, 1 + self.convs)]
        reads = [self._cells(level, halo, outside=0) for halo in (2, 1 + 2 * self.convs)]
        places = torch.cat([self.layout.place, torch.tensor([self.anchors])])[inside[2]]
        return LevelTiles(inside[0].flatten(1), (reads[0], reads[1]), inside[1].flatten(1), places.flatten(1))

    def _cells(self, level: int, halo: int, outside: int | None = None) -> Tensor:
        """The cells of every window and around it, `(windows, s + 2 halo, s + 2 halo)`."""
        rows, cols = self.layout.sizes[level]
        down, across = (-(-side // self.window) for side in self.grid)
        side = self.side(level)
        within = torch.arange(-halo, side + halo)
        y, x = (torch.arange(n)[:, None] * side + within for n in (down, across))  # (n, s + 2 halo)
        y, x = y[:, None, :, None], x[None, :, None, :]
        numbers = self.layout.numbers(level, y, x)
        there = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
        return torch.where(there, numbers, self.nowhere if outside is None else outside).flatten(0, 1)


class BackboneGraph(nn.Module):
    """The ViT on some windows, and what the pyramid makes of each token by itself.

    `(patches (W, slots, P), windows (W,), caches ...)` to keys and values of each global block
    `(W, slots, 2, heads, d)`, and the cells of p2 to p5 before their 3x3 convolutions `(W, cells, C)`.
    """

    def __init__(self, detector: Detector, grid: Grid) -> None:
        super().__init__()
        self.detector, self.grid = [detector], grid
        self.backbone = detector.backbone
        self.tables = tables_of(detector.spec, grid)

    def forward(self, patches: Tensor, windows: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        (detector,) = self.detector
        tokens, *kv = run_windows(detector.spec, self.tables, self.grid, patches, windows, caches)
        side = int(tokens.shape[1] ** 0.5)
        maps = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (W, D, side, side)
        cells = [stage[:-1](maps).flatten(2).transpose(1, 2) for stage in self.backbone.stages]  # (W, s^2, C) each
        return *kv, torch.cat(cells, 1)


class PyramidGraph(nn.Module):
    """The last convolutions of p2 to p5: `(tiles, h, w, C)` of each level to `(cells, C)` of all, level by level."""

    def __init__(self, backbone: ViTDetBackbone) -> None:
        super().__init__()
        self.last = nn.ModuleList(stage[-1] for stage in backbone.stages)

    def forward(self, *levels: Tensor) -> Tensor:
        rows = []
        for conv, x in zip(self.last, levels, strict=True):
            conv = cast(ConvNorm, conv)
            x = conv.norm(F.conv2d(x.permute(0, 3, 1, 2), conv.weight))  # (tiles, C, h - 2, w - 2)
            rows.append(x.permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(rows)


class ProposalGraph(nn.Module):
    """The proposal head: `(tiles, h, w, C)` of p2 to p6 to logits `(cells, A)` and deltas `(cells, 4 A)`.

    With more convolutions than one a mask `(tiles, h, w, 1)` of each level follows, 0 outside of it: the padding of all
    but the first.
    """

    def __init__(self, head: ProposalHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas, levels = [], [], len(inputs) if len(self.head.convs) == 1 else len(inputs) // 2
        for i, x in enumerate(inputs[:levels]):
            x = x.permute(0, 3, 1, 2)
            for done, conv in enumerate(self.head.convs):
                conv = cast(nn.Conv2d, conv)
                if done:
                    x = x * inputs[levels + i][:, done:-done, done:-done].permute(0, 3, 1, 2)
                x = F.relu(F.conv2d(x, conv.weight, conv.bias))
            logits.append(self.head.objectness_logits(x).permute(0, 2, 3, 1).flatten(0, 2))
            deltas.append(self.head.anchor_deltas(x).permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(logits), torch.cat(deltas)


class RegionGraph(nn.Module):
    """The region head: `(n, 7, 7, C)` to logits `(n, K + 1)` and deltas `(n, 4 K)`."""

    def __init__(self, heads: SingleHead) -> None:
        super().__init__()
        self.head, self.predictor = heads.box_head, heads.box_predictor

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.predictor(self.head(pooled.permute(0, 3, 1, 2)))
        return logits, deltas


class DenseGraph(nn.Module):
    """The dense network on an image `(1, 3, h, w)`.

    Returns the levels p2 to p6 as a list of cells `(cells, C)` with their borders, logits `(anchors,)` and deltas
    `(anchors, 4)`.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.proposal_generator.rpn_head

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = self.backbone(image)
        cells = [F.pad(level, (1, 1, 1, 1))[0].permute(1, 2, 0).flatten(0, 1) for level in levels]
        logits, deltas = zip(*(self.head(level) for level in levels), strict=True)
        return torch.cat(cells), torch.cat(list(logits), 1)[0], torch.cat(list(deltas), 1)[0]


@dataclass(frozen=True)
class Graph:
    """A part to compile.

    Attributes:
        name: of its file.
        module: that computes it.
        example: inputs.
        free: for each input the dimensions that depend on the number of windows or regions.
    """

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    free: tuple[tuple[int, ...], ...]


def graphs_of(detector: Detector, size: tuple[int, int]) -> Iterator[Graph]:
    """The graphs of a detector for inputs of `size` (height, width) in pixels, in evaluation mode.

    Raises:
        UserError: see `check_exportable`.
    """
    shape, config = detector.spec.shape, detector.config
    side = check_exportable(shape, detector.roi_heads)
    grid = (size[0] // config.patch, size[1] // config.patch)
    places = windows_of(grid, side, _CPU)
    few, channels, head = min(2, places.count), config.channels, detector.proposal_generator.rpn_head
    caches = [torch.zeros(cache_shape(shape, grid)) for _ in global_blocks(shape)]
    yield Graph("dense", DenseGraph(detector).eval(), (torch.zeros(1, 3, *size),), ((),))
    yield Graph(
        "backbone",
        BackboneGraph(detector, grid).eval(),
        (torch.zeros(few, places.slots, shape.pixels), torch.arange(few), *caches),
        ((0,), (0,), *[()] * len(caches)),
    )
    maps = tuple(torch.zeros(2, 16, 16, channels) for _ in range(_STAGES + 1))
    yield Graph("pyramid", PyramidGraph(detector.backbone).eval(), maps[:-1], ((0, 1, 2),) * _STAGES)
    if len(head.convs) > 1:
        maps = *maps, *(torch.ones(2, 16, 16, 1) for _ in maps)
    yield Graph("proposals", ProposalGraph(head).eval(), maps, ((0, 1, 2),) * len(maps))
    pooled = torch.zeros(2, POOL, POOL, channels)
    yield Graph("regions", RegionGraph(cast(SingleHead, detector.roi_heads)).eval(), (pooled,), ((0,),))
