"""Synthetic clips of which it is known, token by token, what changes: for timing, where pictures do not matter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.errors import UserError

BLOBS = 4
_FASTEST = 1.5  # tokens per frame, along each axis


def blob_masks(grid: tuple[int, int], count: int, seed: int = 0, blobs: int = BLOBS) -> Iterator[NDArray[np.bool_]]:
    """Sets of tokens in the shape of a few ellipses and rectangles that move about and bounce off the borders.

    Args:
        grid: tokens (rows, columns).
        count: tokens of each set.
        seed: the same arguments give the same sets.
        blobs: ellipses and rectangles in turn. Those that overlap count as one.

    Yields:
        `(rows, columns)` masks with exactly `count` tokens set, without end.

    Raises:
        UserError: there are fewer tokens than `count`, or `count` is negative.
    """
    tokens = grid[0] * grid[1]
    if not 0 <= count <= tokens:
        raise UserError(f"cannot change {count} of {tokens} tokens")
    rng = np.random.default_rng(seed)
    end = np.array(grid) - 1.0
    position = rng.uniform(0, 1, (blobs, 2)) * end
    velocity = rng.uniform(-_FASTEST, _FASTEST, (blobs, 2))
    radius = rng.uniform(0.5, 1.5, (blobs, 2))
    cells = np.indices(grid).reshape(2, tokens).T
    while True:
        nearest = np.argsort(_distance(cells, np.rint(position), radius), kind="stable")[:count]
        mask = np.zeros(tokens, dtype=bool)
        mask[nearest] = True
        yield mask.reshape(grid)
        position = position + velocity
        velocity = np.where((position < 0) | (position > end), -velocity, velocity)
        position = np.clip(position, 0, end)


def blob_frames(size: tuple[int, int], patch: int, count: int, seed: int = 0, blobs: int = BLOBS) -> Iterator[Tensor]:
    """A still textured picture in which, from each frame to the next, exactly `count` tokens change.

    A token that changes gets new noise in all its pixels; all other pixels keep every bit.

    Args:
        size: height and width in pixels.
        patch: side of a token in pixels.
        count: tokens that change per frame.
        seed: the same arguments give the same frames.
        blobs: see `blob_masks`.

    Yields:
        `(3, h, w)` float32 in [0, 1], independent of each other, without end.

    Raises:
        UserError: as `blob_masks`.
    """
    height, width = size
    grid = -(-height // patch), -(-width // patch)
    generator = torch.Generator().manual_seed(seed)
    frame = _texture(height, width, generator)
    for mask in blob_masks(grid, count, seed, blobs):
        yield frame
        pixels = torch.from_numpy(mask).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width]
        frame = torch.where(pixels, torch.rand(frame.shape, generator=generator), frame)


def _distance(
    cells: NDArray[np.int_], centres: NDArray[np.float64], radius: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance `(N,)` of cells `(N, 2)` to the nearest blob, in units of its radii `(blobs, 2)`.

    Centres are whole cells and every step towards one comes strictly nearer, so that each blob hangs together
    wherever it is cut off.
    """
    offset = np.abs(cells[:, None] - centres) / radius
    ellipse = np.hypot(offset[..., 0], offset[..., 1])
    rectangle = offset.max(-1) + 1e-3 * ellipse
    return np.where(np.arange(len(centres)) % 2 == 0, ellipse, rectangle).min(-1)


def _texture(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise of three scales, `(3, h, w)` in [0, 1]."""
    frame = torch.zeros(3, height, width)
    for cell in (64, 16, 1):
        noise = torch.rand(1, 3, -(-height // cell) + 1, -(-width // cell) + 1, generator=generator)
        frame += F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)[0]
    return frame / 3
