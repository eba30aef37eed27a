"""The `rows` rule, from gate to block to attention to cache: one gate per frame, and the selected rows alone.

Think of the key/value cache of a language model, made for video. Nothing inside the blocks touches the tokens that were
not selected, and nothing is N x N. With every token selected it equals the dense network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.comparison import Comparison, compare
from eventful_det.gating.gate import GatedState, select_tokens
from eventful_det.gating.macs import RowsSizes, rows_macs
from eventful_det.gating.selector import Select
from eventful_det.gating.spec import Block, ViTSpec
from eventful_det.gating.state import Update
from eventful_det.gating.windows import (
    Grid,
    Side,
    Tiles,
    relative_bias,
    relative_places,
    relative_terms,
    rotate,
    windows_of,
)
from eventful_det.options import Natural, convert_fields

_BIAS_ELEMENTS = 1 << 23  # largest attention bias held at once; longer query lists are cut into pieces
_CACHE_ELEMENTS = 1 << 22  # keys and values gathered at once; longer tile lists are cut into pieces


@dataclass
class RowsState(GatedState):
    """State of one stream under `Rows`; outputs of several blocks stand one after another.

    Attributes:
        caches: per block the keys and values `(windows, slots, 2, heads, d)`; slots of padded tokens hold the bias.
            A window starts with the slots of its prefix tokens; keys are as attention sees them, normed and rotated.
        positions: `(N, D)` position encoding at this grid, or None. Like what follows, it is worked out at a flush.
        tables: per block its relative positions at this grid, see `relative_terms`; or None.
        rotations: `(p + N, 2, d)` sines and cosines of rotary positions, see `rotate`; or None.
    """

    positions: Tensor | None = None
    tables: list[Tensor | None] = field(default_factory=list)
    rotations: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """One gate per frame.

    Args:
        gate: what is compared with the reference: pixel "patches", which saves the embedding of tokens that are
            not selected, or the patch "embedding".
        renew_every: recompute everything on every n-th frame; 0 = never.
        static: shapes depend on the number of selected tokens alone, and the host never waits for the device unless
            the selector does; it costs some empty attention tiles. None = on all devices but CPUs.
        cache_dtype: of cached keys and values, "float16" or "bfloat16", to halve most of the state; they are
            converted whenever they are read. None = that of the network, or of autocast: exact.
        exact: each stream has matrix products of its own, so that no bit of what it gives depends on which others share
            the step. Otherwise the rows of all streams pass through the linear layers together, which is quicker, and
            products of other sizes may round differently.
    """

    gate: Literal["patches", "embedding"] = "patches"
    renew_every: Natural = 0
    static: bool | None = None
    cache_dtype: Literal["float16", "bfloat16"] | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        convert_fields(self, "Rows")

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return "rows", self.gate, self.cache_dtype or "same"

    def init_stream(self, vit: ViTSpec, grid: Grid) -> RowsState:
        """Allocate the state of a stream whose frames have `grid` tokens."""
        tokens, zeros = grid[0] * grid[1], vit.projection.weight.new_zeros
        dtype = compute_dtype(vit) if self.cache_dtype is None else getattr(torch, self.cache_dtype)
        return RowsState(
            self.layout,
            grid,
            reference=zeros(tokens, vit.shape.pixels if self.gate == "patches" else vit.dim),
            age=torch.ones(tokens, dtype=torch.int32, device=vit.device),
            caches=[zeros(*_cache_shape(block, grid, vit.prefix_count), dtype=dtype) for block in vit.blocks],
            output=zeros(tokens, vit.width),
            prefix=zeros(vit.prefix_count, vit.width) if vit.prefix_count else None,
        )

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[RowsState],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame of every stream.

        Args:
            vit: the network.
            frames: `(3, h, w)` of each stream, normalised.
            states: of the streams, updated in place.
            select: selects the tokens of the streams that are not recomputed in full.
            saliency: `(N,)` of each stream, see `GateInput`; or None.
        """
        flushes = [state.frame == 0 for state in states]
        for state, flush in zip(states, flushes, strict=True):
            if flush:
                _prepare(vit, state)
        patches = [vit.patches(frame) for frame in frames]
        compared = patches if self.gate == "patches" else [vit.embed(frame) for frame in patches]
        full = [flush or self._renews(state) for state, flush in zip(states, flushes, strict=True)]
        indices = self._choose(vit, compared, states, full, select, saliency)
        sizes = self._recompute(vit, compared, indices, states, full)
        return [
            state.update(index, flush, rows_macs(vit.shape, state.grid, size))
            for index, state, flush, size in zip(indices, states, flushes, sizes, strict=True)
        ]

    def is_static(self, device: torch.device) -> bool:
        """Whether shapes on a device depend on the number of selected tokens alone."""
        return device.type != "cpu" if self.static is None else self.static

    def _renews(self, state: RowsState) -> bool:
        return self.renew_every > 0 and state.frame % self.renew_every == 0

    def compare(self, vit: ViTSpec, compared: Tensor, reference: Tensor) -> Comparison:
        """Compare patches or embeddings with their reference, which takes on the light of the frame."""
        channels = vit.shape.channels if self.gate == "patches" else 0
        return compare(compared, reference, channels, vit.pixel_std / 0.5, self.is_static(vit.device))

    def _choose(
        self,
        vit: ViTSpec,
        compared: Sequence[Tensor],
        states: Sequence[RowsState],
        full: Sequence[bool],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """For each stream the indices `(r,)` of its tokens, window by window."""
        selected = select_tokens(partial(self.compare, vit), compared, states, full, select, saliency)
        indices = []
        for stream, state in enumerate(states):
            device = state.age.device
            index = selected[stream] if stream in selected else torch.arange(len(state.age), device=device)
            indices.append(windows_of(state.grid, vit.window, device).sort(index))
        return indices

    def _recompute(
        self,
        vit: ViTSpec,
        compared: Sequence[Tensor],
        indices: Sequence[Tensor],
        states: Sequence[RowsState],
        full: Sequence[bool],
    ) -> list[RowsSizes]:
        """Recompute the tokens `(r,)` of each stream, updating its state."""
        static = self.is_static(vit.device)
        selections = []
        for now, index, state in zip(compared, indices, states, strict=True):
            rows = now.index_select(0, index)  # (r, P or D)
            state.let_through(index, rows)
            selections.append(_Selection(vit, index, rows, state, static))
        busy = [selection for selection in selections if len(selection.index)]
        for group in [[one] for one in busy] if self.exact else [busy] if busy else []:
            _run(vit, group, embed=self.gate == "patches")
        return [
            RowsSizes(
                compared=0 if whole else now.numel(),
                embedded=len(one.index) if self.gate == "patches" else len(now),
                rows=one.length,
                queries=one.window_queries,
            )
            for now, one, whole in zip(compared, selections, full, strict=True)
        ]


def compute_dtype(vit: ViTSpec) -> torch.dtype:
    """The type in which linear layers give keys and values."""
    autocast = torch.is_autocast_enabled(vit.device.type) and vit.dtype == torch.float32
    return torch.get_autocast_dtype(vit.device.type) if autocast else vit.dtype


def _cache_shape(block: Block, grid: Grid, prefix: int) -> tuple[int, ...]:
    """`(windows, slots, 2, heads, d)` of the keys and values of a block."""
    windows = windows_of(grid, block.window, block.weight.device)
    return windows.count, windows.slots + prefix // windows.count, 2, block.heads, block.dim // block.heads


def _prepare(vit: ViTSpec, state: RowsState) -> None:
    """What depends on the weights and the grid alone: positions, and the keys and values of padded tokens.

    Where windows are padded, every slot is given those of a padded token; nothing else writes the slots of these.
    """
    state.positions = None if vit.positions is None else vit.positions(state.grid).detach().clone()
    state.rotations = vit.rotations(state.grid)
    state.tables = []
    for block, cache in zip(vit.blocks, state.caches, strict=True):
        windows = windows_of(state.grid, block.window, cache.device)
        if windows.count * windows.slots > len(state.age):
            cache.copy_(block.padding_qkv()[1:])  # (2, heads, d) to every slot
        tables = block.tables(windows.shape)
        state.tables.append(torch.cat(tables) if tables else None)


class _Selection:
    """What is recomputed of one stream, and where its rows stand in the attention.

    Attributes:
        index: `(r,)` tokens, window by window.
        rows: `(r, P or D)` their patches or embeddings.
        state: of the stream.
        length: rows through the blocks, prefix tokens included.
        rotations: `(p + r, 2, d)` their rotary positions, or None.
        queries: where the rows stand, for every size of windows.
    """

    def __init__(self, vit: ViTSpec, index: Tensor, rows: Tensor, state: RowsState, static: bool) -> None:
        self.index, self.rows, self.state = index, rows, state
        self.length = vit.prefix_count + len(index) if len(index) else 0
        self.rotations = None if state.rotations is None else _with_prefix(state.rotations, index, vit.prefix_count)
        self.queries = {
            side: Queries.of(index, state.grid, side, vit.prefix_count, vit.shape.rel_pos, static)
            for side in {block.window for block in vit.blocks if len(index)}
        }

    @property
    def window_queries(self) -> int:
        """Queries of a windowed block, those that fill up tiles included."""
        tiles = [queries.tiles for queries in self.queries.values()]
        return sum(tile.count * tile.size for tile in tiles if tile is not None)


def _run(vit: ViTSpec, streams: Sequence[_Selection], embed: bool) -> None:
    """Carry rows of some streams through the network, updating caches and outputs.

    Norms, linear layers and MLPs do not care where a row comes from: the rows of all streams pass through them as one
    matrix. Attention is each stream's own.
    """
    z = torch.cat([one.rows for one in streams])  # (R, P or D), R = sum of r
    z = vit.embed(z) if embed else z  # (R, D)
    positions = [(one.state.positions, one.index) for one in streams]
    if vit.positions is not None:
        z = z + torch.cat([encoding.index_select(0, index) for encoding, index in positions if encoding is not None])
    if vit.prefix is not None:
        own = z.split([len(one.index) for one in streams])
        z = torch.cat([part for rows in own for part in (vit.prefix(), rows)])  # (R + streams * p, D)
    z = vit.norm_pre(z)
    lengths = [one.length for one in streams]
    rotations = [one.rotations for one in streams if one.rotations is not None]
    rotation = torch.cat(rotations) if rotations else None  # (R + streams * p, 2, d)
    outputs = []
    for i, block in enumerate(vit.blocks):
        qkv = block.qkv(block.norm1(z))  # (R + streams * p, 3, heads, d)
        if rotation is not None and vit.rope is not None:
            qkv = rotate(qkv, rotation, vit.rope.half)
        attended = [
            attend(rows, one.state.caches[i], one.queries[block.window], one.state.tables[i])
            for rows, one in zip(qkv.split(lengths), streams, strict=True)
        ]
        z = z + block.proj(torch.cat(attended))
        z = z + block.mlp(block.norm2(z))
        if i + 1 in vit.outputs:
            outputs.append(vit.norm(z))
    for one, rows in zip(streams, torch.cat(outputs, 1).split(lengths), strict=True):
        prefix, tokens = rows.tensor_split([vit.prefix_count])  # (p, C) and (r, C)
        one.state.output.index_copy_(0, one.index, tokens.to(one.state.output.dtype))
        if one.state.prefix is not None:
            one.state.prefix.copy_(prefix)


def _with_prefix(rows: Tensor, index: Tensor, prefix: int) -> Tensor:
    """The first `prefix` rows, and those of the tokens `index (r,)` that follow them."""
    return torch.cat([rows[:prefix], rows.index_select(0, index + prefix)])


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
        cls, index: Tensor, grid: Grid, side: Side, prefix: int = 0, relative: bool = True, static: bool = False
    ) -> Queries:
        """Where some tokens stand.

        Args:
            index: `(r,)` flat indices of the tokens, window by window.
            grid: tokens of the frame.
            side: of the windows; 0 = global attention.
            prefix: number of class and register tokens, which are always there, before all others, and as many in
                each window. Example: with 2 of them, the tokens `[0, 1, 3, 2]` of the frame of 2 x 3 in `windows.py`
                have the places `[0, 5, 1, 2, 3, 6]` among the 2 x (1 + 4) slots.
            relative: whether there are relative positions.
            static: as for `Tiles.of`.
        """
        windows = windows_of(grid, side, index.device)
        slot = windows.slot.index_select(0, index)
        places = relative_places(slot // windows.shape[1], slot % windows.shape[1], windows.shape) if relative else None
        if not side:
            cached = torch.cat([torch.arange(prefix, device=index.device), slot + prefix])
            return cls(windows.shape, cached, places, None)
        window = windows.window.index_select(0, index)
        if not prefix:
            tiles = Tiles.of(window, windows.count, windows.slots, static)
            return cls(windows.shape, window * windows.slots + slot, places, tiles)
        each = prefix // windows.count
        slots, first = each + windows.slots, torch.arange(prefix, device=index.device)
        window = torch.cat([first // each, window])
        order = window.argsort(stable=True)
        tiles = Tiles.of(window.index_select(0, order), windows.count, slots, static).reordered(order)
        return cls(windows.shape, window * slots + torch.cat([first % each, slot + each]), places, tiles)


def attend(qkv: Tensor, cache: Tensor, queries: Queries, table: Tensor | None) -> Tensor:
    """Refresh the cache and attend to the cached keys of the frame, or of each query's window.

    Args:
        qkv: `(r, 3, heads, d)` of the selected rows, prefix tokens first.
        cache: `(windows, slots, 2, heads, d)` keys and values, updated in place.
        queries: where the rows stand.
        table: relative positions of the block, see `relative_terms`; or None.

    Returns:
        `(r, D)`.
    """
    q, kv = qkv[:, 0], qkv[:, 1:]  # (r, heads, d), (r, 2, heads, d)
    cache.flatten(0, 1).index_copy_(0, queries.cached, kv.to(cache.dtype))
    terms = None
    if table is not None and queries.relative is not None:
        terms = relative_terms(q, queries.relative, table)  # (r, heads, rows + columns)
    rows = _attend_frame if queries.tiles is None else _attend_tiles
    return rows(q, cache, terms, queries).flatten(1)  # (r, heads, d) to (r, D)


def _attend_frame(q: Tensor, cache: Tensor, terms: Tensor | None, queries: Queries) -> Tensor:
    """Queries `(r, heads, d)` with their relative terms against the one window of the cache; as many rows out."""
    step = len(q) if terms is None else max(1, _BIAS_ELEMENTS // (q.shape[1] * cache.shape[1]))
    pieces = []
    for first in range(0, len(q), step):
        part = slice(first, first + step)
        pieces.append(_attention(q[None, part], cache, None if terms is None else terms[None, part], queries.shape)[0])
    return torch.cat(pieces)


def _attend_tiles(q: Tensor, cache: Tensor, terms: Tensor | None, queries: Queries) -> Tensor:
    """Queries `(r, heads, d)` with their relative terms against the windows of their tiles; as many rows out."""
    tiles = queries.tiles
    assert tiles is not None
    step = tiles.count if tiles.window is None else max(1, _CACHE_ELEMENTS // cache[0].numel())
    pieces = []
    for first in range(0, tiles.count, step):
        count = min(step, tiles.count - first)
        windows = cache if tiles.window is None else cache.index_select(0, tiles.window[first : first + count])
        bias = None if terms is None else tiles.spread(terms, first, count)
        pieces.append(_attention(tiles.spread(q, first, count), windows, bias, queries.shape))
    return torch.cat(pieces).flatten(0, 1).index_select(0, tiles.place)  # (tiles * size, heads, d) to (r, heads, d)


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
    keys, values = cache.to(q.dtype).transpose(1, 3).unbind(2)  # (g, heads, slots, d) each
    bias = None if terms is None else relative_bias(terms.transpose(1, 2), shape)  # (g, heads, n, slots)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)
