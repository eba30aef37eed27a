"""The `rows` rule: one gate per frame, selected rows through all blocks, key and value caches.

Think of the key/value cache of a language model, made for video. Nothing inside the blocks touches the tokens
that were not selected, and nothing is N x N. With every token selected it equals the dense network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Block, Grid, relative_table
from eventful_det.gating.cost import Counts
from eventful_det.gating.policy import Focus, GateInput, JointPolicy, Policy, select_all
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
        interest: `(N,)` how much each token matters on the next frame, 0 to 1: for the policy, and filled in by
            whoever reads the tokens.
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
    interest: Tensor
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

    policy: Policy = Focus(2.0, cap=0.4)
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
            interest=anatomy.projection.weight.new_zeros(tokens),
            keys=[keys for keys, _ in caches],
            values=[values for _, values in caches],
            output=anatomy.projection.weight.new_zeros(tokens, anatomy.blocks[-1].dim),
        )

    @torch.no_grad()
    def step(
        self, anatomy: Anatomy, patches: Sequence[Tensor], states: Sequence[RowsState], joint: JointPolicy | None = None
    ) -> list[Update]:
        """Process the next frame of every stream.

        Args:
            anatomy: the network.
            patches: `(N, P)` pixel patches of each stream's frame.
            states: of the streams, updated in place.
            joint: selects the tokens of all streams together; by default each stream is asked about alone.
        """
        flushes = [state.frame == 0 for state in states]
        for state, flush in zip(states, flushes, strict=True):
            if flush:
                _prepare(anatomy, state)
        compared = [frame if self.gate == "patches" else anatomy.embed(frame) for frame in patches]
        indices = self._select(compared, states, joint)
        return [
            self._update(anatomy, frame, index, state, flush)
            for frame, index, state, flush in zip(compared, indices, states, flushes, strict=True)
        ]

    def _renews(self, state: RowsState) -> bool:
        """Whether everything is recomputed on this frame."""
        return state.frame == 0 or (self.renew_every > 0 and state.frame % self.renew_every == 0)

    def _select(
        self, compared: Sequence[Tensor], states: Sequence[RowsState], joint: JointPolicy | None
    ) -> list[Tensor]:
        """The only decision of the frame: for each stream the indices `(r,)` of its tokens, in any order."""
        gates = [
            GateInput(
                torch.linalg.vector_norm(now - state.reference, dim=1),
                state.age,
                state.frame,
                state.grid,
                state.interest,
            )
            for now, state in zip(compared, states, strict=True)
        ]
        asked = [i for i, state in enumerate(states) if not self._renews(state)]
        indices = [select_all(gate) for gate in gates]
        some = [gates[i] for i in asked]
        for i, index in zip(asked, joint(some) if joint else map(self.policy, some), strict=True):
            indices[i] = index
        return indices

    def _update(self, anatomy: Anatomy, compared: Tensor, index: Tensor, state: RowsState, flush: bool) -> Update:
        """Recompute the tokens `(r,)` of one stream."""
        counts = Counts() if self._renews(state) else Counts(gate=compared.numel())
        side = max(block.window for block in anatomy.blocks)
        index = index[windows_of(state.grid, side, index.device).window[index].argsort(stable=True)]
        state.reference.index_copy_(0, index, compared[index])
        z, more = self._embed(anatomy, compared, index, state)
        counts += more
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
            work=torch.zeros(compared.shape[0], device=index.device).index_fill_(0, index, 1.0),
            flush=flush,
            counts=counts,
        )

    def _embed(self, anatomy: Anatomy, compared: Tensor, index: Tensor, state: RowsState) -> tuple[Tensor, Counts]:
        """Embedded rows `(r, D)` with their positions, and what they took."""
        weight = anatomy.projection.weight
        z = anatomy.embed(compared[index]) if self.gate == "patches" else compared[index]
        embedded = index.numel() if self.gate == "patches" else compared.shape[0]
        counts = Counts(linear=embedded * weight.numel(), bias=embedded * anatomy.dim)
        if state.positions is not None:
            z = z + state.positions[index]
            counts += Counts(add=z.numel())
        return z, counts


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
