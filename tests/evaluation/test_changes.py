"""Synthetic changes: as many tokens as asked for, in blobs, the same every time, and nothing else."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eventful_det.benchmark.changes import blob_frames, blob_masks
from eventful_det.errors import UserError
from eventful_det.gating.selector import GateInput, TopK

grids = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(deadline=None, max_examples=60)
@given(grid=grids, share=st.floats(0, 1), seed=st.integers(0, 999), blobs=st.integers(1, 6))
def test_masks_hold_as_many_tokens_as_asked_for_in_few_blobs(
    grid: tuple[int, int], share: float, seed: int, blobs: int
) -> None:
    count = round(share * grid[0] * grid[1])
    for mask in itertools.islice(blob_masks(grid, count, seed, blobs), 12):
        assert mask.shape == grid and mask.sum() == count
        components, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        assert components - 1 <= min(blobs, count)


def test_blobs_move_and_repeat() -> None:
    first, again, other = (list(itertools.islice(blob_masks((12, 20), 30, seed), 8)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    changes = [(a != b).sum() for a, b in itertools.pairwise(first)]
    assert all(0 < change < 60 for change in changes), "they move, by less than their size"


def changed(before: Tensor, after: Tensor, patch: int) -> Tensor:
    """How far each token `(N,)` moved."""
    difference = (after - before)[None]
    pad = [-difference.shape[3] % patch, -difference.shape[2] % patch]
    difference = torch.nn.functional.pad(difference, (0, pad[0], 0, pad[1]))
    return torch.nn.functional.unfold(difference, patch, stride=patch)[0].norm(dim=0)


@settings(deadline=None, max_examples=20)
@given(
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)), share=st.floats(0, 1), patch=st.sampled_from([4, 8, 16])
)
def test_frames_change_in_exactly_these_tokens(size: tuple[int, int], share: float, patch: int) -> None:
    grid = -(-size[0] // patch), -(-size[1] // patch)
    count = round(share * grid[0] * grid[1])
    frames = list(itertools.islice(blob_frames(size, patch, count, seed=3), 4))
    for frame, again in zip(frames, blob_frames(size, patch, count, seed=3), strict=False):
        assert frame.shape == (3, *size) and torch.equal(frame, again)
        assert frame.min() >= 0 and frame.max() <= 1
    for (before, after), mask in zip(itertools.pairwise(frames), blob_masks(grid, count, seed=3), strict=False):
        error = changed(before, after, patch)
        assert torch.equal(error > 0, torch.from_numpy(mask).flatten())
        (chosen,) = TopK(count)([GateInput(error, torch.ones(len(error)), 1)])
        assert set(chosen.tolist()) == set(error.nonzero().flatten().tolist())


def test_the_background_has_texture() -> None:
    frame = next(blob_frames((64, 64), 16, 0))
    tokens = frame.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3)
    assert (tokens.std(dim=3) > 0.02).all()


@pytest.mark.parametrize("count", [-1, 7])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(UserError, match=f"cannot change {count} of 6 tokens"):
        next(blob_frames((32, 48), 16, count))
