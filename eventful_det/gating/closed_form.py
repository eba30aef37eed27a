"""Operation counts as a function of the update's size, without running or even building a network.

They equal what the rules report and, at 2 FLOP per multiply-add, what `torch.utils.flop_counter` sees. The
official code's "GFLOPs" are those of the backbone from the position encoding on, without the patch embedding:
`paper_counts(..., embedding=False).official / 1e9`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Grid
from eventful_det.gating.cost import Counts
from eventful_det.gating.paper import Ablation
from eventful_det.gating.rows_attention import most_tiles, queries_per_tile
from eventful_det.gating.windows import windows_of


@dataclass(frozen=True)
class ViTShape:
    """The sizes of a Vision Transformer that its cost depends on.

    Attributes:
        depth: number of blocks.
        dim: width D of a token.
        heads: attention heads per block.
        hidden: width of the MLP's hidden layer; 0 = 4 D.
        window: side of the attention windows in tokens; 0 = global attention in all blocks.
        global_blocks: blocks with global attention in a network with windows.
        patch: side of a patch in pixels.
        channels: channels of a frame.
        rel_pos: whether attention has decomposed relative positions.
        prefix: class and register tokens.
        positions: whether there is a position encoding.
        qkv_bias: whether qkv has a bias.
    """

    depth: int
    dim: int
    heads: int
    hidden: int = 0
    window: int = 0
    global_blocks: tuple[int, ...] = ()
    patch: int = 16
    channels: int = 3
    rel_pos: bool = False
    prefix: int = 0
    positions: bool = True
    qkv_bias: bool = True

    @staticmethod
    def of(anatomy: Anatomy) -> ViTShape:
        """The shape of a network.

        Raises:
            UserError: its blocks differ in more than being windowed or global.
        """
        blocks = anatomy.blocks
        if len({(b.heads, b.fc1.out_features, b.rel_pos is None, b.qkv.bias is None) for b in blocks}) > 1:
            raise UserError("closed-form counts need blocks that are alike but for their windows")
        windows = {block.window for block in blocks if block.window}
        if len(windows) > 1:
            raise UserError(f"closed-form counts need windows of one size, got {sorted(windows)}")
        return ViTShape(
            depth=len(blocks),
            dim=anatomy.dim,
            heads=blocks[0].heads,
            hidden=blocks[0].fc1.out_features,
            window=max(windows, default=0),
            global_blocks=tuple(i for i, block in enumerate(blocks) if not block.window),
            patch=anatomy.patch,
            channels=anatomy.projection.in_channels,
            rel_pos=blocks[0].rel_pos is not None,
            prefix=anatomy.prefix_count,
            positions=anatomy.positions is not None,
            qkv_bias=blocks[0].qkv.bias is not None,
        )

    @property
    def windowed(self) -> int:
        """Number of windowed blocks."""
        return self.depth - len(set(self.global_blocks)) if self.window else 0


class WindowLoad(NamedTuple):
    """How selected tokens fall into windows: the tiles of queries that they fill, and the places in each."""

    tiles: int
    tile: int


@lru_cache(maxsize=256)
def dense_counts(shape: ViTShape, grid: Grid, pool: int = 1, embedding: bool = True) -> Counts:
    """Everything recomputed: the dense network, or (with `spared_windows`) a flush of the paper's rule.

    Args:
        shape: the network.
        grid: token grid (H, W).
        pool: side of the cells over which keys and values are averaged in global blocks.
        embedding: whether to count the patch embedding.
    """
    sequence = shape.prefix + _tokens(grid)
    keys = sequence // pool**2
    attention = Counts(matmul=2 * sequence * keys * shape.dim) + _relative(shape, sequence, _pooled(grid, pool))
    return (
        _stem(shape, grid, embedding)
        + _times(shape.depth, _linear(shape, sequence) + Counts(add=2 * sequence * shape.dim))
        + _times(shape.windowed, _window_attention(shape, grid))
        + _times(shape.depth - shape.windowed, attention)
    )


def paper_counts(
    shape: ViTShape,
    grid: Grid,
    selected: int,
    ablation: Ablation = "full",
    pool: int = 1,
    cells: int | None = None,
    embedding: bool = True,
    touched: int | None = None,
) -> Counts:
    """A steady frame (not a flush) of the `Paper` rule.

    Args:
        shape: the network.
        grid: token grid (H, W).
        selected: tokens let through by every gate, prefix tokens included.
        ablation: as for `Paper`.
        pool: as for `Paper`.
        cells: pooled cells that the selected tokens fall in; None = `expected_cells`. Without pooling it is
            `selected`.
        embedding: whether to count the patch embedding, which this rule does for all tokens.
        touched: tokens in windows that hold a selected one; None = all.
    """
    sequence, dim = shape.prefix + _tokens(grid), shape.dim
    selected = min(selected, sequence)
    if pool == 1:
        cells = selected
    elif cells is None:
        cells = round(expected_cells(grid, selected, pool))
    attention = _paper_attention(shape, grid, selected, ablation, pool, cells)
    gated = _linear(shape, selected) + Counts(add=2 * sequence * dim, gate=3 * sequence * dim)
    return (
        _stem(shape, grid, embedding)
        + _times(shape.depth, gated)
        + _times(shape.windowed, _window_attention(shape, grid))
        + _times(shape.depth - shape.windowed, attention)
        + spared_windows(shape, grid, _tokens(grid) if touched is None else touched)
    )


def rows_counts(
    shape: ViTShape,
    grid: Grid,
    selected: int,
    load: WindowLoad | None = None,
    gate: Literal["patches", "embedding"] = "patches",
    everything: bool = False,
) -> Counts:
    """A frame of the `Rows` rule.

    Args:
        shape: the network.
        grid: token grid (H, W).
        selected: tokens recomputed, prefix tokens (always recomputed) not included.
        load: how they fall into windows, see `window_load`; None = the costliest way, see `window_load_bound`.
            Queries of one window fill tiles of a fixed size, see `rows_attention.Queries`.
        gate: as for `Rows`.
        everything: a flush or a renewal, which selects all tokens and compares nothing.
    """
    tokens, dim = _tokens(grid), shape.dim
    size = shape.channels * shape.patch**2
    selected = tokens if everything else min(selected, tokens)
    compared = 0 if everything else tokens * (size if gate == "patches" else dim)
    embedded = selected if gate == "patches" else tokens
    counts = Counts(linear=embedded * size * dim, bias=embedded * dim, gate=compared)
    if shape.positions:
        counts += Counts(add=selected * dim)
    if not selected:
        return counts
    queries = shape.prefix + selected
    attention = Counts(matmul=2 * queries * (shape.prefix + tokens) * dim) + _relative(shape, queries, grid)
    windowed = Counts()
    if shape.windowed:
        side = shape.window
        if everything:
            load = window_load(grid, side, torch.arange(tokens))
        tiles, tile = load or window_load_bound(grid, side, selected)
        windowed = Counts(matmul=2 * tiles * tile * side**2 * dim) + _relative(shape, selected, (side, side))
    return (
        counts
        + _times(shape.depth, _linear(shape, queries) + Counts(add=2 * queries * dim))
        + _times(shape.windowed, windowed)
        + _times(shape.depth - shape.windowed, attention)
    )


def expected_cells(grid: Grid, selected: int, pool: int) -> float:
    """Expected number of pooled cells touched by tokens that are scattered at random over the grid.

    Tokens of real frames cluster, so it overestimates: of 64 x 64 tokens, 512 fall in 128 to 512 of the 1,024 cells
    of 2 x 2, 424 at random. The official ViT-B figure for them, 66.8 GMACs, means 191 cells on average; 128 give
    64.4, 424 give 75.6 and 512 give 78.9. (Largest pixel changes of four DAVIS clips: 233 to 298 cells.)
    """
    tokens, missed = _tokens(grid), 1.0
    for i in range(pool**2):
        missed *= max(tokens - selected - i, 0) / (tokens - i)
    return tokens // pool**2 * (1 - missed)


def window_load(grid: Grid, side: int, index: Tensor) -> WindowLoad:
    """The load of the tokens at flat indices `index (r,)` on windows of `side` x `side` tokens."""
    windows = windows_of(grid, side, index.device)
    tile, held = queries_per_tile(windows.slots), torch.bincount(windows.window[index])
    return WindowLoad(int(((held + tile - 1) // tile).sum()), tile)


def spared_windows(shape: ViTShape, grid: Grid, touched: int) -> Counts:
    """What the paper's rule spares: attention of padded queries, and of all but `touched` tokens in windowed blocks."""
    side = shape.window
    ran = Counts(matmul=2 * touched * side**2 * shape.dim) + _relative(shape, touched, (side, side))
    return _times(shape.windowed, Counts(spared=_window_attention(shape, grid).macs - ran.macs))


def window_load_bound(grid: Grid, side: int, selected: int) -> WindowLoad:
    """The costliest load of `selected` tokens."""
    windows = windows_of(grid, side, torch.device("cpu"))
    return WindowLoad(most_tiles(selected, windows.count, windows.slots), queries_per_tile(windows.slots))


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1]


def _pooled(grid: Grid, pool: int) -> Grid:
    return grid[0] // pool, grid[1] // pool


def _times(count: int, counts: Counts) -> Counts:
    return Counts(*(count * value for value in astuple(counts)))


def _paper_attention(shape: ViTShape, grid: Grid, selected: int, ablation: Ablation, pool: int, cells: int) -> Counts:
    """Attention of a global block under the paper's rule."""
    queries, dim = shape.prefix + _tokens(grid), shape.dim
    keys = queries // pool**2
    whole, updated = queries * keys, selected * keys + cells * queries  # rows and columns of QK^T
    relative = _relative(shape, queries, _pooled(grid, pool))
    if ablation == "tokenwise":
        return relative + Counts(matmul=2 * whole * dim)
    relative += Counts(spared=relative.einsum - _relative(shape, selected, _pooled(grid, pool)).einsum)
    if ablation == "qk":
        return relative + Counts(matmul=(updated + whole) * dim, spared=max(updated - whole, 0) * dim)
    gate, accumulator = keys * dim + shape.heads * whole, (cells + 2 * queries) * dim
    official, ran = updated + 2 * cells * queries, min(updated + 3 * cells * queries, 2 * whole)
    return relative + Counts(
        matmul=official * dim, gate=gate, accumulator=accumulator, spared=gate + (official - ran) * dim
    )


def _stem(shape: ViTShape, grid: Grid, embedding: bool) -> Counts:
    """Position encoding and, on request, patch embedding of all tokens."""
    elements = _tokens(grid) * shape.dim
    counts = Counts(add=elements) if shape.positions else Counts()
    return counts + Counts(linear=elements * shape.channels * shape.patch**2, bias=elements) if embedding else counts


def _linear(shape: ViTShape, tokens: int) -> Counts:
    """The linear layers of one block on some tokens."""
    dim, hidden = shape.dim, shape.hidden or 4 * shape.dim
    return Counts(linear=tokens * dim * (4 * dim + 2 * hidden), bias=tokens * (2 * dim + hidden + _qkv_bias(shape)))


def _qkv_bias(shape: ViTShape) -> int:
    return 3 * shape.dim if shape.qkv_bias else 0


def _relative(shape: ViTShape, queries: int, keys: Grid) -> Counts:
    """Decomposed relative positions of some queries against a grid of keys."""
    if not shape.rel_pos:
        return Counts()
    return Counts(einsum=queries * shape.dim * sum(keys), add=2 * queries * shape.heads * keys[0] * keys[1])


def _window_attention(shape: ViTShape, grid: Grid) -> Counts:
    """Attention in full inside every window, padding included; a padded token's bias is counted once, as officially."""
    side = shape.window
    if not side:
        return Counts()
    slots = windows_of(grid, side, torch.device("cpu")).count * side**2
    bias = _qkv_bias(shape) if slots > _tokens(grid) else 0
    return Counts(matmul=2 * slots * side**2 * shape.dim, bias=bias) + _relative(shape, slots, (side, side))
