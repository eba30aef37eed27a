"""The one place that counts: from the sizes of what an operation did to multiply-adds (1 MAC = 2 FLOP).

The rules return sizes of what they did; a prediction makes the same sizes without running anything. Both become MACs by
the same functions, and equal what `torch.utils.flop_counter` sees. Sums without a product are not multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.windows import Grid, Side, most_tiles, queries_per_tile, window_shape, windows_of

Ablation = Literal["full", "tokenwise", "qk"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Macs:
    """Multiply-adds by kind.

    Attributes:
        linear: of linear layers and convolutions.
        attention: of the products QK^T and A.V.
        positions: of decomposed relative positions.
        gate: elements compared with their reference.
    """

    linear: int = 0
    attention: int = 0
    positions: int = 0
    gate: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Macs:
        """Those of `count` such operations."""
        return Macs(*(count * value for value in astuple(self)))

    @property
    def products(self) -> int:
        """All but the comparisons of gates."""
        return self.linear + self.attention + self.positions

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.gate


@dataclass(frozen=True)
class ViTShape:
    """The sizes of a Vision Transformer that its cost depends on.

    Attributes:
        depth: number of blocks.
        dim: width D of a token.
        heads: attention heads per block.
        linear: weights of the linear layers of a block; 0 = 12 D^2, with an MLP of 4 D.
        window: of attention; 0 = global attention in all blocks.
        global_blocks: blocks with global attention in a network with windows.
        patch: side of a patch in pixels.
        channels: channels of a frame.
        rel_pos: whether attention has decomposed relative positions.
        prefix: class and register tokens, of all windows where each has its own.
    """

    depth: int
    dim: int
    heads: int
    linear: int = 0
    window: Side = 0
    global_blocks: tuple[int, ...] = ()
    patch: int = 16
    channels: int = 3
    rel_pos: bool = False
    prefix: int = 0

    @property
    def weights(self) -> int:
        """Weights of the linear layers of a block; those of attention are 4 D^2."""
        return self.linear or 12 * self.dim**2

    @property
    def pixels(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch**2

    @property
    def windowed(self) -> int:
        """Number of windowed blocks."""
        return self.depth - len(set(self.global_blocks)) if self.window else 0

    def is_windowed(self, block: int) -> bool:
        """Whether a block is windowed."""
        return bool(self.window) and block not in self.global_blocks

    def window_slots(self, grid: Grid) -> int:
        """Keys of a window, those of prefix tokens included."""
        windows = windows_of(grid, self.window, _CPU)
        return windows.slots + self.prefix // windows.count


def attention_macs(shape: ViTShape, scores: int, mixed: int, queries: int, keys: Grid) -> Macs:
    """Attention of one block.

    Args:
        shape: the network.
        scores: products of a query and a key.
        mixed: products of a weight and a value.
        queries: for which relative positions are computed.
        keys: map of keys (rows, columns), which relative positions refer to.
    """
    return Macs(attention=(scores + mixed) * shape.dim, positions=shape.rel_pos * queries * shape.dim * sum(keys))


def padded_tokens(shape: ViTShape, grid: Grid) -> int:
    """Places of all windows, those of padded tokens and of prefix tokens included."""
    return windows_of(grid, shape.window, _CPU).count * shape.window_slots(grid)


def window_attention_macs(shape: ViTShape, grid: Grid, queries: int, relative: int) -> Macs:
    """Attention of one windowed block, with relative positions for `relative` of its queries."""
    products = queries * shape.window_slots(grid)
    return attention_macs(shape, products, products, relative, window_shape(grid, shape.window))


@lru_cache(maxsize=256)
def dense_macs(shape: ViTShape, grid: Grid, padded_linear: bool = False) -> Macs:
    """The dense network.

    Args:
        shape: the network.
        grid: token grid (H, W).
        padded_linear: count the qkv and output projections of the padded tokens of windows, too. The dense blocks of
            timm and detectron2 compute them, the update rules do not.
    """
    tokens = grid[0] * grid[1]
    length = shape.prefix + tokens
    macs = Macs(linear=tokens * shape.pixels * shape.dim + shape.depth * length * shape.weights)
    macs += attention_macs(shape, length**2, length**2, length, grid).times(shape.depth - shape.windowed)
    if shape.windowed:
        slots = padded_tokens(shape, grid)
        macs += window_attention_macs(shape, grid, slots, slots).times(shape.windowed)
        if padded_linear:
            macs += Macs(linear=shape.windowed * (slots - length) * 4 * shape.dim**2)
    return macs


@dataclass(frozen=True)
class RowsSizes:
    """What the `Rows` rule did in one stream on one frame.

    Attributes:
        compared: values compared by the gate.
        embedded: tokens embedded.
        rows: rows carried through the blocks, prefix tokens included.
        queries: of every windowed block, those that fill up tiles included.
    """

    compared: int
    embedded: int
    rows: int
    queries: int


def rows_macs(shape: ViTShape, grid: Grid, sizes: RowsSizes) -> Macs:
    """The cost of a frame of the `Rows` rule."""
    products = sizes.rows * (shape.prefix + grid[0] * grid[1])
    return (
        Macs(linear=sizes.embedded * shape.pixels * shape.dim + shape.depth * sizes.rows * shape.weights)
        + Macs(gate=sizes.compared)
        + attention_macs(shape, products, products, sizes.rows, grid).times(shape.depth - shape.windowed)
        + window_attention_macs(shape, grid, sizes.queries, sizes.rows).times(shape.windowed)
    )


def rows_sizes(shape: ViTShape, grid: Grid, selected: int, queries: int | None = None) -> RowsSizes:
    """What the `Rows` rule with the patch gate will do.

    Args:
        shape: the network.
        grid: token grid (H, W).
        selected: tokens recomputed, without prefix tokens, which then are recomputed, too.
        queries: of every windowed block, see `window_queries`; None = the most that there can be.
    """
    tokens = grid[0] * grid[1]
    selected = min(selected, tokens)
    if queries is None:
        queries = most_window_queries(grid, shape.window, selected, shape.prefix)
    return RowsSizes(tokens * shape.pixels, selected, selected + shape.prefix if selected else 0, queries)


def window_queries(grid: Grid, side: Side, index: Tensor, prefix: int = 0) -> int:
    """Queries that tokens `index (r,)` and prefix tokens make in windows, those that fill up tiles included."""
    windows = windows_of(grid, side, index.device)
    each = prefix // windows.count
    size, held = queries_per_tile(windows.slots + each), torch.bincount(windows.window[index], minlength=windows.count)
    return size * int(((held + each + size - 1) // size).sum()) if len(index) else 0


def most_window_queries(grid: Grid, side: Side, selected: int, prefix: int = 0) -> int:
    """The most queries that so many tokens and the prefix tokens make in windows, wherever they lie."""
    windows = windows_of(grid, side, _CPU)
    slots = windows.slots + prefix // windows.count
    return queries_per_tile(slots) * most_tiles(selected + prefix if selected else 0, windows.count, slots)


@dataclass(frozen=True)
class RowsCosts:
    """What frames of the `Rows` rule with the patch gate will cost, for every number of tokens.

    Attributes:
        shape: the network.
        static: windows take as many tiles as if tokens lay as scattered as can be, see `Rows`.
    """

    shape: ViTShape
    static: bool

    def macs(self, grid: Grid, order: Tensor) -> Tensor:
        """`(n + 1,)` MACs if the first 0, 1, ... n tokens of an order `(n,)` are recomputed."""
        nothing, one, token, tile = _rows_terms(self.shape, grid)
        taken = torch.arange(len(order) + 1, device=order.device)
        total = one + token * (taken - 1)
        if self.shape.windowed:
            tiles = _most_tiles(self.shape, grid, order.device)[taken] if self.static else self._tiles(grid, order)
            total += tile * (tiles - 1)
        total[0] = nothing
        return total

    def _tiles(self, grid: Grid, order: Tensor) -> Tensor:
        """`(n + 1,)` tiles that the queries of windows fill."""
        windows, count = windows_of(grid, self.shape.window, order.device), len(order)
        size, each = queries_per_tile(self.shape.window_slots(grid)), self.shape.prefix // windows.count
        window = windows.window[order]
        held = torch.bincount(window, minlength=windows.count)
        by_window = window.argsort(stable=True)
        place = torch.empty_like(window)  # how many queries of its window come before each
        place[by_window] = torch.arange(count, device=order.device) - (held.cumsum(0) - held)[window[by_window]] + each
        return F.pad((place % size == 0).cumsum(0), (1, 0)) + windows.count * -(-each // size)


@lru_cache(maxsize=64)
def _rows_terms(shape: ViTShape, grid: Grid) -> tuple[int, int, int, int]:
    """MACs for no token, for one, for each more, and for each more tile of queries in windows."""
    tile = queries_per_tile(shape.window_slots(grid))

    def macs(selected: int, tiles: int) -> int:
        return rows_macs(shape, grid, rows_sizes(shape, grid, selected, tiles * tile)).total

    one = macs(1, 1)
    return macs(0, 0), one, macs(2, 1) - one, macs(1, 2) - one


@lru_cache(maxsize=64)
def _most_tiles(shape: ViTShape, grid: Grid, device: torch.device) -> Tensor:
    """`(N + 1,)` the most tiles that 0, 1, ... N tokens fill."""
    tile = queries_per_tile(shape.window_slots(grid))
    counts = range(grid[0] * grid[1] + 1)
    most = [most_window_queries(grid, shape.window, count, shape.prefix) // tile for count in counts]
    return torch.tensor(most, device=device)


@dataclass(frozen=True)
class PaperSizes:
    """What the `Paper` rule did in one block on one frame.

    Attributes:
        qkv, proj, mlp: tokens that the three gates let through.
        cells: keys updated in a global block: as many as tokens, or the pooled cells that they fall in.
    """

    qkv: int
    proj: int
    mlp: int
    cells: int


def paper_macs(
    shape: ViTShape,
    grid: Grid,
    blocks: Sequence[PaperSizes],
    ablation: Ablation = "full",
    pool: int = 1,
    flush: bool = False,
) -> Macs:
    """The cost of a frame of the `Paper` rule, which embeds all tokens.

    Args:
        shape: the network.
        grid: token grid (H, W).
        blocks: what was done in each block.
        ablation, pool: as for `Paper`.
        flush: whether everything was computed and nothing compared.
    """
    macs = Macs(linear=grid[0] * grid[1] * shape.pixels * shape.dim)
    for i, sizes in enumerate(blocks):
        macs += paper_block_macs(shape, grid, shape.is_windowed(i), sizes, ablation, pool, flush)
    return macs


def paper_block_macs(
    shape: ViTShape, grid: Grid, windowed: bool, sizes: PaperSizes, ablation: Ablation, pool: int, flush: bool
) -> Macs:
    """The cost of one block of the `Paper` rule; see `paper_macs`."""
    length, dim = shape.prefix + grid[0] * grid[1], shape.dim
    linear = (3 * sizes.qkv + sizes.proj) * dim**2 + sizes.mlp * (shape.weights - 4 * dim**2)
    macs = Macs(linear=linear, gate=0 if flush else 3 * length * dim)
    if windowed:
        slots = padded_tokens(shape, grid)
        return macs + window_attention_macs(shape, grid, slots, slots)
    keys = length // pool**2
    scores = mixed = length * keys
    if ablation != "tokenwise" and not flush:
        scores = sizes.qkv * keys + sizes.cells * length  # rows and columns of QK^T
        mixed = length * keys if ablation == "qk" else 2 * sizes.cells * length  # A_new dv + dA v_old
    return macs + attention_macs(shape, scores, mixed, length, (grid[0] // pool, grid[1] // pool))


def paper_sizes(shape: ViTShape, grid: Grid, selected: int, pool: int = 1) -> tuple[PaperSizes, ...]:
    """What the `Paper` rule will do if every gate lets `selected` tokens through, scattered at random."""
    selected = min(selected, shape.prefix + grid[0] * grid[1])
    cells = selected if pool == 1 else round(expected_cells(grid, selected, pool))
    return (PaperSizes(selected, selected, selected, cells),) * shape.depth


def expected_cells(grid: Grid, selected: int, pool: int) -> float:
    """Expected number of pooled cells touched by tokens that are scattered at random over the grid.

    Tokens of real frames cluster, so it overestimates: of 64 x 64 tokens, 512 fall in 128 to 512 of the 1,024 cells
    of 2 x 2, 424 at random. The official ViT-B figure for them, 66.8 GMACs, means 191 cells on average; 128 give
    64.4, 424 give 75.6 and 512 give 78.9. (Largest pixel changes of four DAVIS clips: 233 to 298 cells.)
    """
    tokens, missed = grid[0] * grid[1], 1.0
    for i in range(pool**2):
        missed *= max(tokens - selected - i, 0) / (tokens - i)
    return tokens // pool**2 * (1 - missed)
