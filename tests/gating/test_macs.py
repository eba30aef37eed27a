"""Closed-form counts against the rules' own reports, torch's FLOP counter and the official ViT-B figures."""

from __future__ import annotations

import math

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
from eventful_det.gating import closed_form
from eventful_det.gating.anatomy import Anatomy, anatomy_of
from eventful_det.gating.closed_form import (
    ViTShape,
    WindowLoad,
    dense_counts,
    paper_counts,
    rows_counts,
    spared_windows,
)
from eventful_det.gating.cost import Counts
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import GateInput, RandomK, select_all
from eventful_det.gating.rows import Rows
from eventful_det.gating.update import Update
from eventful_det.gating.windows import windows_of

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
        return VisionTransformer(**sizes, num_classes=0, dynamic_img_size=True)
    return VisionTransformerSAM(
        **sizes,
        window_size=draw(st.integers(0, 5)),
        global_attn_indexes=tuple(draw(st.sets(st.integers(0, sizes["depth"] - 1)))),
        use_rel_pos=draw(st.booleans()),
        use_abs_pos=draw(st.booleans()),
    )


grids = st.tuples(st.integers(2, 9), st.integers(2, 9))


def step_twice(rule: Paper | Rows, anatomy: Anatomy, grid: tuple[int, int]) -> tuple[Update, Update, int]:
    """A flush and a steady frame, and the multiply-adds that torch's FLOP counter saw in the latter."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, grid[0] * grid[1], 3 * anatomy.patch**2, generator=generator)
    state = rule.init_stream(anatomy, grid)
    (first,) = rule.step(anatomy, patches[:1], [state])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (second,) = rule.step(anatomy, patches[1:], [state])
    return first, second, counter.get_total_flops() // 2


def products(counts: Counts) -> int:
    return counts.linear + counts.matmul + counts.einsum


def drawn(policy: RandomK, shape: ViTShape, grid: tuple[int, int]) -> torch.Tensor:
    """The tokens that every gate of the first steady frame selects."""
    ones = torch.ones(shape.prefix + grid[0] * grid[1])
    return policy(GateInput(ones, ones, 1))


def touched_tokens(grid: tuple[int, int], side: int, index: torch.Tensor) -> int:
    """Tokens in the windows that hold a selected one; in a network without windows it does not matter."""
    window = windows_of(grid, side, index.device).window
    return int(torch.isin(window, window[index]).sum())


def flush_counts(shape: ViTShape, grid: tuple[int, int], pool: int = 1) -> Counts:
    return dense_counts(shape, grid, pool) + spared_windows(shape, grid, grid[0] * grid[1])


def token_gates(shape: ViTShape, grid: tuple[int, int]) -> int:
    return 3 * shape.depth * (shape.prefix + grid[0] * grid[1]) * shape.dim


@SMALL
@given(networks(), grids, st.integers(0, 81), st.sampled_from(["full", "qk", "tokenwise"]))
def test_paper_rule(vit: nn.Module, grid: tuple[int, int], selected: int, ablation: str) -> None:
    anatomy = anatomy_of(vit)
    shape, policy = ViTShape.of(anatomy), RandomK(k=selected)
    first, second, flops = step_twice(Paper(policy, ablation), anatomy, grid)
    touched = touched_tokens(grid, shape.window, drawn(policy, shape, grid)) if shape.windowed else None
    assert first.counts == flush_counts(shape, grid)
    assert second.counts == paper_counts(shape, grid, selected, ablation, touched=touched)
    assert second.counts.macs - token_gates(shape, grid) == flops


@SMALL
@given(networks(), grids, st.integers(0, 81), st.sampled_from(["full", "qk", "tokenwise"]), st.sampled_from([2, 3]))
def test_paper_rule_with_pooling(
    vit: nn.Module, grid: tuple[int, int], selected: int, ablation: str, pool: int
) -> None:
    anatomy, grid = anatomy_of(vit), (grid[0] * pool, grid[1] * pool)
    if anatomy.prefix is not None:
        return
    shape, policy = ViTShape.of(anatomy), RandomK(k=selected)
    first, second, flops = step_twice(Paper(policy, ablation, pool), anatomy, grid)
    index = drawn(policy, shape, grid)
    cells = len({(int(i) // grid[1] // pool, int(i) % grid[1] // pool) for i in index})
    touched = touched_tokens(grid, shape.window, index) if shape.windowed else None
    assert first.counts == flush_counts(shape, grid, pool)
    assert second.counts == paper_counts(shape, grid, selected, ablation, pool, cells, touched=touched)
    assert second.counts.macs - token_gates(shape, grid) == flops


@SMALL
@given(networks(), grids, st.integers(0, 81), st.sampled_from(["patches", "embedding"]))
def test_rows_rule(vit: nn.Module, grid: tuple[int, int], selected: int, gate: str) -> None:
    anatomy = anatomy_of(vit)
    shape = ViTShape.of(anatomy)
    first, second, flops = step_twice(Rows(RandomK(k=selected), gate), anatomy, grid)
    selected = min(selected, grid[0] * grid[1])
    load = closed_form.window_load(grid, shape.window, second.changed)
    assert first.counts == rows_counts(shape, grid, 0, gate=gate, everything=True)
    assert second.counts == rows_counts(shape, grid, selected, load, gate)
    assert products(second.counts) == flops
    assert products(second.counts) <= products(rows_counts(shape, grid, selected, gate=gate))


def test_rows_bound_is_reached() -> None:
    assert closed_form.window_load_bound((8, 8), 4, 10) == WindowLoad(tiles=4, tile=16)
    assert closed_form.window_load_bound((8, 8), 4, 3) == WindowLoad(tiles=3, tile=16)
    assert closed_form.window_load_bound((28, 28), 14, 60) == WindowLoad(tiles=5, tile=33)
    assert closed_form.window_load_bound((28, 28), 14, 784) == WindowLoad(tiles=24, tile=33)
    assert closed_form.window_load((28, 28), 14, torch.tensor([*range(4), 14, 400])) == WindowLoad(3, 33)
    assert closed_form.window_load((8, 8), 4, torch.tensor([], dtype=torch.long)) == WindowLoad(0, 16)


@SMALL
@given(grids, st.integers(0, 81), st.sampled_from([0, 4, 7, 14]))
def test_rows_cost_no_more_than_dense(grid: tuple[int, int], selected: int, window: int) -> None:
    """So there is no number of tokens from which on dense would be cheaper; the gate and full tiles are all it adds."""
    shape = ViTShape(depth=4, dim=192, heads=3, window=window, global_blocks=(1, 3), rel_pos=True)
    gate = grid[0] * grid[1] * 3 * 16**2
    full = closed_form.window_load_bound(grid, window, grid[0] * grid[1]) if window else WindowLoad(0, 0)
    windows = math.prod(-(-side // window) for side in grid) if window else 0
    rounding = max(0, full.tiles * full.tile - windows * window**2) * shape.windowed * 2 * window**2 * shape.dim
    assert rows_counts(shape, grid, selected).macs <= dense_counts(shape, grid).macs + gate + rounding


def test_selecting_all_rows_costs_no_less_than_dense_linear_layers() -> None:
    assert rows_counts(VIT_B, (42, 42), 1764, everything=True).linear == dense_counts(VIT_B, (42, 42)).linear


def gmacs(counts: Counts) -> float:
    return round(counts.official / 1e9, 2)


def test_official_dense_figures_exclude_the_patch_embedding() -> None:
    assert gmacs(dense_counts(VIT_B, (64, 64), embedding=False)) == 467.44
    assert gmacs(dense_counts(VIT_B, (42, 42), embedding=False)) == 174.50
    assert gmacs(dense_counts(VIT_B, (64, 64), pool=2, embedding=False)) == 388.12
    assert gmacs(dense_counts(VIT_B, (64, 64))) == 469.86


@pytest.mark.parametrize(
    ("side", "selected", "official"),
    [(64, 256, 51.74), (64, 512, 86.39), (64, 1024, 155.69), (64, 2048, 294.29)]
    + [(42, 128, 19.28), (42, 256, 32.93), (42, 512, 60.25), (42, 1024, 114.88)],
)
def test_official_steady_figures(side: int, selected: int, official: float) -> None:
    assert gmacs(paper_counts(VIT_B, (side, side), selected, embedding=False)) == official


def test_official_ablation_figures() -> None:
    assert gmacs(paper_counts(VIT_B, (64, 64), 512, "tokenwise", embedding=False)) == 162.85
    assert gmacs(paper_counts(VIT_B, (64, 64), 512, "qk", embedding=False)) == 124.20


def test_official_pooled_figure_lies_between_clustered_and_scattered_tokens() -> None:
    def pooled(cells: int | None) -> float:
        return round(paper_counts(VIT_B, (64, 64), 512, pool=2, cells=cells, embedding=False).official / 1e9, 1)

    assert pooled(191) == 66.8
    assert (pooled(128), pooled(None), pooled(512)) == (64.4, 75.6, 78.9)


def test_expected_cells() -> None:
    assert round(closed_form.expected_cells((64, 64), 512, 2)) == 424
    assert closed_form.expected_cells((8, 8), 64, 2) == 16
    assert closed_form.expected_cells((8, 8), 0, 2) == 0
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(64, generator=generator)[:12] for _ in range(2000)]
    touched = sum(((i // 8 // 2) * 4 + i % 8 // 2).unique().numel() for i in draws) / len(draws)
    assert touched == pytest.approx(closed_form.expected_cells((8, 8), 12, 2), rel=0.01)


def test_selecting_all_costs_more_than_dense_under_the_paper_rule() -> None:
    """Section 7 of the plan: rows and columns of QK^T, and two products for A.V."""
    everything, dense = paper_counts(VIT_B, (64, 64), 4096), dense_counts(VIT_B, (64, 64))
    assert everything.linear == dense.linear
    assert everything.matmul > dense.matmul


def test_shape_of_a_network() -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "window_size": 3}
    vit = VisionTransformerSAM(**sizes, global_attn_indexes=(1,), use_rel_pos=True)
    shape = ViTShape.of(anatomy_of(vit))
    assert shape == ViTShape(3, 8, 2, hidden=32, window=3, global_blocks=(1,), patch=4, rel_pos=True)
    assert shape.windowed == 2
    vit.blocks[0].window_size = 5
    with pytest.raises(UserError, match="one size"):
        ViTShape.of(anatomy_of(vit))


def test_everything_selected_matches_select_all() -> None:
    vit = VisionTransformerSAM(img_size=24, patch_size=4, embed_dim=8, depth=2, num_heads=2, window_size=4)
    anatomy = anatomy_of(vit)
    _, second, _ = step_twice(Paper(select_all), anatomy, (6, 6))
    assert second.counts == paper_counts(ViTShape.of(anatomy), (6, 6), 36)
