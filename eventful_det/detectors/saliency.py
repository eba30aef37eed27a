"""Where a detector found something, as a map over tokens: what a policy may favour on the next frame."""

from __future__ import annotations

import torch
from torch import Tensor

from eventful_det.gating.windows import Grid

REACH = 0.5  # tokens by which boxes are widened: objects move, and their borders matter


def token_saliency(boxes: Tensor, scores: Tensor, grid: Grid, patch: int) -> Tensor:
    """The highest score of the boxes that reach a token; weak detections count, too, by their score.

    Args:
        boxes: `(n, 4)` x1, y1, x2, y2 in pixels of the network's input.
        scores: `(n,)` of the boxes.
        grid: tokens of the frame (H, W).
        patch: side of a token in pixels.

    Returns:
        `(H * W,)` in [0, 1].
    """
    if not len(boxes):
        return scores.new_zeros(grid[0] * grid[1])
    x1, y1, x2, y2 = (boxes / patch).unbind(dim=1)
    rows = _reached(y1, y2, grid[0])
    columns = _reached(x1, x2, grid[1])
    inside = rows[:, :, None] & columns[:, None, :]
    return torch.where(inside, scores[:, None, None], 0.0).amax(dim=0).flatten()


def _reached(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Which of `count` tokens along an axis the intervals `(n,)` touch, widened by `REACH`, `(n, count)`."""
    token = torch.arange(count, device=first.device)
    return (token + 1 > first[:, None] - REACH) & (token < last[:, None] + REACH)
