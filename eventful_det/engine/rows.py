"""The `Rows` rule in a compiled engine: numbers of tokens come from a short list, and masks stand for windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.engine.backends import Backend, Graph
from eventful_det.gating.comparison import compare
from eventful_det.gating.gate import select_tokens
from eventful_det.gating.macs import Macs, ViTShape, attention_macs
from eventful_det.gating.rows import RowsState
from eventful_det.gating.selector import Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import Update
from eventful_det.gating.whole_windows.rule import bucket_sizes
from eventful_det.gating.windows import Grid, windows_of

_NO_KEY = -1e9  # bias of a key in another window


@dataclass(frozen=True)
class CompiledRows:
    """One gate per frame, in PyTorch; the selected tokens are recomputed by the graph "backbone", see `RowsGraph`.

    Args:
        shape: of the network.
        grid: tokens of a frame.
        buckets: numbers of tokens that are compiled: shares (float) or numbers (int); all of them are always in it.
        backend: runs the graph.
        unit: of the gate's errors, as in `Rows`.
        width: of what the graph gives of every token; 0 = it gives that of the prefix tokens instead.
    """

    shape: ViTShape
    grid: Grid
    buckets: tuple[float | int, ...]
    backend: Backend
    unit: float
    width: int = 0

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return "compiled rows", str(self.backend.dtype)

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens, ascending."""
        return bucket_sizes(self.buckets, self.tokens)

    def init_stream(self, vit: ViTSpec | None, grid: Grid) -> RowsState:  # noqa: ARG002 (of the protocol)
        """An empty state."""
        shape, tokens, dtype = self.shape, self.tokens, self.backend.dtype
        cache = (tokens + shape.prefix, 2, shape.heads, shape.dim // shape.heads)
        return RowsState(
            self.layout,
            grid,
            reference=torch.zeros(tokens, shape.pixels),
            age=torch.ones(tokens, dtype=torch.int32),
            caches=[torch.zeros(cache, dtype=dtype) for _ in range(shape.depth)],
            output=torch.zeros(tokens, self.width, dtype=dtype),
            prefix=None if self.width else torch.zeros(shape.prefix, shape.dim),
        )

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[RowsState],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame of every stream; see `Rows.step`."""
        flushes = [state.frame == 0 for state in states]
        indices = self.choose([vit.patches(frame) for frame in frames], states, select, saliency)
        updates = []
        for state, index, flush in zip(states, indices, flushes, strict=True):
            if len(index):
                self.refresh(state, index)
            updates.append(state.update(index, flush, self.macs(len(index), flush)))
        return updates

    def choose(
        self, patches: Sequence[Tensor], states: Sequence[RowsState], select: Select, saliency: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The tokens `(r,)` of each stream to recompute, whose reference they become."""
        gate = partial(compare, channels=self.shape.channels, unit=self.unit)
        flushes = [state.frame == 0 for state in states]
        indices = select_tokens(gate, patches, states, flushes, select, saliency)
        choices = []
        for i, (now, state) in enumerate(zip(patches, states, strict=True)):
            index = self._filled(indices[i], state.age) if i in indices else torch.arange(len(now))
            state.let_through(index, now.index_select(0, index))
            choices.append(index)
        return choices

    def _filled(self, index: Tensor, age: Tensor) -> Tensor:
        """Selected tokens `(r,)`, and the stalest of the others up to the next number that is compiled."""
        count = next(size for size in (0, *self.sizes) if size >= len(index))
        stale = age.index_fill(0, index, -1).topk(count - len(index)).indices
        return torch.cat([index, stale])

    def refresh(self, state: RowsState, index: Tensor) -> None:
        """Recompute tokens `(r,)` from their reference."""
        patches = state.reference.index_select(0, index)
        *kv, rows, output = self.backend.run("backbone", patches, index, *state.caches)
        for cache, new in zip(state.caches, kv, strict=True):
            cache.index_copy_(0, rows, new)
        if state.prefix is None:
            state.output.index_copy_(0, index, output)
        else:
            state.prefix.copy_(output)

    def macs(self, count: int, flush: bool = False) -> Macs:
        """Of a frame with so many tokens; windows are masks, so all queries meet all keys."""
        shape = self.shape
        rows = count + shape.prefix if count else 0
        products = rows * (self.tokens + shape.prefix)
        linear = Macs(count * shape.pixels * shape.dim + shape.depth * rows * shape.weights)
        gate = Macs(gate=0 if flush else self.tokens * shape.pixels)
        return linear + gate + attention_macs(shape, products, products, rows, self.grid).times(shape.depth)

    def prices(self, heads: Callable[[int], int]) -> tuple[tuple[int, int], ...]:
        """For `BucketCosts`: MACs by how many tokens are selected, `heads` telling those of what follows."""
        lows = (0, 1, *(size + 1 for size in self.sizes[:-1]))
        return tuple((low, self.macs(n).total + heads(n)) for low, n in zip(lows, (0, *self.sizes), strict=True))


class RowsGraph(nn.Module):
    """The network of `rows.py` in gating, for compilers: a function of tensors, with a mask in place of tiles.

    `(patches (r, P), index (r,), caches ...)` to keys and values of each block `(p + r, 2, heads, d)` in rows of its
    cache, these rows `(p + r,)`, and what `last` makes of the outputs `(p + r, C)`.
    A cache is `(windows * slots, 2, heads, d)`, window by window, each with its class token first; global blocks have
    the same order.

    Args:
        network: that the spec and `last` refer to.
        spec: of the ViT.
        grid: tokens of a frame.
        last: see above.
    """

    def __init__(self, network: nn.Module, spec: ViTSpec, grid: Grid, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.spec, self.last, device = network, spec, last, spec.device
        windows = windows_of(grid, spec.window, device)
        each, tokens = spec.prefix_count // windows.count, torch.arange(grid[0] * grid[1], device=device)
        slots = each + windows.slots
        prefix = torch.arange(spec.prefix_count, device=device)
        self.prefix_rows = prefix // each * slots + prefix % each
        self.rows = windows.window[tokens] * slots + windows.slot[tokens] + each
        self.window = torch.arange(windows.count * slots, device=device) // slots  # of each key
        self.positions = None if spec.positions is None else spec.positions(grid).detach()

    def forward(self, patches: Tensor, index: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        spec = self.spec
        z = spec.embed(patches)
        if self.positions is not None:
            z = z + self.positions.index_select(0, index)
        assert spec.prefix is not None
        z = spec.norm_pre(torch.cat([spec.prefix(), z]))  # (p + r, D)
        rows, bias = torch.cat([self.prefix_rows, self.rows.index_select(0, index)]), None
        if spec.window:
            other = self.window.index_select(0, rows)[:, None] != self.window  # (p + r, keys)
            bias = other.to(z.dtype) * _NO_KEY
        new, outputs = [], []
        for i, (block, cache) in enumerate(zip(spec.blocks, caches, strict=True)):
            qkv = block.qkv(block.norm1(z))  # (p + r, 3, heads, d)
            new.append(qkv[:, 1:])
            cache = cache.clone()
            cache[rows] = new[-1]
            z = z + block.proj(_attend(qkv[:, 0], cache, bias if block.window else None))
            z = z + block.mlp(block.norm2(z))
            if i + 1 in spec.outputs:
                outputs.append(spec.norm(z))
        return *new, rows, self.last(torch.cat(outputs, 1))

    def described(self) -> Graph:
        """For export, with inputs for two tokens."""
        spec, keys = self.spec, len(self.window)
        caches = [torch.zeros(keys, 2, block.heads, spec.dim // block.heads) for block in spec.blocks]
        example = (torch.zeros(2, spec.shape.pixels), torch.arange(2), *caches)
        return Graph("backbone", self.eval(), example, ((0,), (0,), *[()] * len(caches)))


def _attend(q: Tensor, cache: Tensor, bias: Tensor | None) -> Tensor:
    """Queries `(r, heads, d)` to keys and values `(keys, 2, heads, d)`, `(r, D)`."""
    k, v = cache.permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, heads, keys, d) each
    o = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=bias)
    return o[0].transpose(0, 1).flatten(1)


def for_grid(spec: ViTSpec, grid: Grid) -> ViTSpec:
    """The ViT for frames of `grid` tokens alone: its positions are worked out now, and no part of a graph."""
    positions = None if spec.positions is None else spec.positions(grid).detach()
    fixed = dataclasses.replace(spec, positions=None if positions is None else lambda _: positions)
    assert fixed.prefix_count >= 0  # so that it is known, too
    return fixed
