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
from eventful_det.gating.anatomy import Anatomy, Block, Grid, resize_table
from eventful_det.gating.cost import Counts
from eventful_det.gating.policy import Focus, GateInput, JointPolicy, Policy, select_all
from eventful_det.gating.rows_blocks import Selection, joined, run_blocks
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
        caches: per block the keys and values `(windows, slots, 2, heads, d)`; slots of padded tokens hold the bias.
            The one window of a global block starts with the slots of the prefix tokens.
        output: `(N, C)` the last computed output of every token.
        positions: `(N, D)` position encoding at this grid, or None. Like the tables, it is worked out at a flush.
        tables: per block its relative positions at this grid, see `relative_terms`; or None.
    """

    layout: tuple[str, ...]
    grid: Grid
    frame: int
    reference: Tensor
    age: Tensor
    interest: Tensor
    caches: list[Tensor]
    output: Tensor
    positions: Tensor | None = None
    tables: list[Tensor | None] = field(default_factory=list)


@dataclass
class Rows:
    """One gate per frame.

    Args:
        policy: selects the tokens of a frame.
        gate: what is compared with the reference: pixel "patches", which saves the embedding of tokens that are
            not selected, or the patch "embedding".
        renew_every: recompute everything on every n-th frame; 0 = never.
        static: shapes depend on the number of selected tokens alone, and the host never waits for the device unless
            the policy does; it costs some empty attention tiles. None = on all devices but CPUs.
        cache_dtype: of cached keys and values, "float16" or "bfloat16", to halve most of the state; they are
            converted whenever they are read. None = that of the network, exact.
        exact: each stream has matrix products of its own, so that no bit of what it gives depends on which others share
            the step. Otherwise the rows of all streams pass through the linear layers together, which is quicker, and
            products of other sizes may round differently.
    """

    policy: Policy = Focus(2.0, cap=0.35, floor=0.25)
    gate: Literal["patches", "embedding"] = "patches"
    renew_every: int = 0
    static: bool | None = None
    cache_dtype: Literal["float16", "bfloat16"] | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.gate not in ("patches", "embedding"):
            raise UserError(f"Rows: gate must be 'patches' or 'embedding', got {self.gate!r}")
        if self.renew_every < 0:
            raise UserError(f"Rows: renew_every must be a number of frames, or 0 for never, got {self.renew_every}")
        if self.cache_dtype not in (None, "float16", "bfloat16"):
            raise UserError(f"Rows: cache_dtype must be 'float16', 'bfloat16' or None, got {self.cache_dtype!r}")

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return "rows", self.gate, self.cache_dtype or "same"

    def init_stream(self, anatomy: Anatomy, grid: Grid) -> RowsState:
        """Allocate the state of a stream whose frames have `grid` tokens."""
        tokens = grid[0] * grid[1]
        width = anatomy.projection.weight[0].numel() if self.gate == "patches" else anatomy.dim
        dtype = anatomy.dtype if self.cache_dtype is None else getattr(torch, self.cache_dtype)
        return RowsState(
            layout=self.layout,
            grid=grid,
            frame=0,
            reference=anatomy.projection.weight.new_zeros(tokens, width),
            age=torch.ones(tokens, dtype=torch.int32, device=anatomy.device),
            caches=[_empty_cache(block, grid, anatomy.prefix_count, dtype) for block in anatomy.blocks],
            interest=anatomy.projection.weight.new_zeros(tokens),
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
        gated = [not self._renews(state) for state in states]
        chosen = self._select(compared, states, joint)
        indices = [_by_window(anatomy, index, state.grid) for index, state in zip(chosen, states, strict=True)]
        counts = self._recompute(anatomy, compared, indices, states)
        return [
            Update(
                tokens=state.output.unflatten(0, state.grid),
                changed=index,
                work=torch.zeros(len(now), device=now.device).index_fill_(0, index, 1.0),
                flush=flush,
                counts=count + Counts(gate=gate * now.numel()),
            )
            for now, index, state, flush, gate, count in zip(
                compared, indices, states, flushes, gated, counts, strict=True
            )
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
                error=torch.linalg.vector_norm(now - state.reference, dim=1),
                age=state.age,
                frame=state.frame,
                stream=stream,
                grid=state.grid,
                interest=state.interest,
            )
            for stream, (now, state) in enumerate(zip(compared, states, strict=True))
        ]
        asked = [i for i, state in enumerate(states) if not self._renews(state)]
        indices = [select_all(gate) for gate in gates]
        some = [gates[i] for i in asked]
        for i, index in zip(asked, joint(some) if joint else map(self.policy, some), strict=True):
            indices[i] = index
        return indices

    def _recompute(
        self, anatomy: Anatomy, compared: Sequence[Tensor], indices: Sequence[Tensor], states: Sequence[RowsState]
    ) -> list[Counts]:
        """Recompute the tokens `(r,)` of each stream, updating its state; returns what each stream took."""
        rows = [now.index_select(0, index) for now, index in zip(compared, indices, strict=True)]
        for state in states:
            state.age.add_(1)
            state.frame += 1
        embedded = [len(some if self.gate == "patches" else all_) for some, all_ in zip(rows, compared, strict=True)]
        counts = [_embedding_counts(anatomy, *sizes) for sizes in zip(embedded, map(len, rows), strict=True)]
        busy = [i for i, index in enumerate(indices) if len(index)]
        for i in busy:
            states[i].reference.index_copy_(0, indices[i], rows[i])
            states[i].age.index_fill_(0, indices[i], 1)
        groups = [[i] for i in busy] if self.exact else [busy] if busy else []
        for group in groups:
            more = self._run(anatomy, [rows[i] for i in group], [indices[i] for i in group], [states[i] for i in group])
            for i, count in zip(group, more, strict=True):
                counts[i] += count
        return counts

    def _run(
        self, anatomy: Anatomy, rows: Sequence[Tensor], indices: Sequence[Tensor], states: Sequence[RowsState]
    ) -> list[Counts]:
        """Carry rows of some streams through the network together, updating their states; what each took."""
        z = joined(rows)
        z = anatomy.embed(z) if self.gate == "patches" else z
        if anatomy.positions is not None:
            z = z + joined([_positions(*stream) for stream in zip(states, indices, strict=True)])
        selections = [Selection(index, s.grid, s.caches, s.tables) for index, s in zip(indices, states, strict=True)]
        static = anatomy.device.type != "cpu" if self.static is None else self.static
        outputs, counts = run_blocks(anatomy, z, selections, static)
        for state, index, output in zip(states, indices, outputs, strict=True):
            state.output.index_copy_(0, index, output)
        return counts


def _by_window(anatomy: Anatomy, index: Tensor, grid: Grid) -> Tensor:
    """Tokens `(r,)` in the order of the windows, and row-major in each."""
    windows = windows_of(grid, max(block.window for block in anatomy.blocks), index.device)
    return windows.token.index_select(0, windows.place.index_select(0, index).sort().values)


def _positions(state: RowsState, index: Tensor) -> Tensor:
    """Position encoding of some tokens, `(r, D)`."""
    assert state.positions is not None
    return state.positions.index_select(0, index)


def _embedding_counts(anatomy: Anatomy, embedded: int, selected: int) -> Counts:
    """Operations of patch embedding and position encoding on so many tokens."""
    return Counts(
        linear=embedded * anatomy.projection.weight.numel(),
        bias=embedded * anatomy.dim,
        add=0 if anatomy.positions is None else selected * anatomy.dim,
    )


def _empty_cache(block: Block, grid: Grid, prefix: int, dtype: torch.dtype) -> Tensor:
    """Keys and values of a block, `(windows, slots, 2, heads, d)`."""
    windows = windows_of(grid, block.window, block.qkv.weight.device)
    shape = (windows.count, windows.slots + prefix, 2, block.heads, block.dim // block.heads)
    return block.qkv.weight.new_zeros(shape, dtype=dtype)


def _prepare(anatomy: Anatomy, state: RowsState) -> None:
    """What depends on the weights and the grid alone: positions, and the keys and values of padded tokens.

    Every slot is given those of a padded token; nothing else writes the slots of padded tokens.
    """
    state.positions = None if anatomy.positions is None else anatomy.positions(state.grid).detach().clone()
    state.tables = []
    for block, cache in zip(anatomy.blocks, state.caches, strict=True):
        cache.copy_(block.padding_qkv.view(3, block.heads, -1)[1:])
        shape = windows_of(state.grid, block.window, cache.device).shape
        both = zip(block.rel_pos or (), shape, strict=False)
        tables = [resize_table(table.detach(), size) for table, size in both]
        state.tables.append(torch.cat(tables) if tables else None)
