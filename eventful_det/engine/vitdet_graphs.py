"""The parts of a ViTDet that are compiled: functions of tensors, whose shapes follow from the number of windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.roi_heads import POOL, SingleHead
from eventful_det.detectors.vitdet.rpn import ProposalHead
from eventful_det.detectors.vitdet.vitdet import ConvNorm, ViTDetBackbone
from eventful_det.engine.backends import Graph
from eventful_det.engine.tiles import STAGES
from eventful_det.errors import UserError
from eventful_det.gating.macs import ViTShape
from eventful_det.gating.whole_windows.network import run_windows, tables_of
from eventful_det.gating.whole_windows.rule import cache_shape, global_blocks
from eventful_det.gating.windows import Grid, windows_of

_CPU = torch.device("cpu")


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


def vitdet_graphs(detector: Detector, size: tuple[int, int]) -> Iterator[Graph]:
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
    maps = tuple(torch.zeros(2, 16, 16, channels) for _ in range(STAGES + 1))
    yield Graph("pyramid", PyramidGraph(detector.backbone).eval(), maps[:-1], ((0, 1, 2),) * STAGES)
    if len(head.convs) > 1:
        maps = *maps, *(torch.ones(2, 16, 16, 1) for _ in maps)
    yield Graph("proposals", ProposalGraph(head).eval(), maps, ((0, 1, 2),) * len(maps))
    pooled = torch.zeros(2, POOL, POOL, channels)
    yield Graph("regions", RegionGraph(cast(SingleHead, detector.roi_heads)).eval(), (pooled,), ((0,),))
