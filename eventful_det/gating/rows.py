"""The `rows` rule: one gate per frame, selected rows through all blocks, key and value caches.

Think of the key/value cache of a language model, made for video. Nothing inside the blocks touches the tokens
that were not selected, and nothing is N x N. With every token selected it equals the dense network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Block, Grid, relative_table
from eventful_det.gating.cost import Counts
from eventful_det.gating.policy import GateInput, Policy, Threshold, select_all
from eventful_det.gating.rows_attention import Queries, attend
from eventful_det.gating.state import TensorTree
from eventful_det.gating.update import Update
from eventful_det.gating.windows import windows_of


@dataclass
class RowsState(TensorTree):
    """State of one stream under `Rows`.

    Attributes:
        layout: of the rule that it was made for.
        grid: token grid (H, W), N = H * W.
        frame: frames since the last flush; 0 = the next frame is a flush.
        reference: `(N, P)` patches or `(N, D)` embeddings last let through.
        age: `(N,)` frames since each token was let through.
        keys, values: per block `(windows, slots, heads, d)`; slots of padded tokens hold the bias. The one
            window of a global block starts with the slots of the prefix tokens.
        output: `(N, C)` the last computed output of every token.
        positions: `(N, D)` position encoding at this grid, or None. Like the tables, it is worked out at a flush.
        tables: per block its relative positions at this grid, along y and x; empty without.
    """

    layout: tuple[str, ...]
    grid: Grid
    frame: int
    reference: Tensor
    age: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    output: Tensor
    positions: Tensor | None = None
    tables: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Rows:
    """One gate per frame.

    Args:
        policy: selects the tokens of a frame.
        gate: what is compared with the reference: pixel "patches", which saves the embedding of tokens that are
            not selected, or the patch "embedding".
        renew_every: recompute everything on every n-th frame; 0 = never.
    """

    policy: Policy = Threshold(2.0, cap=0.5, age_power=0.5)
    gate: Literal["patches", "embedding"] = "patches"
    renew_every: int = 0

    def __post_init__(self) -> None:
        if self.gate not in ("patches", "embedding"):
            raise UserError(f"Rows: gate must be 'patches' or 'embedding', got {self.gate!r}")
        if self.renew_every < 0:
            raise UserError(f"Rows: renew_every must be a number of frames, or 0 for never, got {self.renew_every}")

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return "rows", self.gate

    def init_stream(self, anatomy: Anatomy, grid: Grid) -> RowsState:
        """Allocate the state of a stream whose frames have `grid` tokens."""
        tokens = grid[0] * grid[1]
        width = anatomy.projection.weight[0].numel() if self.gate == "patches" else anatomy.dim
        caches = [_empty_cache(block, grid, anatomy.prefix_count) for block in anatomy.blocks]
        return RowsState(
            layout=self.layout,
            grid=grid,
            frame=0,
            reference=anatomy.projection.weight.new_zeros(tokens, width),
            age=torch.ones(tokens, dtype=torch.int32, device=anatomy.device),
            keys=[keys for keys, _ in caches],
            values=[values for _, values in caches],
            output=anatomy.projection.weight.new_zeros(tokens, anatomy.blocks[-1].dim),
        )

    @torch.no_grad()
    def step(self, anatomy: Anatomy, patches: Tensor, state: RowsState) -> Update:
        """Process the next frame of a stream.

        Args:
            anatomy: the network.
            patches: `(N, P)` pixel patches of the frame.
            state: updated in place.
        """
        flush = state.frame == 0
        renew = flush or (self.renew_every > 0 and state.frame % self.renew_every == 0)
        if flush:
            _prepare(anatomy, state)
        index, z, counts = self._select(anatomy, patches, state, renew)
        state.age += 1
        state.age[index] = 1
        state.frame += 1
        if index.numel():
            rows, more = _run_blocks(anatomy, z, index, state)
            state.output.index_copy_(0, index, rows)
            counts += more
        return Update(
            tokens=state.output.unflatten(0, state.grid).clone(),
            changed=index,
            work=torch.zeros(patches.shape[0], device=index.device).index_fill_(0, index, 1.0),
            flush=flush,
            counts=counts,
        )

    def _select(
        self, anatomy: Anatomy, patches: Tensor, state: RowsState, everything: bool
    ) -> tuple[Tensor, Tensor, Counts]:
        """The only decision of the frame: indices `(r,)` in window order, embedded rows `(r, D)`, counts."""
        tokens, rows, cols = patches.shape[0], *state.grid
        compared = patches if self.gate == "patches" else anatomy.embed(patches)
        counts = Counts() if everything else Counts(gate=compared.numel())
        error = torch.linalg.vector_norm(compared - state.reference, dim=1)
        policy = select_all if everything else self.policy
        index = policy(GateInput(error, state.age, state.frame))
        side = max(block.window for block in anatomy.blocks)
        index = index[windows_of((rows, cols), side, patches.device).window[index].argsort(stable=True)]
        state.reference.index_copy_(0, index, compared[index])
        z = anatomy.embed(patches[index]) if self.gate == "patches" else compared[index]
        if state.positions is not None:
            z = z + state.positions[index]
            counts += Counts(add=z.numel())
        embedded = index.numel() if self.gate == "patches" else tokens
        weight = anatomy.projection.weight
        return index, z, counts + Counts(linear=embedded * weight.numel(), bias=embedded * anatomy.dim)


def _empty_cache(block: Block, grid: Grid, prefix: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a block, `(windows, slots, heads, d)`."""
    windows = windows_of(grid, block.window, block.qkv.weight.device)
    shape = (windows.count, windows.slots + prefix, block.heads, block.dim // block.heads)
    return block.qkv.weight.new_zeros(shape), block.qkv.weight.new_zeros(shape)


def _prepare(anatomy: Anatomy, state: RowsState) -> None:
    """What depends on the weights and the grid alone: positions, and the keys and values of padded tokens.

    Every slot is given those of a padded token; nothing else writes the slots of padded tokens.
    """
    state.positions = None if anatomy.positions is None else anatomy.positions(state.grid).detach().clone()
    state.tables = []
    for block, keys, values in zip(anatomy.blocks, state.keys, state.values, strict=True):
        _, k, v = block.padding_qkv.view(3, block.heads, -1)
        keys.copy_(k)
        values.copy_(v)
        shape = windows_of(state.grid, block.window, keys.device).shape
        both = zip(block.rel_pos or (), shape, strict=False)
        state.tables.append([relative_table(table.detach(), size) for table, size in both])


def _run_blocks(anatomy: Anatomy, z: Tensor, index: Tensor, state: RowsState) -> tuple[Tensor, Counts]:
    """Carry the selected rows `(r, D)` through all blocks; returns their outputs `(r, C)`."""
    prefix = anatomy.prefix_count
    if anatomy.prefix is not None:
        z = torch.cat([anatomy.prefix(), z])
    sides = {block.window for block in anatomy.blocks}
    queries = {side: Queries.of(index, state.grid, side, prefix) for side in sides}
    counts = Counts()
    for block, keys, values, tables in zip(anatomy.blocks, state.keys, state.values, state.tables, strict=True):
        relative = (tables[0], tables[1]) if tables else None
        x, attention = attend(block, block.qkv(block.norm1(z)), keys, values, queries[block.window], relative)
        z = z + block.project(x)
        z = z + block.mlp(block.norm2(z))
        counts += attention + _linear_counts(block, z.shape[0])
    return anatomy.norm(z[prefix:]), counts


def _linear_counts(block: Block, rows: int) -> Counts:
    layers = (block.qkv, block.proj, block.fc1, block.fc2)
    return Counts(
        linear=rows * sum(layer.weight.numel() for layer in layers),
        bias=rows * sum(layer.out_features for layer in layers if layer.bias is not None),
        add=2 * rows * block.dim,
    )
