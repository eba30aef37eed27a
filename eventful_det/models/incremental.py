"""Pyramid, proposals and regions that recompute only what a changed token can reach, exact given the token map.

Everything before a 3x3 convolution is computed token by token. The 3x3 convolutions run on a list of cells: those
within one cell of a change. Maps are stored with a border of zeros, which is the zero padding of the convolutions.
A proposal that is bit-identical to one of the last frame, and whose region saw no changed cell, keeps its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from eventful_det.gating.state import TensorTree
from eventful_det.models.proposals import ProposalGenerator
from eventful_det.models.regions import Regions, level_of
from eventful_det.models.vitdet import STRIDES, ConvNorm, ViTDetBackbone

DENSE_ABOVE = 0.6  # share of changed tokens above which whole maps are cheaper than lists of cells
_ROWS = 8192  # cells whose neighbourhoods are gathered at once


@dataclass
class LevelState(TensorTree):
    """Maps of one pyramid level of h x w cells; `(h + 2, w + 2, C)` ones have a border of zeros.

    Attributes:
        inner: `(h + 2, w + 2, C)` before the 3x3 convolution of the pyramid; None for p6.
        feature: `(h + 2, w + 2, C)` the level itself.
        hidden: the same after each convolution of the proposal head but the last.
        logits: `(h * w * A,)` objectness.
        deltas: `(h * w * A, 4)`.
    """

    inner: Tensor | None
    feature: Tensor
    hidden: list[Tensor]
    logits: Tensor
    deltas: Tensor

    @property
    def image(self) -> Tensor:
        """The level as the region heads read it, `(1, C, h, w)`."""
        return self.feature[1:-1, 1:-1].permute(2, 0, 1)[None]


@dataclass
class RegionState(TensorTree):
    """Proposals `(n, 4)` of the last frame, and what the region heads said of them: see `Regions.score`."""

    proposals: Tensor
    scores: Tensor
    boxes: Tensor


@dataclass
class HeadsState(TensorTree):
    """What the heads remember of a stream."""

    levels: list[LevelState]
    regions: RegionState | None = None


def refresh_pyramid(
    backbone: ViTDetBackbone, tokens: Tensor, changed: Tensor, levels: list[LevelState]
) -> tuple[list[Tensor], int]:
    """Recompute the cells of p2 to p6 that changed tokens reach.

    Args:
        backbone: holds the pyramid.
        tokens: `(H, W, D)` the full token map.
        changed: `(r,)` flat indices of the changed tokens.
        levels: updated in place.

    Returns:
        Per level the changed cells as a mask `(h, w)`; and the MACs that ran.
    """
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    mask.view(-1)[changed] = True
    pooled = F.max_pool2d(mask[None].float(), 2)[0] > 0
    halved = pooled.flatten().nonzero().squeeze(1)
    pixels = tokens.flatten(0, 1).index_select(0, changed)
    fine, coarse = (changed, mask, pixels), (halved, pooled, _max_of_four(tokens, halved))
    masks, macs = [], 0
    stages = (backbone.simfp_2, backbone.simfp_3, backbone.simfp_4, backbone.simfp_5)
    for stage, level, sources in zip(stages, levels, (fine, fine, fine, coarse), strict=False):
        more, dirty = _refresh_level(stage, level, *sources)
        macs += more
        masks.append(dirty)
    levels[4].feature[1:-1, 1:-1] = levels[3].feature[1:-1:2, 1:-1:2]
    return [*masks, masks[3][::2, ::2]], macs


def refresh_proposals(generator: ProposalGenerator, levels: list[LevelState], masks: list[Tensor]) -> int:
    """Recompute objectness and deltas where changed cells reach; updates the levels in place, returns MACs."""
    head, macs = generator.rpn_head, 0
    for level, mask in zip(levels, masks, strict=True):
        inputs = [level.feature, *level.hidden]
        for conv, source, target in zip(head.convs, inputs, [*level.hidden, None], strict=True):
            mask = _dilate(mask)
            cells = _cells(mask)
            rows = F.relu(_convolve(cast(nn.Conv2d, conv), source, cells))
            macs += cells.numel() * cast(nn.Conv2d, conv).weight.numel()
            if target is not None:
                _write(target, cells, rows)
        inside = mask.flatten().nonzero().squeeze(1)
        for layer, values in ((head.objectness_logits, level.logits), (head.anchor_deltas, level.deltas)):
            update = F.linear(rows, layer.weight.flatten(1), layer.bias)
            values.view(mask.numel(), -1).index_copy_(0, inside, update)
            macs += cells.numel() * layer.weight.numel()
    return macs


def refresh_regions(
    heads: Regions, proposals: Tensor, masks: list[Tensor] | None, state: HeadsState, size: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """What the region heads say of the proposals `(n, 4)`; only new or touched ones are computed.

    Args:
        heads: the region heads.
        proposals: of this frame.
        masks: changed cells of each level; None = everything changed.
        state: levels are read, regions are replaced.
        size: (height, width) of the frame in pixels.

    Returns:
        The results of `Regions.score`, and the number of proposals that were computed.
    """
    before = state.regions
    known = torch.full((len(proposals),), -1, dtype=torch.long, device=proposals.device)
    if masks is not None and before is not None and len(before.proposals) and len(proposals):
        same = (proposals[:, None] == before.proposals[None]).all(dim=-1)
        found, place = same.max(dim=1)
        read = heads.regions(before.proposals, before.boxes)
        touched = torch.stack([_touched(heads, boxes, masks) for boxes in read]).any(dim=0)
        clean = found & ~touched[place]
        known[clean] = place[clean]
    fresh = (known < 0).nonzero().squeeze(1)
    scores, boxes = heads.score([level.image for level in state.levels], [proposals[fresh]], [size])
    if before is not None and len(fresh) < len(proposals):
        scores = before.scores[known.clamp(min=0)].index_copy(0, fresh, scores)
        boxes = before.boxes[known.clamp(min=0)].index_copy(0, fresh, boxes)
    state.regions = RegionState(proposals, scores, boxes)
    return scores, boxes, len(fresh)


def fill_heads(backbone: ViTDetBackbone, generator: ProposalGenerator, tokens: Tensor) -> HeadsState:
    """Compute all maps of a frame densely, from its token map `(H, W, D)`."""
    image = tokens.permute(2, 0, 1)[None]
    inners: list[Tensor | None] = []
    features: list[Tensor] = []
    for stage in (backbone.simfp_2, backbone.simfp_3, backbone.simfp_4, backbone.simfp_5):
        inner = stage[:-1](image)
        inners.append(_bordered(inner))
        features.append(stage[-1](inner))
    inners.append(None)
    features.append(F.max_pool2d(features[-1], kernel_size=1, stride=2))
    levels = []
    for inner, feature in zip(inners, features, strict=True):
        hidden, x = [], feature
        for conv in generator.rpn_head.convs:
            x = F.relu(conv(x))
            hidden.append(x)
        logits, deltas = generator.rpn_head.predict(x)
        levels.append(LevelState(inner, _bordered(feature), [_bordered(h) for h in hidden[:-1]], logits[0], deltas[0]))
    return HeadsState(levels)


def _refresh_level(
    stage: nn.Sequential, level: LevelState, sources: Tensor, mask: Tensor, pixels: Tensor
) -> tuple[int, Tensor]:
    """Recompute the cells of a level that changed source cells reach.

    Args:
        stage: of the pyramid.
        level: updated in place.
        sources: `(n,)` flat indices of the changed cells on the map that the stage starts from.
        mask: `(h, w)` the same as a mask.
        pixels: `(n, D)` their values.

    Returns:
        The MACs that ran, and the changed cells of the level as a mask.
    """
    x, macs = pixels[:, None, None], 0
    for layer in stage[:-1]:
        x, more = _pointwise(layer, x)
        macs += more
    assert level.inner is not None
    scale, width = x.shape[1], level.inner.shape[1]
    first = (sources // mask.shape[1] * scale + 1) * width + sources % mask.shape[1] * scale + 1
    _write(level.inner, (first[:, None] + _square(scale, width, x.device)).flatten(), x.flatten(0, 2))
    rows, cols = mask.shape
    dirty = _dilate(mask[:, None, :, None].expand(rows, scale, cols, scale).reshape(rows * scale, cols * scale))
    reached = _cells(dirty)
    last = cast(ConvNorm, stage[-1])
    _write(level.feature, reached, _normalise(last.norm, _convolve(last, level.inner, reached)))
    return macs + reached.numel() * last.weight.numel(), dirty


def _pointwise(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """One layer of a pyramid stage on separate patches of cells, `(n, s, s, C)`; also its MACs.

    A transposed convolution whose stride is its size turns every cell into 2x2 cells, so it is a matrix product.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        n, side, _, channels = x.shape
        x = x.reshape(-1, channels) @ layer.weight.flatten(1)
        x = x.view(n, side, side, layer.out_channels, 2, 2).permute(0, 1, 4, 2, 5, 3)
        x = x.reshape(n, 2 * side, 2 * side, layer.out_channels) + cast(Tensor, layer.bias)
        return x, n * side * side * layer.weight.numel()
    if isinstance(layer, nn.Conv2d):  # with its norm: a ConvNorm, or detectron2's Conv2d
        cells = x.shape[:3].numel()
        norm = cast(ConvNorm, layer).norm
        return _normalise(norm, F.linear(x, layer.weight.flatten(1))), cells * layer.weight.numel()
    if hasattr(layer, "normalized_shape"):
        return _normalise(cast(LayerNorm2d, layer), x), 0
    return (x, 0) if isinstance(layer, nn.MaxPool2d) else (layer(x), 0)  # the maximum was taken before


def _normalise(norm: LayerNorm2d, x: Tensor) -> Tensor:
    """Layer norm over channels that come last."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _convolve(conv: nn.Conv2d, bordered: Tensor, cells: Tensor) -> Tensor:
    """A 3x3 convolution at a list of cells: `(h + 2, w + 2, C)` read around `(n,)` bordered indices gives `(n, C')`."""
    width = bordered.shape[1]
    around = _square(3, width, cells.device) - width - 1
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    source = bordered.flatten(0, 1)
    parts = []
    for some in cells.split(_ROWS):
        patches = source.index_select(0, (some[:, None] + around).flatten()).view(some.numel(), weight.shape[0])
        parts.append(patches @ weight if conv.bias is None else torch.addmm(conv.bias, patches, weight))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@lru_cache(maxsize=64)
def _square(side: int, width: int, device: torch.device) -> Tensor:
    """Flat offsets of a square of cells from its first, on a map of so many columns."""
    within = torch.arange(side, device=device)
    return (within[:, None] * width + within).flatten()


def _cells(mask: Tensor) -> Tensor:
    """Flat indices, in the bordered map, of the cells of a mask `(h, w)`."""
    return F.pad(mask, (1, 1, 1, 1)).flatten().nonzero().squeeze(1)


def _write(bordered: Tensor, cells: Tensor, rows: Tensor) -> None:
    """Put `(n, C)` rows at bordered indices of a map, in place."""
    bordered.view(-1, bordered.shape[2]).index_copy_(0, cells, rows)


def _bordered(image: Tensor) -> Tensor:
    """`(1, C, h, w)` to `(h + 2, w + 2, C)` with a border of zeros."""
    return F.pad(image[0], (1, 1, 1, 1)).permute(1, 2, 0).contiguous()


def _dilate(mask: Tensor) -> Tensor:
    """Cells `(h, w)` within one cell of the mask."""
    return F.max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0


def _max_of_four(tokens: Tensor, cells: Tensor) -> Tensor:
    """2x2 maxima of the token map `(H, W, D)` at flat cells of the halved grid, `(n, D)`."""
    height, width = tokens.shape[0] // 2, tokens.shape[1] // 2
    y, x = cells // width * 2, cells % width * 2
    assert height * width > 0
    return torch.stack([tokens[y + i, x + j] for i in (0, 1) for j in (0, 1)]).amax(dim=0)


def _touched(heads: Regions, proposals: Tensor, masks: list[Tensor]) -> Tensor:
    """Whether the region that a proposal is read from holds a changed cell, `(n,)`."""
    level = level_of(proposals, heads.config.canonical_box)
    touched = torch.zeros(len(proposals), dtype=torch.bool, device=proposals.device)
    for i, mask in enumerate(masks[:4]):
        here = (level == i).nonzero().squeeze(1)
        if not here.numel():
            continue
        sums = F.pad(mask.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        corners = proposals[here] / STRIDES[i] - 0.5
        limit = torch.tensor([mask.shape[1], mask.shape[0]], device=mask.device)
        low = corners[:, :2].floor().long().clamp(min=0).minimum(limit - 1)
        high = (corners[:, 2:].ceil().long() + 2).clamp(min=1).minimum(limit)
        (x1, y1), (x2, y2) = low.unbind(1), high.unbind(1)
        touched[here] = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1] > 0
    return touched
