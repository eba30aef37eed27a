"""Operations as the official eventful code counts them: its "GFLOPs" are `total` / 1e9.

Beside multiply-adds it counts biases and sums, and what its attention gates compare. Its figures are of the backbone
from the position encoding on, without the patch embedding. Its networks have a position encoding and biases everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from eventful_det.gating.macs import Ablation, PaperSizes, ViTShape, padded_tokens, paper_block_macs, paper_sizes
from eventful_det.gating.windows import Grid


@dataclass(frozen=True)
class OfficialCounts:
    """Operations by kind.

    Attributes:
        linear: multiply-adds of linear layers.
        bias: elements that a bias is added to.
        matmul: multiply-adds of the attention products QK^T and A.V.
        einsum: multiply-adds of decomposed relative positions.
        add: elements of element-wise sums (position encoding, relative positions, residuals).
        gate: elements compared with their reference.
        accumulator: element-wise operations of the A.V delta accumulation (paper section 4.2).
    """

    linear: int = 0
    bias: int = 0
    matmul: int = 0
    einsum: int = 0
    add: int = 0
    gate: int = 0
    accumulator: int = 0

    def __add__(self, other: OfficialCounts) -> OfficialCounts:
        return OfficialCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        """All operations."""
        return sum(astuple(self))


def official_counts(
    shape: ViTShape,
    grid: Grid,
    blocks: Sequence[PaperSizes],
    ablation: Ablation = "full",
    pool: int = 1,
    flush: bool = False,
) -> OfficialCounts:
    """A frame; see `paper_macs`."""
    counts = OfficialCounts(add=grid[0] * grid[1] * shape.dim)  # position encoding
    for i, sizes in enumerate(blocks):
        counts += official_block(shape, grid, shape.is_windowed(i), sizes, ablation, pool, flush)
    return counts


def official_dense(shape: ViTShape, grid: Grid, pool: int = 1) -> OfficialCounts:
    """The dense network, which is a flush of any kind."""
    length = shape.prefix + grid[0] * grid[1]
    return official_counts(shape, grid, paper_sizes(shape, grid, length), "tokenwise", pool, flush=True)


def official_block(
    shape: ViTShape, grid: Grid, windowed: bool, sizes: PaperSizes, ablation: Ablation, pool: int, flush: bool
) -> OfficialCounts:
    """One block; see `paper_block_macs`."""
    macs = paper_block_macs(shape, grid, windowed, sizes, ablation, pool, flush)
    tokens, dim = grid[0] * grid[1], shape.dim
    length = shape.prefix + tokens
    hidden = (shape.weights - 4 * dim**2) // (2 * dim)
    queries, keys = length, length // pool**2
    if windowed:
        queries, keys = padded_tokens(shape, grid), shape.window_slots(grid)
    padded_bias = 3 * dim if windowed and queries > tokens else 0  # of padded tokens, counted once
    incremental = ablation == "full" and not windowed and not flush
    return OfficialCounts(
        linear=macs.linear,
        bias=(3 * sizes.qkv + sizes.proj + sizes.mlp) * dim + sizes.mlp * hidden + padded_bias,
        matmul=macs.attention,
        einsum=macs.positions,
        add=2 * length * dim + shape.rel_pos * 2 * queries * shape.heads * keys,
        gate=macs.gate + incremental * (keys * dim + shape.heads * length * keys),
        accumulator=incremental * (sizes.cells + 2 * length) * dim,
    )
