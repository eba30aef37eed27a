"""The parts of RF-DETR that are compiled: functions of tensors, whose shapes follow from the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.parts import ConvNorm, Parts
from eventful_det.engine.graphs import Graph
from eventful_det.errors import UserError
from eventful_det.gating.spec import Block, ViTSpec
from eventful_det.gating.windows import Grid, Regions, windows_of

_NO_KEY = -1e9  # bias of a key in another window


def check_exportable(spec: ViTSpec) -> None:
    """Refuse a backbone that the graphs do not know.

    Raises:
        UserError: it has no windows with a class token each, or rotary or relative positions.
    """
    if not isinstance(spec.window, Regions) or not spec.prefix_count or spec.rope is not None or spec.shape.rel_pos:
        raise UserError("an engine needs RF-DETR's own backbone, a windowed DINOv2")


class BackboneGraph(nn.Module):
    """The ViT on some tokens, and the projector's first convolution: the `Rows` rule with a mask in place of tiles.

    `(patches (r, P), index (r,), caches ...)` to keys and values of each block `(p + r, 2, heads, d)` in rows of its
    cache, these rows `(p + r,)`, and what the projector makes of each token by itself, `(r, 2 C')`.
    A cache is `(windows * slots, 2, heads, d)`, window by window, each with its class token first; global blocks have
    the same order.
    """

    def __init__(self, detector: EventfulRFDETR, grid: Grid) -> None:
        super().__init__()
        self.model, self.spec, device = detector.model, detector.spec, detector.device
        self.first = detector.parts.projector.first
        spec, windows = self.spec, windows_of(grid, detector.spec.window, device)
        each, tokens = spec.prefix_count // windows.count, torch.arange(grid[0] * grid[1], device=device)
        slots = each + windows.slots
        prefix = torch.arange(spec.prefix_count, device=device)
        self.prefix_rows = prefix // each * slots + prefix % each
        self.rows = windows.window[tokens] * slots + windows.slot[tokens] + each
        self.window = torch.arange(windows.count * slots, device=device) // slots  # of each key
        self.positions = None if spec.positions is None else spec.positions(grid).detach()

    def forward(self, patches: Tensor, index: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        spec = self.spec
        z = spec.embed(patches)
        if self.positions is not None:
            z = z + self.positions.index_select(0, index)
        assert spec.prefix is not None
        z = spec.norm_pre(torch.cat([spec.prefix(), z]))  # (p + r, D)
        rows = torch.cat([self.prefix_rows, self.rows.index_select(0, index)])
        other = self.window.index_select(0, rows)[:, None] != self.window  # (p + r, keys)
        bias = other.to(z.dtype) * _NO_KEY
        new, outputs = [], []
        for i, (block, cache) in enumerate(zip(spec.blocks, caches, strict=True)):
            qkv = block.qkv(block.norm1(z))  # (p + r, 3, heads, d)
            new.append(qkv[:, 1:])
            cache = cache.clone()
            cache[rows] = new[-1]
            z = z + block.proj(_attend(qkv[:, 0], cache, bias if block.window else None))
            z = z + block.mlp(block.norm2(z))
            if i + 1 in spec.outputs:
                outputs.append(spec.norm(z)[spec.prefix_count :])
        return *new, rows, _point(self.first, torch.cat(outputs, 1))


def _attend(q: Tensor, cache: Tensor, bias: Tensor | None) -> Tensor:
    """Queries `(r, heads, d)` to keys and values `(keys, 2, heads, d)`, `(r, D)`."""
    k, v = cache.permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, heads, keys, d) each
    o = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=bias)
    return o[0].transpose(0, 1).flatten(1)


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

    positions: Tensor

    def __init__(self, detector: EventfulRFDETR, grid: Grid) -> None:
        super().__init__()
        self.spec, self.heads = detector.spec, HeadsGraph(detector, grid)
        if self.spec.positions is not None:  # compilers would resize them in another way
            self.register_buffer("positions", self.spec.positions(grid).detach(), persistent=False)
            self.spec = dataclasses.replace(self.spec, positions=lambda _: self.positions)
            assert self.spec.prefix_count  # worked out now: no part of the graph

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


def cache_of(spec: ViTSpec, block: Block, grid: Grid) -> tuple[int, ...]:
    """`(windows * slots, 2, heads, d)` of a block's keys and values, class tokens included."""
    windows = windows_of(grid, spec.window, torch.device("cpu"))
    return windows.count * windows.slots + spec.prefix_count, 2, block.heads, spec.dim // block.heads


def rf_detr_graphs(detector: EventfulRFDETR, side: int) -> Iterator[Graph]:
    """The graphs of an RF-DETR for square inputs.

    Raises:
        UserError: see `check_exportable`.
    """
    spec = detector.spec
    check_exportable(spec)
    grid = spec.grid(side, side)
    caches = [torch.zeros(cache_of(spec, block, grid)) for block in spec.blocks]
    hidden = detector.parts.projector.hidden
    yield Graph("dense", DenseGraph(detector, grid).eval(), (torch.zeros(1, 3, side, side),), ((),))
    yield Graph(
        "backbone",
        BackboneGraph(detector, grid).eval(),
        (torch.zeros(2, spec.shape.pixels), torch.arange(2), *caches),
        ((0,), (0,), *[()] * len(caches)),
    )
    yield Graph("heads", HeadsGraph(detector, grid).eval(), (torch.zeros(grid[0] * grid[1], 2 * hidden),), ((),))
