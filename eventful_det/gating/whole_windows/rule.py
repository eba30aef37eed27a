"""Which windows are recomputed, and what is remembered of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.comparison import compare
from eventful_det.gating.gate import GatedState, select_tokens
from eventful_det.gating.macs import Macs, ViTShape, attention_macs
from eventful_det.gating.rows import compute_dtype
from eventful_det.gating.selector import Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import Update
from eventful_det.gating.whole_windows.network import WindowTables, run_windows, tables_of
from eventful_det.gating.windows import Grid, Side, windows_of
from eventful_det.gating.windows import Windows as Places

SHARES = (1 / 16, 1 / 8, 1 / 4, 0.35, 1 / 2)  # of the windows, and all of them


@dataclass
class WindowsState(GatedState):
    """State of one stream under `Windows`.

    Attributes:
        caches: per global block the keys and values `(windows, slots, 2, heads, d)`.
        tables: worked out at a flush.
    """

    tables: WindowTables | None = None


@dataclass(frozen=True)
class Windows:
    """Whole windows are recomputed, in numbers of a short list.

    A selection of r of N tokens stands for as many whole windows as hold no more tokens, at least one: those of its
    first tokens. The number is rounded up to one of the list, and the stalest windows fill up.

    Args:
        buckets: the list: shares of the windows (float) or numbers (int). All of them are always in it.
    """

    buckets: tuple[float | int, ...] = SHARES

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets))
        wrong = [b for b in self.buckets if isinstance(b, bool) or not (0 < b <= 1 if isinstance(b, float) else b >= 1)]
        if wrong:
            raise UserError(f"Windows: buckets are shares in (0, 1] or numbers of windows from 1, got {wrong[0]!r}")

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return ("windows",)

    def sizes(self, count: int) -> tuple[int, ...]:
        """The numbers of windows that may be recomputed of `count`, ascending."""
        return bucket_sizes(self.buckets, count)

    def windows_for(self, selected: int, tokens: int, count: int) -> int:
        """How many of `count` windows are recomputed when so many of all tokens are selected."""
        if not selected:
            return 0
        wanted = max(1, selected * count // tokens)
        return next(size for size in self.sizes(count) if size >= wanted)

    def init_stream(self, vit: ViTSpec, grid: Grid) -> WindowsState:
        """Allocate the state of a stream whose frames have `grid` tokens.

        Raises:
            UserError: the network has no windows, or parts that only the `Rows` rule knows.
        """
        vit.require_plain("the windows rule")
        if not isinstance(vit.window, int) or not vit.window or vit.prefix_count or vit.layout != "maps":
            raise UserError("the windows rule needs a network with windows and without class tokens; use the rows rule")
        shape = cache_shape(vit.shape, grid)
        caches = [vit.projection.weight.new_zeros(shape, dtype=compute_dtype(vit)) for _ in global_blocks(vit.shape)]
        return new_state(grid, vit.shape.pixels, vit.dim, caches, vit.projection.weight)

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[WindowsState],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame of every stream; see `Rows.step`."""
        flushes = [state.frame == 0 for state in states]
        compared = [vit.patches(frame) for frame in frames]
        unit = vit.pixel_std / 0.5  # as in `Rows`
        choices = self.choose(compared, states, select, saliency, vit.shape.window, vit.shape.channels, unit)
        updates = []
        for now, chosen, state, flush in zip(compared, choices, states, flushes, strict=True):
            if flush or state.tables is None:
                state.tables = tables_of(vit, state.grid)
            tokens = None
            if len(chosen.windows):
                inputs = (chosen.patches(now), chosen.windows, *state.caches)
                tokens, *new = self.run(vit, state.tables, state.grid, inputs)
                for cache, kv in zip(state.caches, new, strict=True):
                    cache.index_copy_(0, chosen.windows, kv)
            updates.append(update_of(vit.shape, state, chosen, tokens, flush))
        return updates

    def run(self, vit: ViTSpec, tables: WindowTables, grid: Grid, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`run_windows` of patches, windows and caches. Results are valid until the next run."""
        patches, windows, *caches = inputs
        return run_windows(vit, tables, grid, patches, windows, caches)

    def choose(
        self,
        compared: Sequence[Tensor],
        states: Sequence[WindowsState],
        select: Select,
        saliency: Sequence[Tensor | None],
        side: Side,
        channels: int,
        unit: float,
    ) -> list[Chosen]:
        """The windows of each stream, whose tokens then count as renewed.

        Args:
            compared: patches `(N, P)` of each stream.
            states: of the streams; reference, age and frame are updated.
            select, saliency: as for `step`.
            side: of a window.
            channels, unit: as for `compare`.
        """
        static = any(now.device.type != "cpu" for now in compared)
        gate = partial(compare, channels=channels, unit=unit, static=static)
        flushes = [state.frame == 0 for state in states]
        indices = select_tokens(gate, compared, states, flushes, select, saliency)
        choices = []
        for stream, (now, state) in enumerate(zip(compared, states, strict=True)):
            places = windows_of(state.grid, side, now.device)
            chosen = Chosen.of(places, self._windows(indices.get(stream), state.age, places))
            state.let_through(chosen.tokens, now.index_select(0, chosen.tokens))
            choices.append(chosen)
        return choices

    def _windows(self, index: Tensor | None, age: Tensor, places: Places) -> Tensor:
        """The windows `(W,)` that selected tokens `(r,)` stand for, ascending; None = all of them."""
        tokens = len(age)
        count = places.count if index is None else self.windows_for(len(index), tokens, places.count)
        if index is None or count in (0, places.count):
            return torch.arange(count, device=age.device)
        turn = torch.arange(len(index), device=age.device)
        first = torch.full((places.count,), tokens, device=age.device)
        first.scatter_reduce_(0, places.window.index_select(0, index), turn, "amin")
        oldest = torch.zeros_like(first).scatter_reduce_(0, places.window, age.long(), "amax").clamp_(max=tokens)
        return torch.where(first < tokens, first - 2 * tokens, -oldest).argsort(stable=True)[:count].sort().values


@dataclass(frozen=True)
class Chosen:
    """Windows to recompute.

    Attributes:
        windows: `(W,)`, ascending.
        slots: `(W, slots)` the token at each place of these windows, any at padded ones.
        tokens: `(r,)` those of them that are in the frame, window by window.
        held: `(r,)` where these are among the `W * slots` places; None = everywhere.
    """

    windows: Tensor
    slots: Tensor
    tokens: Tensor
    held: Tensor | None

    @classmethod
    def of(cls, places: Places, windows: Tensor) -> Chosen:
        """Some of the windows of a grid."""
        slots = places.token.view(places.count, -1).index_select(0, windows)
        if len(places.token) == len(places.window):
            return cls(windows, slots, slots.flatten(), None)
        number = windows[:, None] * places.slots + torch.arange(places.slots, device=windows.device)
        held = (places.place.index_select(0, slots.flatten()) == number.flatten()).nonzero().squeeze(1)
        return cls(windows, slots, slots.flatten().index_select(0, held), held)

    def patches(self, compared: Tensor) -> Tensor:
        """Rows `(N, P)` of the frame in these windows, `(W, slots, P)`."""
        return compared.index_select(0, self.slots.flatten()).view(*self.slots.shape, -1)

    def inside(self, rows: Tensor) -> Tensor:
        """Of rows `(W, slots, C)` those of `tokens`, `(r, C)`."""
        return rows.flatten(0, 1) if self.held is None else rows.flatten(0, 1).index_select(0, self.held)


@lru_cache(maxsize=64)
def bucket_sizes(buckets: tuple[float | int, ...], count: int) -> tuple[int, ...]:
    """See `Windows.sizes`."""
    numbers = (int(bucket * count) if isinstance(bucket, float) else bucket for bucket in buckets)
    return tuple(sorted({min(max(1, number), count) for number in numbers} | {count}))


def global_blocks(shape: ViTShape) -> list[int]:
    """The blocks that keep keys and values."""
    return [block for block in range(shape.depth) if not shape.is_windowed(block)]


def cache_shape(shape: ViTShape, grid: Grid) -> tuple[int, ...]:
    """`(windows, slots, 2, heads, d)` of the keys and values of a global block."""
    places = windows_of(grid, shape.window, torch.device("cpu"))
    return places.count, places.slots, 2, shape.heads, shape.dim // shape.heads


def new_state(grid: Grid, pixels: int, dim: int, caches: list[Tensor], like: Tensor) -> WindowsState:
    """An empty state, of the type and on the device of `like`."""
    tokens = grid[0] * grid[1]
    age = torch.ones(tokens, dtype=torch.int32, device=like.device)
    return WindowsState(
        Windows().layout, grid, like.new_zeros(tokens, pixels), age, caches, like.new_zeros(tokens, dim)
    )


def update_of(shape: ViTShape, state: WindowsState, chosen: Chosen, tokens: Tensor | None, flush: bool) -> Update:
    """What a frame of the `Windows` rule hands on; outputs `(W, slots, D)` are kept if there are any."""
    if tokens is not None:
        state.output.index_copy_(0, chosen.tokens, chosen.inside(tokens).to(state.output.dtype))
    return state.update(chosen.tokens, flush, windows_macs(shape, state.grid, len(chosen.windows), everything=flush))


@lru_cache(maxsize=256)
def windows_macs(shape: ViTShape, grid: Grid, count: int, everything: bool = False) -> Macs:
    """The cost of a frame of the `Windows` rule on which so many windows are recomputed."""
    places = windows_of(grid, shape.window, torch.device("cpu"))
    rows, keys = count * places.slots, places.count * places.slots
    linear = rows * (shape.pixels * shape.dim + shape.depth * shape.weights)
    windowed, whole = (
        attention_macs(shape, rows * slots, rows * slots, rows, (2 * size[0] - 1, 2 * size[1] - 1))
        for slots, size in ((places.slots, places.shape), (keys, grid))
    )
    gate = 0 if everything else grid[0] * grid[1] * shape.pixels
    return Macs(linear=linear, gate=gate) + windowed.times(shape.windowed) + whole.times(shape.depth - shape.windowed)
