"""The paper's rule: gates, buffers and incremental products in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.macs import Ablation, PaperSizes, paper_macs
from eventful_det.gating.paper.attention import ProductState, attend_frame, attend_windows, init_products
from eventful_det.gating.paper.gates import GateState, gated
from eventful_det.gating.selector import GateInput, Select
from eventful_det.gating.spec import Block, ViTSpec
from eventful_det.gating.state import StreamState, TensorTree, Update
from eventful_det.gating.windows import Grid
from eventful_det.options import Count, Natural, convert_fields


@dataclass
class PaperBlockState(TensorTree):
    """State of one block.

    Attributes:
        qkv, proj, mlp: its three gated operations.
        products: what is remembered of the attention of a global block; None in windowed blocks, or if nothing is.
    """

    qkv: GateState
    proj: GateState
    mlp: GateState
    products: ProductState | None


@dataclass
class PaperState(StreamState):
    """State of one stream under `Paper`.

    Attributes:
        blocks: one per block.
        output: `(N, C)` the token map of the last frame.
        positions: `(N, D)` position encoding, taken from the network at a flush, or None.
    """

    blocks: list[PaperBlockState]
    output: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Paper:
    """Gates before qkv, output projection and MLP of every block; L = prefix tokens + N tokens.

    The selector is asked at every gate. Prefix tokens are gated like the others, unless they are kept. Gates remember
    no ages and know no saliency. Windowed blocks compute their attention in full, from the buffered q, k and v.

    Args:
        ablation: what is incremental in global blocks: token-wise operations alone ("tokenwise"), also QK^T
            ("qk"), also A.V ("full").
        pool: average keys and values over cells of `pool` x `pool` tokens in global blocks; 1 = do not.
        gate_before_norm: gate before the layer norms instead of after them (before qkv and MLP).
        stgt: replace the reference of all tokens on every frame, as STGT does, instead of the selected ones'.
        keep: so many prefix tokens pass every gate, beside those selected; 0 = as in the paper.
    """

    ablation: Ablation = "full"
    pool: Count = 1
    gate_before_norm: bool = False
    stgt: bool = False
    keep: Natural = 0

    def __post_init__(self) -> None:
        convert_fields(self, "Paper")

    @property
    def layout(self) -> tuple[str | int, ...]:
        """What the form of the state depends on."""
        return "paper", self.ablation, self.pool, self.gate_before_norm

    def init_stream(self, vit: ViTSpec, grid: Grid) -> PaperState:
        """Allocate the state of a stream whose frames have `grid` tokens.

        Raises:
            UserError: keys cannot be pooled on this grid, or beside prefix tokens.
        """
        vit.require_plain("the paper's rule")
        return self.init_tokens(vit.blocks, grid, vit.prefix_count)

    def init_tokens(self, blocks: Sequence[Block], grid: Grid, prefix: int = 0) -> PaperState:
        """Allocate the state for some blocks alone; see `step_tokens`."""
        if self.pool > 1 and prefix:
            raise UserError(f"Paper: pool={self.pool} needs a network without class or register tokens; use pool=1")
        if grid[0] % self.pool or grid[1] % self.pool:
            raise UserError(
                f"Paper: a grid of {grid[0]} x {grid[1]} tokens is not divisible by pool={self.pool}; "
                f"pad the frame or use pool=1"
            )
        return PaperState(
            self.layout,
            grid,
            blocks=[self._init_block(block, prefix + grid[0] * grid[1]) for block in blocks],
            output=blocks[-1].weight.new_zeros(grid[0] * grid[1], blocks[-1].dim),
        )

    def _init_block(self, block: Block, length: int) -> PaperBlockState:
        dim, zeros = block.dim, block.weight.new_zeros
        qkv, proj, mlp = (GateState(zeros(length, dim), zeros(length, out)) for out in (3 * dim, dim, dim))
        keys = length // self.pool**2
        products = None if block.window else init_products(block, length, keys, self.ablation)
        return PaperBlockState(qkv, proj, mlp, products)

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[PaperState],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame `(3, h, w)` of every stream; `saliency` is not used."""
        return [self._step_stream(vit, frame, state, select) for frame, state in zip(frames, states, strict=True)]

    def _step_stream(self, vit: ViTSpec, frame: Tensor, state: PaperState, select: Select) -> Update:
        flush = state.frame == 0
        x = vit.embed(vit.patches(frame))  # (N, D)
        if flush:
            state.positions = None if vit.positions is None else vit.positions(state.grid).detach().clone()
        x = x if state.positions is None else x + state.positions
        x = vit.norm_pre(x if vit.prefix is None else torch.cat([vit.prefix(), x]))  # (L, D)
        x, work, sizes = self.step_tokens(vit.blocks, x, state, select)
        prefix, tokens = vit.norm(x).to(state.output.dtype).tensor_split([vit.prefix_count])
        differs = (tokens != state.output).any(1) | flush
        state.output.copy_(tokens)
        return Update(
            tokens=tokens.unflatten(0, state.grid),
            prefix=prefix if vit.prefix_count else None,
            changed=differs.nonzero().squeeze(1),
            work=work[vit.prefix_count :],
            flush=flush,
            macs=paper_macs(vit.shape, state.grid, sizes, self.ablation, self.pool, flush),
        )

    def step_tokens(
        self, blocks: Sequence[Block], x: Tensor, state: PaperState, select: Select
    ) -> tuple[Tensor, Tensor, tuple[PaperSizes, ...]]:
        """Carry embedded tokens through the blocks.

        Args:
            blocks: those that `state` was allocated for.
            x: `(L, D)` tokens after the patch embedding and the position encoding.
            state: updated in place, but for `output`.
            select: selects the tokens at every gate.

        Returns:
            The tokens `(L, D)` after the last block; `(L,)` the share of its token-wise work that each had done;
            what was done in each block.
        """
        work, sizes = torch.zeros(len(x), device=x.device), []
        select = partial(_keeping, select, self.keep) if self.keep else select
        for block, block_state in zip(blocks, state.blocks, strict=True):
            x, refreshed, cells = self._step_block(block, x, block_state, state, select)
            for index, weights in zip(refreshed, block.weights, strict=True):
                work[index] += weights
            qkv, proj, mlp = map(len, refreshed)
            sizes.append(PaperSizes(qkv, proj, mlp, cells))
        state.frame += 1
        return x, work / sum(sum(block.weights) for block in blocks), tuple(sizes)

    def _step_block(
        self, block: Block, x: Tensor, state: PaperBlockState, stream: PaperState, select: Select
    ) -> tuple[Tensor, list[Tensor], int]:
        """One block on `x (L, D)`; also the tokens refreshed at its three gates, and the number of refreshed keys."""
        gate = partial(gated, select=select, frame=stream.frame, norm_behind=self.gate_before_norm, stgt=self.stgt)
        qkv = gate(state.qkv, x, block.qkv, block.norm1)
        if block.window:
            attended, cells = attend_windows(block, state.qkv.buffer, stream.grid), 0
        else:
            attended, cells = attend_frame(
                block, state.qkv.buffer, state.products, qkv, stream.grid, self.pool, flush=stream.frame == 0
            )
        proj = gate(state.proj, attended, block.proj, None)
        x = x + state.proj.buffer
        mlp = gate(state.mlp, x, block.mlp, block.norm2)
        return x + state.mlp.buffer, [qkv, proj, mlp], cells


def _keeping(select: Select, count: int, gates: Sequence[GateInput]) -> list[Tensor]:
    """What is selected, and the first `count` tokens with it."""
    first = torch.arange(count, device=gates[0].error.device)
    return [torch.cat([first, chosen[chosen >= count]]) for chosen in select(gates)]
