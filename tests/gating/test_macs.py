"""Predicted MACs against the rules' own reports, torch's FLOP counter and the official ViT-B figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eventful_det.errors import UserError
from eventful_det.gating import macs
from eventful_det.gating.dense import Dense
from eventful_det.gating.macs import (
    Macs,
    PaperSizes,
    RowsSizes,
    ViTShape,
    dense_macs,
    paper_macs,
    paper_sizes,
    rows_macs,
    rows_sizes,
)
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import Rule, step_streams
from eventful_det.gating.selector import EVERYTHING, GateInput, RandomK, Selector
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import State, Update
from eventful_det.gating.vit_spec import spec_of
from eventful_det.testing.official import OfficialCounts, official_counts, official_dense

VIT_B = ViTShape(depth=12, dim=768, heads=12, window=14, global_blocks=(2, 5, 8, 11), rel_pos=True)
SMALL = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Small windowed SAM ViTs and plain ViTs with a class token."""
    heads = draw(st.integers(1, 3))
    sizes = {"patch_size": draw(st.sampled_from([2, 4])), "num_heads": heads, "embed_dim": heads * 4}
    sizes |= {"depth": draw(st.integers(1, 3)), "mlp_ratio": draw(st.sampled_from([1.0, 2.5, 4.0]))}
    sizes |= {"img_size": 24, "qkv_bias": draw(st.booleans())}
    if draw(st.booleans()):
        return VisionTransformer(**sizes, num_classes=0, dynamic_img_size=True).eval()
    return VisionTransformerSAM(
        **sizes,
        window_size=draw(st.integers(0, 5)),
        global_attn_indexes=tuple(draw(st.sets(st.integers(0, sizes["depth"] - 1)))),
        use_rel_pos=draw(st.booleans()),
        use_abs_pos=draw(st.booleans()),
    ).eval()


grids = st.tuples(st.integers(2, 9), st.integers(2, 9))


def step_twice(rule: Rule, vit: ViTSpec, grid: tuple[int, int], selector: Selector) -> tuple[Update, Update, int]:
    """A flush and a steady frame, and the multiply-adds that torch's FLOP counter saw in the latter."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 1, 3, grid[0] * vit.patch, grid[1] * vit.patch, generator=generator)
    state = State([None])
    (first,) = step_streams(vit, frames[0], state, rule=rule, selector=selector)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (second,) = step_streams(vit, frames[1], state, rule=rule, selector=selector)
    return first, second, counter.get_total_flops() // 2


@SMALL
@given(networks(), grids, st.integers(0, 81), st.sampled_from(["full", "qk", "tokenwise"]), st.sampled_from([1, 1, 2]))
def test_paper_rule(vit: nn.Module, grid: tuple[int, int], selected: int, ablation: macs.Ablation, pool: int) -> None:
    spec, grid = spec_of(vit), (grid[0] * pool, grid[1] * pool)
    if pool > 1 and spec.prefix is not None:
        return
    shape, selector = spec.shape, RandomK(selected)
    first, second, flops = step_twice(Paper(ablation, pool), spec, grid, selector)
    ones = torch.ones(shape.prefix + grid[0] * grid[1])
    (index,) = selector([GateInput(ones, ones, 1)])  # at every gate
    cells = len({(int(i) // grid[1] // pool, int(i) % grid[1] // pool) for i in index}) if pool > 1 else len(index)
    blocks = [PaperSizes(len(index), len(index), len(index), cells)] * shape.depth
    assert second.macs == paper_macs(shape, grid, blocks, ablation, pool)
    assert second.macs.products == flops
    if pool == 1:
        assert first.macs == dense_macs(shape, grid)
        assert blocks == list(paper_sizes(shape, grid, selected))


@SMALL
@given(networks(), grids, st.integers(0, 81), st.sampled_from(["patches", "embedding"]))
def test_rows_rule(vit: nn.Module, grid: tuple[int, int], selected: int, gate: str) -> None:
    spec = spec_of(vit)
    shape = spec.shape
    first, second, flops = step_twice(Rows(gate), spec, grid, RandomK(selected))
    tokens = grid[0] * grid[1]
    flush, queries = (
        macs.window_queries(grid, shape.window, update.changed) if shape.windowed else 0 for update in (first, second)
    )
    assert first.macs == rows_macs(shape, grid, replace(rows_sizes(shape, grid, tokens, flush), compared=0))
    # The gate of embeddings embeds all tokens.
    other = {} if gate == "patches" else {"compared": tokens * shape.dim, "embedded": tokens}
    assert second.macs == rows_macs(shape, grid, replace(rows_sizes(shape, grid, selected, queries), **other))
    assert second.macs.products == flops
    assert flops <= rows_macs(shape, grid, replace(rows_sizes(shape, grid, selected), **other)).products


@SMALL
@given(networks(), grids)
def test_dense_rule(vit: nn.Module, grid: tuple[int, int]) -> None:
    _, second, flops = step_twice(Dense(), spec_of(vit), grid, EVERYTHING)
    assert second.macs.total == flops and second.macs.gate == 0


def test_rows_bound_is_reached() -> None:
    assert macs.most_window_queries((8, 8), 4, 10) == 4 * 16
    assert macs.most_window_queries((8, 8), 4, 3) == 3 * 16
    assert macs.most_window_queries((28, 28), 14, 60) == 5 * 33
    assert macs.most_window_queries((28, 28), 14, 784) == 24 * 33
    assert macs.window_queries((28, 28), 14, torch.tensor([*range(4), 14, 400])) == 3 * 33
    assert macs.window_queries((8, 8), 4, torch.tensor([], dtype=torch.long)) == 0


@SMALL
@given(grids, st.integers(0, 81), st.sampled_from([0, 4, 7, 14]))
def test_rows_cost_no_more_than_dense(grid: tuple[int, int], selected: int, window: int) -> None:
    """So there is no number of tokens from which on dense would be cheaper; the gate and full tiles are all it adds."""
    shape = ViTShape(depth=4, dim=192, heads=3, window=window, global_blocks=(1, 3), rel_pos=True)
    gate = grid[0] * grid[1] * 3 * 16**2
    full = macs.most_window_queries(grid, window, grid[0] * grid[1]) if window else 0
    windows = math.prod(-(-side // window) for side in grid) if window else 0
    rounding = max(0, full - windows * window**2) * shape.windowed * 2 * window**2 * shape.dim
    cost = rows_macs(shape, grid, rows_sizes(shape, grid, selected)).total
    assert cost <= dense_macs(shape, grid).total + gate + rounding


def test_a_still_frame_costs_the_comparison() -> None:
    assert rows_macs(VIT_B, (42, 42), rows_sizes(VIT_B, (42, 42), 0)) == Macs(gate=42 * 42 * 768)
    assert rows_sizes(VIT_B, (42, 42), 0) == RowsSizes(42 * 42 * 768, 0, 0, 0)


def test_arithmetic() -> None:
    macs = Macs(1, 2, 3, 4)
    assert macs + macs == macs.times(2) and (macs.products, macs.total) == (6, 10)


def gmacs(counts: OfficialCounts) -> float:
    return round(counts.total / 1e9, 2)


def test_official_dense_figures() -> None:
    assert gmacs(official_dense(VIT_B, (64, 64))) == 467.44
    assert gmacs(official_dense(VIT_B, (42, 42))) == 174.50
    assert gmacs(official_dense(VIT_B, (64, 64), pool=2)) == 388.12


@pytest.mark.parametrize(
    ("side", "selected", "official"),
    [(64, 256, 51.74), (64, 512, 86.39), (64, 1024, 155.69), (64, 2048, 294.29)]
    + [(42, 128, 19.28), (42, 256, 32.93), (42, 512, 60.25), (42, 1024, 114.88)],
)
def test_official_steady_figures(side: int, selected: int, official: float) -> None:
    grid = (side, side)
    assert gmacs(official_counts(VIT_B, grid, paper_sizes(VIT_B, grid, selected))) == official


def test_official_ablation_figures() -> None:
    blocks = paper_sizes(VIT_B, (64, 64), 512)
    assert gmacs(official_counts(VIT_B, (64, 64), blocks, "tokenwise")) == 162.85
    assert gmacs(official_counts(VIT_B, (64, 64), blocks, "qk")) == 124.20


def test_official_pooled_figure_lies_between_clustered_and_scattered_tokens() -> None:
    def pooled(cells: int) -> float:
        blocks = (PaperSizes(512, 512, 512, cells),) * 12
        return round(official_counts(VIT_B, (64, 64), blocks, pool=2).total / 1e9, 1)

    scattered = paper_sizes(VIT_B, (64, 64), 512, pool=2)[0].cells
    assert pooled(191) == 66.8
    assert (pooled(128), pooled(scattered), pooled(512)) == (64.4, 75.6, 78.9)


def test_expected_cells() -> None:
    assert round(macs.expected_cells((64, 64), 512, 2)) == 424
    assert macs.expected_cells((8, 8), 64, 2) == 16
    assert macs.expected_cells((8, 8), 0, 2) == 0
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(64, generator=generator)[:12] for _ in range(2000)]
    touched = sum(((i // 8 // 2) * 4 + i % 8 // 2).unique().numel() for i in draws) / len(draws)
    assert touched == pytest.approx(macs.expected_cells((8, 8), 12, 2), rel=0.01)


def test_selecting_all_costs_more_than_dense_under_the_paper_rule() -> None:
    """Rows and columns of QK^T, and two products for A.V."""
    everything, dense = paper_macs(VIT_B, (64, 64), paper_sizes(VIT_B, (64, 64), 4096)), dense_macs(VIT_B, (64, 64))
    assert everything.linear == dense.linear
    assert everything.attention > dense.attention


def test_shape_of_a_network() -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "window_size": 3}
    vit = VisionTransformerSAM(**sizes, global_attn_indexes=(1,), use_rel_pos=True)
    shape = spec_of(vit).shape
    assert shape == ViTShape(3, 8, 2, linear=12 * 64, window=3, global_blocks=(1,), patch=4, rel_pos=True)
    assert shape.windowed == 2 and [shape.is_windowed(i) for i in range(3)] == [True, False, True]
    vit.blocks[0].mlp.fc1 = nn.Linear(8, 16)
    with pytest.raises(UserError, match="blocks differ"):
        spec_of(vit).shape  # noqa: B018
