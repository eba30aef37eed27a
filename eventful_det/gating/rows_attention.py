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
_CACHE_ELEMENTS = 1 << 22  # keys and values gathered at once; longer tile lists are cut into pieces
_TILES, _LEAST_TILE = 6, 16  # most tiles of a window; fewer queries at once than the least do not pay


def queries_per_tile(slots: int) -> int:
    """How many queries are attended to together in windows of `slots` places: all, or down to a sixth of them."""
    return -(-slots // max(1, min(_TILES, slots // _LEAST_TILE)))


def most_tiles(queries: int, windows: int, slots: int) -> int:
    """The most tiles that some queries fill, wherever in the windows they lie."""
    tile, touched = queries_per_tile(slots), min(windows, queries)
    return min((queries + touched * (tile - 1)) // tile, windows * -(-slots // tile))


@dataclass(frozen=True)
class Tiles:
    """Queries laid out in tiles of a fixed size, each of queries of one window.

    Windows hold anything from one query to all; to pad all of them to the fullest would multiply the work.

    Attributes:
        count: number of tiles.
        size: queries in each.
        window: `(count,)` the window of each; None = the tiles are the windows.
        place: `(r,)` place of each query among those of the tiles.
        source: `(count * size,)` the query at each place; any where there is none.
    """

    count: int
    size: int
    window: Tensor | None
    place: Tensor
    source: Tensor

    @classmethod
    def of(cls, window: Tensor, windows: Windows, static: bool) -> Tiles:
        """The tiles of queries, given the ascending window `(r,)` of each; `static` as for `Queries.of`."""
        size, queries = queries_per_tile(windows.slots), torch.arange(len(window), device=window.device)
        every = torch.arange(windows.count, device=window.device)
        start = torch.searchsorted(window, every)
        held = torch.searchsorted(window, every, right=True) - start
        used = (held + size - 1) // size
        end = used.cumsum(0)
        place = queries + ((end - used) * size - start).index_select(0, window)
        count = most_tiles(len(window), windows.count, windows.slots) if static else int(end[-1])
        source = torch.zeros(count * size, dtype=torch.long, device=window.device).index_copy_(0, place, queries)
        if not static and count == windows.count and size == windows.slots:
            return cls(count, size, None, place, source)
        tiles = torch.searchsorted(end, torch.arange(count, device=window.device), right=True)
        return cls(count, size, tiles.clamp_(max=windows.count - 1), place, source)


@dataclass(frozen=True)
class Queries:
    """Where the rows of a stream stand in the attention of blocks of one window size.

    Attributes:
        shape: tokens of a window.
        cached: `(r,)` row of each query in the caches, flattened to `(windows * slots, 2, heads, d)`.
        relative: `(r, rows + columns)`, see `relative_places`; None without relative positions.
        tiles: in windows; None = there is one window, of the whole frame.
    """

    shape: Grid
    cached: Tensor
    relative: Tensor | None
    tiles: Tiles | None

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
            return cls(windows.shape, cached, places, None)
        window = windows.window.index_select(0, index)
        return cls(windows.shape, window * windows.slots + slot, places, Tiles.of(window, windows, static))

    def counts(self, block: Block, slots: int) -> Counts:
        """Operations of `attend` in a block whose windows have `slots` places, prefix tokens included."""
        queries = len(self.cached)
        computed = queries if self.tiles is None else self.tiles.count * self.tiles.size
        counts = Counts(matmul=2 * computed * slots * block.dim)
        if self.relative is None:
            return counts
        keys = self.shape[0] * self.shape[1]
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
    terms = None if table is None or queries.relative is None else relative_terms(q, queries.relative, table)
    if queries.tiles is None:
        return _attend_frame(q, cache, terms, queries.shape).flatten(1)
    return _attend_tiles(q, cache, terms, queries.shape, queries.tiles).flatten(1)


def _attend_frame(q: Tensor, cache: Tensor, terms: Tensor | None, shape: Grid) -> Tensor:
    """Queries `(r, heads, d)` with their relative terms against the one window of the cache; as many rows out."""
    step = len(q) if terms is None else max(1, _BIAS_ELEMENTS // (q.shape[1] * cache.shape[1]))
    pieces = []
    for first in range(0, len(q), step):
        part = slice(first, first + step)
        pieces.append(_attention(q[None, part], cache, None if terms is None else terms[None, part], shape)[0])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend_tiles(q: Tensor, cache: Tensor, terms: Tensor | None, shape: Grid, tiles: Tiles) -> Tensor:
    """Queries `(r, heads, d)` with their relative terms against the windows of their tiles; as many rows out."""
    step = tiles.count if tiles.window is None else max(1, _CACHE_ELEMENTS // cache[0].numel())
    windows = [None] if tiles.window is None else tiles.window.split(step)
    pieces = []
    for window, source in zip(windows, tiles.source.split(step * tiles.size), strict=True):
        some = cache if window is None else cache.index_select(0, window)
        some_terms = None if terms is None else _spread(terms, source, tiles.size)
        pieces.append(_attention(_spread(q, source, tiles.size), some, some_terms, shape))
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return rows.flatten(0, 1).index_select(0, tiles.place)


def _spread(rows: Tensor, source: Tensor, size: int) -> Tensor:
    """Rows `(r, ...)` in tiles, `(tiles, size, ...)`, given the row at each place."""
    return rows.index_select(0, source).view(-1, size, *rows.shape[1:])


def _attention(q: Tensor, cache: Tensor, terms: Tensor | None, shape: Grid) -> Tensor:
    """Attention.

    Args:
        q: `(g, n, heads, d)` queries.
        cache: `(g, slots, 2, heads, d)` keys and values.
        terms: `(g, n, heads, rows + columns)` relative positions, or None.
        shape: tokens of a window, (rows, columns).

    Returns:
        `(g, n, heads, d)`.
    """
    bias = None if terms is None else relative_bias(terms.transpose(1, 2), shape)
    keys, values = cache.to(q.dtype).transpose(1, 3).unbind(2)  # (g, heads, slots, d) each
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)
