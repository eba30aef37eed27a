"""Index maps: in which window a token lies and where, in which order rows meet their windows, and relative positions.

The examples are for a frame of 2 x 3 tokens in windows of 2 x 2. Tokens are numbered row by row, and the second window
is half padding (-)::

    tokens   0 1 2      windows   0 1 | 2 -      slots   0 1 | 0 1
             3 4 5                3 4 | 5 -              2 3 | 2 3
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eventful_det.errors import UserError

Grid = tuple[int, int]  # (rows, columns) of tokens

_TILES, _LEAST_TILE = 6, 16  # most tiles of a window; fewer queries at once than the least do not pay


@dataclass(frozen=True)
class Regions:
    """Windows that are `n` x `n` equal regions of the frame, so that their size follows that of the frame."""

    n: int


Side = int | Regions
"""Windows of so many tokens along a side, padded at the bottom and right; 0 = one window, the frame. Or regions."""


def window_shape(grid: Grid, side: Side) -> Grid:
    """Tokens of a window (rows, columns).

    Raises:
        UserError: a grid is not divisible into its regions.
    """
    if not isinstance(side, Regions):
        return (side, side) if side else grid
    if grid[0] % side.n or grid[1] % side.n:
        raise UserError(f"a grid of {grid[0]} x {grid[1]} tokens is not divisible into {side.n} x {side.n} regions")
    return grid[0] // side.n, grid[1] // side.n


@dataclass(frozen=True)
class Windows:
    """The windows of a token grid, see `Side`.

    Attributes:
        shape: tokens of one window, (rows, columns).
        count: number of windows.
        window: `(N,)` window of each token. Example: `[0, 0, 1, 0, 0, 1]`.
        slot: `(N,)` place of each token in its window, row-major. Example: `[0, 1, 0, 2, 3, 2]`.
        place: `(N,)` place of each token among the slots of all windows. Example: `[0, 1, 4, 2, 3, 6]`.
        token: `(count * slots,)` the token at each place; 0 where there is only padding.
            Example: `[0, 1, 3, 4, 2, 0, 5, 0]`.
    """

    shape: Grid
    count: int
    window: Tensor
    slot: Tensor
    place: Tensor
    token: Tensor

    @property
    def slots(self) -> int:
        """Places in a window."""
        return self.shape[0] * self.shape[1]

    def sort(self, index: Tensor) -> Tensor:
        """Tokens `(r,)` window by window. Example: `[5, 4, 2, 0]` becomes `[0, 4, 2, 5]`."""
        return self.token.index_select(0, self.place.index_select(0, index).sort().values)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def windows_of(grid: Grid, side: Side, device: torch.device) -> Windows:
    """The windows of a token grid."""
    rows, cols = grid
    height, width = window_shape(grid, side)
    across = -(-cols // width)
    count = -(-rows // height) * across
    token = torch.arange(rows * cols, device=device)
    y, x = token // cols, token % cols
    window = (y // height) * across + x // width
    slot = (y % height) * width + x % width
    place = window * (height * width) + slot
    return Windows(
        shape=(height, width),
        count=count,
        window=window,
        slot=slot,
        place=place,
        token=torch.zeros(count * height * width, dtype=torch.long, device=device).index_copy_(0, place, token),
    )


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

    Example: with two queries to a tile, the tokens `[0, 1, 3, 2]` fill three tiles, `0 1 | 3 - | 2 -`: two of window 0
    and one of window 1. Then `window` is `[0, 0, 1]`, `place` is `[0, 1, 2, 4]`, and `source` is `[0, 1, 2, 0, 3, 0]`.

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
    def of(cls, window: Tensor, windows: int, slots: int, static: bool = False) -> Tiles:
        """The tiles of some queries.

        Args:
            window: `(r,)` the window of each, ascending.
            windows: number of all windows.
            slots: places in a window.
            static: let the number of tiles depend on r alone, so that no device is waited for.
        """
        size, queries = queries_per_tile(slots), torch.arange(len(window), device=window.device)
        every = torch.arange(windows, device=window.device)
        first = torch.searchsorted(window, every)  # (windows,) first query of each
        held = torch.searchsorted(window, every, right=True) - first
        used = (held + size - 1) // size  # (windows,) tiles of each
        end = used.cumsum(0)
        place = queries + ((end - used) * size - first).index_select(0, window)
        count = most_tiles(len(window), windows, slots) if static else int(end[-1])
        source = torch.zeros(count * size, dtype=torch.long, device=window.device).index_copy_(0, place, queries)
        if not static and count == windows and size == slots:
            return cls(count, size, None, place, source)
        tiles = torch.searchsorted(end, torch.arange(count, device=window.device), right=True)
        return cls(count, size, tiles.clamp_(max=windows - 1), place, source)

    def reordered(self, order: Tensor) -> Tiles:
        """The tiles of queries of which `order (r,)` lists these ones: query i here is query `order[i]` there."""
        place = torch.empty_like(self.place).index_copy_(0, order, self.place)
        return Tiles(self.count, self.size, self.window, place, order.index_select(0, self.source))

    def spread(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Rows `(r, ...)` in `count` tiles from the tile `first` on, `(tiles, size, ...)`."""
        source = self.source[first * self.size : (first + count) * self.size]
        return rows.index_select(0, source).view(-1, self.size, *rows.shape[1:])


def relative_places(y: Tensor, x: Tensor, shape: Grid) -> Tensor:
    """Where some queries find their relative position embeddings in a table, see `relative_terms`.

    Example: a query at row 0 and column 1 of a window of 2 x 2 has the offsets 0 and -1 to the rows of keys, and 1 and
    0 to their columns. The table holds the offsets -1, 0, 1 along y and then -1, 0, 1 along x: `[1, 0, 5, 4]`.

    Args:
        y, x: `(r,)` row and column of each in its window.
        shape: of the window.

    Returns:
        `(r, rows + columns)` rows of the table: for keys in each row, then for keys in each column.
    """
    rows, cols = shape
    along_y = y[:, None] + torch.arange(rows - 1, -1, -1, device=y.device)
    along_x = x[:, None] + torch.arange(2 * rows + cols - 2, 2 * rows - 2, -1, device=x.device)
    return torch.cat([along_y, along_x], dim=1)


def relative_terms(q: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Decomposed relative position terms of some query rows, along y and then along x, as in MViTv2 and ViTDet.

    Args:
        q: `(r, heads, d)` unscaled queries.
        places: `(r, rows + columns)`, see `relative_places`.
        table: `(2 * rows - 1 + 2 * columns - 1, d)` embeddings along y, then along x, for these rows and columns.

    Returns:
        `(r, heads, rows + columns)`.
    """
    embeddings = table.index_select(0, places.flatten()).view(*places.shape, table.shape[1])
    return torch.bmm(q, embeddings.transpose(1, 2))


def relative_bias(terms: Tensor, shape: Grid) -> Tensor:
    """Terms `(..., rows + columns)` as a bias of the scaled products, `(..., rows * columns)`."""
    along_y, along_x = terms.split(list(shape), dim=-1)
    return (along_y[..., :, None] + along_x[..., None, :]).flatten(-2)


def rotate(qkv: Tensor, rotations: Tensor, half: bool) -> Tensor:
    """Rotary positions: queries and keys `x` become `x * cos + turned(x) * sin`; values stay.

    Example: `[a, b, c, d]` is turned to `[-c, -d, a, b]` by halves, or else to `[-b, a, -d, c]`.

    Args:
        qkv: `(r, 3, heads, d)`.
        rotations: `(r, 2, d)` sines and cosines of each row; 0 and 1 leave it as it is.
        half: how components are paired.

    Returns:
        `(r, 3, heads, d)`.
    """
    sin, cos = rotations[:, :, None, None].unbind(1)  # (r, 1, 1, d) each
    x = qkv[:, :2]  # (r, 2, heads, d)
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([(x * cos + turned * sin).to(qkv.dtype), qkv[:, 2:]], 1)
