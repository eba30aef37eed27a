"""Attention of the selected rows of a stream against its cached keys and values.

What depends on the selection alone (which windows, which cache rows) is worked out once per frame, in `Queries`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.anatomy import Block, Grid
from eventful_det.gating.cost import Counts
from eventful_det.gating.windows import Windows, relative_bias, relative_places, relative_terms, windows_of

_BIAS_ELEMENTS = 1 << 23  # largest attention bias held at once; longer query lists are cut into pieces
_TILES, _LEAST_TILE = 4, 16  # most tiles of a window; fewer queries at once than the least do not pay


def queries_per_tile(slots: int) -> int:
    """How many queries are attended to together in windows of `slots` places: all, or down to a quarter of them."""
    return -(-slots // max(1, min(_TILES, slots // _LEAST_TILE)))


def most_tiles(queries: int, windows: int, slots: int) -> int:
    """The most tiles that some queries fill, wherever in the windows they lie."""
    tile, touched = queries_per_tile(slots), min(windows, queries)
    return min((queries + touched * (tile - 1)) // tile, windows * -(-slots // tile))


@dataclass(frozen=True)
class Queries:
    """Where the rows of a stream stand in the attention of blocks of one window size.

    In windows, queries are laid out in tiles of a fixed size, each of queries of one window: windows hold anything from
    one query to all, and padding all of them to the fullest would multiply the work. Globally there is one tile.

    Attributes:
        shape: tokens of a window.
        cached: `(r,)` row of each query in the caches, flattened to `(windows * slots, 2, heads, d)`.
        relative: `(r, rows + columns)`, see `relative_places`; None without relative positions.
        windows: `(tiles,)` the window of each tile; None = the tiles are the windows.
        place: `(r,)` place of each query in the tiles; None = they are in order.
        source: `(tiles * tile,)` the query at each place; any where there is none.
        tiles: how many there are.
        tile: queries in each.
    """

    shape: Grid
    cached: Tensor
    relative: Tensor | None
    windows: Tensor | None
    place: Tensor | None
    source: Tensor | None
    tiles: int
    tile: int

    @classmethod
    def of(
        cls, index: Tensor, grid: Grid, side: int, prefix: int = 0, relative: bool = True, static: bool = False
    ) -> Queries:
        """The layout of some tokens.

        Args:
            index: `(r,)` flat indices of the tokens, window by window.
            grid: tokens of the frame.
            side: of the windows in tokens; 0 = global attention.
            prefix: number of class and register tokens, which are always there, before all others.
            relative: whether there are relative positions.
            static: let the number of tiles depend on r alone: no device is waited for.
        """
        windows = windows_of(grid, side, index.device)
        slot = windows.slot.index_select(0, index) if side else index
        places = relative_places(slot // windows.shape[1], slot % windows.shape[1], windows.shape) if relative else None
        if not side:
            cached = torch.cat([torch.arange(prefix, device=index.device), index + prefix]) if prefix else index
            return cls(windows.shape, cached, places, None, None, None, 1, len(cached))
        window = windows.window.index_select(0, index)
        return cls(windows.shape, window * windows.slots + slot, places, *_tile(window, windows, static))

    def spread(self, rows: Tensor) -> Tensor:
        """Rows `(r, ...)` in tiles, `(tiles, tile, ...)`; anything where there is no query."""
        if self.source is None:
            return rows[None]
        return rows.index_select(0, self.source).unflatten(0, (self.tiles, self.tile))

    def gather(self, spread: Tensor) -> Tensor:
        """The rows `(r, ...)` of tiles `(tiles, tile, ...)`."""
        flat = spread.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def counts(self, block: Block, slots: int) -> Counts:
        """Operations of `attend` in a block whose windows have `slots` places, prefix tokens included."""
        counts = Counts(matmul=2 * self.tiles * self.tile * slots * block.dim)
        if self.relative is None:
            return counts
        queries, keys = len(self.cached), self.shape[0] * self.shape[1]
        return counts + Counts(einsum=queries * block.dim * sum(self.shape), add=2 * queries * block.heads * keys)


def attend(block: Block, qkv: Tensor, cache: Tensor, queries: Queries, table: Tensor | None) -> Tensor:
    """Refresh the cache and attend to the cached keys of the frame, or of each query's window.

    Args:
        block: the block.
        qkv: `(r, 3 D)` of the selected rows, prefix tokens first.
        cache: `(windows, slots, 2, heads, d)` keys and values, updated in place.
        queries: where the rows stand.
        table: relative positions of the block, see `relative_terms`; or None.

    Returns:
        `(r, D)`.
    """
    qkv = qkv.view(len(qkv), 3, block.heads, -1)
    q = qkv[:, 0]
    cache.flatten(0, 1).index_copy_(0, queries.cached, qkv[:, 1:].to(cache.dtype))
    if queries.windows is not None:
        cache = cache.index_select(0, queries.windows)
    keys, values = cache.to(q.dtype).unbind(2)
    if table is None or queries.relative is None:
        return queries.gather(_attention(queries.spread(q), keys, values)).flatten(1)
    terms = relative_terms(q, queries.relative, table)
    step = max(1, _BIAS_ELEMENTS // (block.heads * keys.shape[1]))
    if queries.place is not None or step >= len(q):
        bias = relative_bias(queries.spread(terms).transpose(1, 2), queries.shape)
        return queries.gather(_attention(queries.spread(q), keys, values, bias)).flatten(1)
    pieces = [
        _attention(some[None], keys, values, relative_bias(term[None].transpose(1, 2), queries.shape))[0]
        for some, term in zip(q.split(step), terms.split(step), strict=True)
    ]
    return torch.cat(pieces).flatten(1)


def _attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Queries `(g, n, heads, d)` against `(g, slots, heads, d)`, with a bias `(g, heads, n, slots)`.

    Returns:
        `(g, n, heads, d)`.
    """
    q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)


def _tile(window: Tensor, windows: Windows, static: bool) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
    """Lay queries out in tiles.

    Args:
        window: `(r,)` ascending window of each.
        windows: where they lie.
        static: as for `Queries.of`.

    Returns:
        `windows`, `place`, `source`, `tiles` and `tile` of `Queries`.
    """
    tile, queries = queries_per_tile(windows.slots), torch.arange(len(window), device=window.device)
    every = torch.arange(windows.count, device=window.device)
    start = torch.searchsorted(window, every)
    held = torch.searchsorted(window, every, right=True) - start
    used = (held + tile - 1) // tile
    end = used.cumsum(0)
    place = queries + ((end - used) * tile - start).index_select(0, window)
    tiles = most_tiles(len(window), windows.count, windows.slots) if static else int(end[-1])
    source = torch.zeros(tiles * tile, dtype=torch.long, device=window.device).index_copy_(0, place, queries)
    if not static and tiles == windows.count and tile == windows.slots:
        return None, place, source, tiles, tile
    of_tile = torch.searchsorted(end, torch.arange(tiles, device=window.device), right=True)
    return of_tile.clamp_(max=windows.count - 1), place, source, tiles, tile
