"""RoIAlign on a list of cells: every bin of a region is a weighted sum of cells, whatever level they are on.

It equals torchvision's on each level, with as many samples per bin as the region has cells (`sampling_ratio=0`) and
aligned corners. There, channels come first and a whole level has to be laid out that way; here they come last, as the
maps of a stream have them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.detectors.vitdet.cells import Layout
from eventful_det.detectors.vitdet.roi_heads import POOL, level_of
from eventful_det.detectors.vitdet.vitdet import STRIDES


def pool_regions(values: Tensor, layout: Layout, boxes: Tensor, canonical_box: float) -> Tensor:
    """Read boxes from the levels that suit their sizes.

    Args:
        values: `(cells, C)` of the levels p2, p3, ...
        layout: of the cells.
        boxes: `(n, 4)` xyxy in pixels.
        canonical_box: side in pixels of a box that is read from p4.

    Returns:
        `(n, C, 7, 7)`, channels last in memory.
    """
    level = level_of(boxes, canonical_box)
    stride, start, rows, cols = (
        torch.tensor(values, device=boxes.device)[level]
        for values in (STRIDES, layout.starts, *zip(*layout.sizes, strict=True))
    )
    x, weight_x = _taps(boxes[:, 0] / stride - 0.5, boxes[:, 2] / stride - 0.5, cols)
    y, weight_y = _taps(boxes[:, 1] / stride - 0.5, boxes[:, 3] / stride - 0.5, rows)
    y = (y + 1) * (cols + 2)[:, None, None] + (start + 1)[:, None, None]
    cells = y[:, :, None, :, None] + x[:, None, :, None]
    weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None]
    bins = F.embedding_bag(  # cells of weight 0 are read as well, which is quicker than to leave them out
        cells.flatten(3).flatten(0, 2),
        values,
        mode="sum",
        per_sample_weights=weights.flatten(3).flatten(0, 2).to(values.dtype),
    )
    return bins.view(len(boxes), POOL, POOL, values.shape[1]).permute(0, 3, 1, 2)


def _taps(start: Tensor, end: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Where the bins of some regions are read along one axis, by linear interpolation at evenly spaced samples.

    Args:
        start, end: `(n,)` of the regions, in cells.
        limit: `(n,)` cells of the level.

    Returns:
        `(n, 7, taps)` cells, and their weights; 0 beyond the samples of a region.
    """
    size = ((end - start) / POOL)[:, None, None]
    samples = size.ceil().clamp(min=1)
    most = int(samples.max()) if len(samples) else 1
    bins, sample = torch.arange(POOL, device=start.device)[:, None], torch.arange(most, device=start.device)
    place = start[:, None, None] + bins * size + (sample + 0.5) * size / samples
    last = (limit - 1)[:, None, None]
    inside = (sample < samples) & (place >= -1) & (place <= last + 1)
    place = place.clamp(min=0).minimum(last)
    low = place.floor()
    upper = place - low
    cells = torch.stack([low, (low + 1).minimum(last)], dim=-1).long().flatten(2)
    weights = torch.stack([1 - upper, upper], dim=-1) * (inside / samples)[..., None]
    return cells, weights.flatten(2)
