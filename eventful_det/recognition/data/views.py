"""The official protocol: which excerpts and crops of a clip are looked at, and in which order.

A view has `frames` frames at a distance of `stride`. Spatial views come outside, temporal views inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.windows import Grid
from eventful_det.recognition.config import RecogniserConfig


def view_starts(length: int, span: int, views: int) -> list[int]:
    """First frames of the temporal views of a clip of `length` frames, each of which reaches over `span`.

    Example: three views that span 4 frames start at 0, 3 and 6 in a clip of 10. A clip of at most 4 is
    extended, and all start at 0.
    """
    left = max(length, span) - span
    return _spread(left, views)


def crop_corners(size: Grid, crop: Grid, views: int) -> list[Grid]:
    """Top-left corners of the spatial views of a frame of `size`: along the diagonal, or the centre for one."""
    rows, cols = (_spread(outer - inner, views) for outer, inner in zip(size, crop, strict=True))
    return list(zip(rows, cols, strict=True))


def _spread(left: int, views: int) -> list[int]:
    """Where so many views begin, if the last begins at `left`."""
    if views == 1:
        return [left // 2]
    spacing = left / (views - 1)
    return [int(i * spacing) for i in range(views)]


def normalise(frames: Tensor, config: RecogniserConfig) -> Tensor:
    """Frames `(n, c, h, w)` uint8 as they enter the network: normalised, and resized so that they cover a view.

    Raises:
        UserError: they have another number of channels.
    """
    if frames.shape[1] != config.channels:
        raise UserError(f"got frames of {frames.shape[1]} channels for a recogniser of {config.channels}")
    x = frames.float() / 255
    mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    return cover((x - mean) / std, config.size)


def cover(frames: Tensor, size: Grid) -> Tensor:
    """Resize frames `(n, c, h, w)` bilinearly so that they just cover `size`."""
    height, width = frames.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    if scale == 1:
        return frames
    target = round(scale * height), round(scale * width)
    return F.interpolate(frames, target, mode="bilinear", align_corners=False, antialias=True)


def frame_indices(length: int, config: RecogniserConfig) -> list[list[int]]:
    """For each temporal view the frames of a clip of `length` frames; beyond the last it is repeated."""
    starts = view_starts(length, config.span, config.temporal_views)
    return [[min(i, length - 1) for i in range(start, start + config.span, config.stride)] for start in starts]


def cut_views(clip: Tensor, config: RecogniserConfig) -> Tensor:
    """All views of a clip.

    Args:
        clip: `(T, c, H, W)` uint8 RGB.
        config: sizes and numbers of views.

    Returns:
        `(V, t, c, h, w)`, normalised.
    """
    excerpts = torch.stack([normalise(clip[indices], config) for indices in frame_indices(len(clip), config)])
    return crop_views(excerpts, config)


def crop_views(excerpts: Tensor, config: RecogniserConfig) -> Tensor:
    """The spatial views `(S * E, t, c, h, w)` of excerpts `(E, t, c, H, W)`."""
    height, width = config.size
    corners = crop_corners((excerpts.shape[-2], excerpts.shape[-1]), config.size, config.spatial_views)
    return torch.cat([excerpts[..., y : y + height, x : x + width] for y, x in corners])


def shared_starts(length: int, config: RecogniserConfig) -> list[int]:
    """First frames of the temporal views, rounded down to whole tubelets so that views can share these."""
    unit = config.tubelet[0] * config.stride
    return [start // unit * unit for start in view_starts(length, config.span, config.temporal_views)]


def shared_tubelets(length: int, config: RecogniserConfig) -> tuple[list[int], list[list[int]]]:
    """The distinct tubelets of all temporal views of a clip of `length` frames.

    Example: views of two tubelets start at the tubelets 0, 1 and 1. The distinct ones are 0, 1 and 2, and the
    views hold [0, 1], [1, 2] and [1, 2] of them.

    Returns:
        First frames of the distinct tubelets, ascending; and for each view the places of its tubelets among them.
    """
    unit = config.tubelet[0] * config.stride
    views = [[start + unit * i for i in range(config.steps)] for start in shared_starts(length, config)]
    distinct = sorted({start for view in views for start in view})
    place = {start: i for i, start in enumerate(distinct)}
    return distinct, [[place[start] for start in view] for view in views]


def average(logits: Sequence[Tensor] | Tensor) -> Tensor:
    """Logits `(classes,)` of a clip from those of its views `(V, classes)`: their mean, before any softmax."""
    return torch.stack(list(logits)).mean(0)
