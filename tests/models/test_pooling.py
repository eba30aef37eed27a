"""Reading regions from a list of cells is RoIAlign."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eventful_det.detectors.vitdet.cells import layout_of
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.macs import level_sizes
from eventful_det.detectors.vitdet.pooling import pool_regions
from eventful_det.detectors.vitdet.roi_heads import SingleHead


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 9), st.integers(0, 1000))
def test_equals_torchvision_on_every_level(rows: int, cols: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = SingleHead(ModelConfig(("a",), channels=5, canonical_box=40, box_fc=(8,)))
    layout = layout_of(tuple(level_sizes((rows, cols))), torch.device("cpu"))
    values = torch.randn(layout.starts[-1], 5, generator=generator) * layout.inside[:, None]
    levels = [layout.view(i, values)[..., 1:-1, 1:-1] for i in range(5)]
    size = torch.tensor([cols * 16.0, rows * 16.0] * 2)
    corners = torch.rand(count, 4, generator=generator) * size
    boxes = torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:]) + 0.1], dim=1)
    boxes = torch.cat([boxes, size[None] * torch.tensor([0, 0, 1, 1]), size * torch.tensor([0, 0.4, 1, 0.45])[None]])
    pooled = pool_regions(values, layout, boxes, 40)
    torch.testing.assert_close(pooled, heads.pool(levels, [boxes]), atol=1e-5, rtol=1e-5)


def test_no_box_at_all() -> None:
    layout = layout_of(tuple(level_sizes((2, 2))), torch.device("cpu"))
    assert pool_regions(torch.zeros(layout.starts[-1], 3), layout, torch.zeros(0, 4), 112).shape == (0, 3, 7, 7)
