"""Levels as one list of cells: places, neighbours, and convolutions at some cells by either of two ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eventful_det.detectors.vitdet import cells as sparse
from eventful_det.detectors.vitdet.cells import Layout, convolve, layout_of

CPU = torch.device("cpu")
SIZES = ((4, 6), (3, 2), (1, 1))


def random_values(layout: Layout, channels: int = 3) -> Tensor:
    values = torch.randn(layout.starts[-1], channels, generator=torch.Generator().manual_seed(0))
    return values * layout.inside[:, None]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4).map(tuple))
def test_every_cell_has_its_own_place(sizes: tuple[tuple[int, int], ...]) -> None:
    layout = layout_of(sizes, CPU)
    inside = layout.inside.nonzero().squeeze(1)
    assert layout.place[inside].tolist() == list(range(sum(layout.lengths)))
    assert layout.per_level(inside) == layout.lengths
    for level, (rows, cols) in enumerate(sizes):
        y, x = torch.arange(rows * cols) // cols, torch.arange(rows * cols) % cols
        cells = layout.numbers(level, y, x)
        assert torch.equal(cells, inside[layout.starts[level] <= inside][: rows * cols])
        assert all(torch.equal(a, b) for a, b in zip(layout.positions(level, cells), (y, x), strict=True))
        image = layout.view(level, layout.inside[:, None].float())[0, 0]
        assert torch.equal(image, F.pad(torch.ones(rows, cols), (1, 1, 1, 1)))


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 30)))
def test_union_of_neighbours_is_a_dilation(places: set[int]) -> None:
    layout = layout_of(SIZES, CPU)
    cells = layout.inside.nonzero().squeeze(1)[torch.tensor(sorted(places), dtype=torch.long)]
    reached = layout.union(layout.neighbours(cells))
    mask = torch.zeros(layout.starts[-1], 1).index_fill_(0, cells, 1)
    for level, count in enumerate(layout.per_level(reached)):
        dilated = F.max_pool2d(layout.view(level, mask), 3, stride=1)[0, 0]
        here = reached[sum(layout.per_level(reached)[:level]) :][:count]
        y, x = layout.positions(level, here)
        assert torch.equal(dilated.nonzero(), torch.stack([y, x], dim=1))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 30)), st.booleans(), st.sampled_from([10, 1 << 20]))
@torch.no_grad()
def test_convolutions_at_cells_equal_whole_ones(places: set[int], bias: bool, elements: int) -> None:
    """However many cells are asked for, on whichever levels, and in however many pieces."""
    layout = layout_of(SIZES, CPU)
    values, conv = random_values(layout), nn.Conv2d(3, 5, 3, padding=1, bias=bias)
    index = torch.tensor(sorted(places), dtype=torch.long)
    cells = layout.inside.nonzero().squeeze(1)[index]
    counts = layout.per_level(cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_PATCH_ELEMENTS", elements)
        rows = convolve(conv, values, layout, cells, layout.neighbours(cells), counts)
    images = [conv(layout.view(i, values)[..., 1:-1, 1:-1])[0].flatten(1).T for i in range(len(SIZES))]
    torch.testing.assert_close(rows, torch.cat(images)[index], atol=1e-5, rtol=1e-5)
    ran = list(map(sparse.cells_run, counts, layout.lengths))
    assert all(count <= n <= length for count, n, length in zip(counts, ran, layout.lengths, strict=True))


@torch.no_grad()
def test_a_level_is_computed_as_a_whole_when_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(SIZES, CPU)
    values, conv = random_values(layout), nn.Conv2d(3, 5, 3, padding=1)
    whole: list[tuple[int, ...]] = []

    def spy(image: Tensor, *args: Tensor) -> Tensor:
        whole.append(tuple(image.shape[2:]))
        return torch.conv2d(image, *args)

    monkeypatch.setattr(F, "conv2d", spy)
    inside = layout.inside.nonzero().squeeze(1)
    for cells, expected in [
        (inside[:19], []),
        (inside[:20], [(6, 8)]),
        (inside[24:29], [(5, 4)]),
        (inside[-1:], [(3, 3)]),
    ]:
        whole.clear()
        convolve(conv, values, layout, cells, layout.neighbours(cells), layout.per_level(cells))
        assert whole == expected
