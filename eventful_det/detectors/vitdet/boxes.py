"""Box arithmetic with detectron2's conventions: no +1, un-rounded anchors, clamped scale deltas."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

SCALE_CLAMP = math.log(1000.0 / 16)  # largest growth of a box by its deltas, as in detectron2


def encode(boxes: Tensor, targets: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas that turn `boxes` into `targets`, both `(n, 4)` xyxy; returns `(n, 4)` (dx, dy, dw, dh)."""
    (x, y, w, h), (tx, ty, tw, th) = _centres(boxes), _centres(targets)
    return torch.stack(
        [
            weights[0] * (tx - x) / w,
            weights[1] * (ty - y) / h,
            weights[2] * torch.log(tw / w),
            weights[3] * torch.log(th / h),
        ],
        dim=1,
    )


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Apply deltas `(n, k * 4)` to boxes `(n, 4)` xyxy; returns `(n, k * 4)`."""
    x, y, w, h = (value[:, None] for value in _centres(boxes))
    dx, dy, dw, dh = (deltas[:, i::4] / weights[i] for i in range(4))
    cx, cy = dx * w + x, dy * h + y
    half_w = dw.clamp(max=SCALE_CLAMP).exp() * w * 0.5
    half_h = dh.clamp(max=SCALE_CLAMP).exp() * h * 0.5
    return torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], dim=-1).flatten(1)


def cell_anchors(size: float, ratios: tuple[float, ...]) -> Tensor:
    """Un-rounded anchors of one area around the origin, `(ratios, 4)` xyxy; ratio = height / width."""
    widths = torch.tensor([math.sqrt(size**2 / ratio) for ratio in ratios])
    heights = widths * torch.tensor(ratios)
    return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


def grid_anchors(cells: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Anchors of a feature map, `(height * width * A, 4)`, in row-major order of cells."""
    y = torch.arange(height, device=cells.device, dtype=cells.dtype) * stride
    x = torch.arange(width, device=cells.device, dtype=cells.dtype) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    return (shifts[:, :, None] + cells).view(-1, 4)


def match(truth: Tensor, boxes: Tensor, low: float, high: float, keep_best: bool) -> tuple[Tensor, Tensor]:
    """Match boxes to ground truth by overlap.

    Args:
        truth: `(g, 4)` ground-truth boxes.
        boxes: `(n, 4)` anchors or proposals.
        low, high: below `low` a box is background, from `high` on it is foreground, between it is ignored.
        keep_best: the best boxes of each ground truth are foreground whatever their overlap.

    Returns:
        `(n,)` matched ground-truth index and `(n,)` label: 1 foreground, 0 background, -1 ignored.
    """
    if truth.shape[0] == 0:
        zeros = torch.zeros(boxes.shape[0], dtype=torch.long, device=boxes.device)
        return zeros, zeros.clone()
    overlaps = box_iou(truth, boxes)
    best, matched = overlaps.max(dim=0)
    label = torch.full_like(matched, -1)
    label[best < low] = 0
    label[best >= high] = 1
    if keep_best:
        top = overlaps.max(dim=1, keepdim=True).values
        label[((overlaps == top) & (top > 0)).any(dim=0)] = 1
    return matched, label


def set_aside(label: Tensor, boxes: Tensor, regions: Tensor) -> Tensor:
    """Match labels in which background boxes that lie by half in a region to ignore are ignored, `(n,)`.

    Args:
        label: what `match` returned.
        boxes: `(n, 4)` anchors or proposals.
        regions: `(r, 4)` where nobody knows what is there.
    """
    if not regions.shape[0]:
        return label
    low, high = torch.max(boxes[:, None, :2], regions[:, :2]), torch.min(boxes[:, None, 2:], regions[:, 2:])
    common = (high - low).clamp(min=0).prod(dim=2)  # (n, r)
    inside = common.amax(dim=1) > 0.5 * (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return label.masked_fill((label == 0) & inside, -1)


def area_of(boxes: Tensor, areas: Tensor) -> Tensor:
    """The index `(n,)` of the area, of `(a, 4)` disjoint ones xyxy, that holds the centre of each box `(n, 4)`.

    The first if none does.
    """
    x, y, _, _ = (value[:, None] for value in _centres(boxes))
    inside = (x >= areas[:, 0]) & (y >= areas[:, 1]) & (x < areas[:, 2]) & (y < areas[:, 3])
    return inside.int().argmax(dim=1)


def sample(label: Tensor, count: int, foreground: float) -> tuple[Tensor, Tensor]:
    """Draw foreground and background indices, `count` in all, at most the share `foreground` of them positive."""
    positive, negative = (label == 1).nonzero().squeeze(1), (label == 0).nonzero().squeeze(1)
    positives = min(positive.numel(), int(count * foreground))
    negatives = min(negative.numel(), count - positives)
    return _draw(positive, positives), _draw(negative, negatives)


def _draw(indices: Tensor, count: int) -> Tensor:
    return indices[torch.randperm(indices.numel(), device=indices.device)[:count]]


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return boxes[:, 0] + 0.5 * w, boxes[:, 1] + 0.5 * h, w, h
