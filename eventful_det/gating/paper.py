"""The paper's rule, block by block: token gates, token buffers, QK^T buffer, A.V accumulation (section 4).

Kept for reproduction and for its ablations; the default rule is `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Block, Grid
from eventful_det.gating.cost import Counts
from eventful_det.gating.paper_attention import attend_frame, attend_windows
from eventful_det.gating.paper_products import Mixture, Products, empty_mixture, empty_products
from eventful_det.gating.policy import GateInput, JointPolicy, Policy, TopFraction
from eventful_det.gating.state import TensorTree
from eventful_det.gating.update import Update
from eventful_det.gating.windows import windows_of

Ablation = Literal["full", "tokenwise", "qk"]


@dataclass
class PaperGateState(TensorTree):
    """A gate and the buffer of the token-wise operation behind it.

    Attributes:
        reference: `(L, D)` every token as last let through.
        buffer: `(slots, out)` the operation's last result for every token; of qkv in windowed blocks in window
            order with slots for padded tokens, else `slots = L`.
    """

    reference: Tensor
    buffer: Tensor


@dataclass
class PaperBlockState(TensorTree):
    """State of one block.

    Attributes:
        qkv, proj, mlp: its three gated operations.
        attended: `(N, D)` the last attention output of every token of a windowed block, None in global ones.
        products: what is remembered of the attention of a global block, or None.
    """

    qkv: PaperGateState
    proj: PaperGateState
    mlp: PaperGateState
    attended: Tensor | None
    products: Products | Mixture | None


@dataclass
class PaperState(TensorTree):
    """State of one stream under `Paper`.

    Attributes:
        layout: of the rule that it was made for.
        grid: token grid (H, W), N = H * W.
        frame: frames since the last flush; 0 = the next frame is a flush.
        blocks: one per block.
        output: `(N, C)` the token map of the last frame.
        positions: `(N, D)` position encoding, taken from the network at a flush, or None.
    """

    layout: tuple[str | int, ...]
    grid: Grid
    frame: int
    blocks: list[PaperBlockState]
    output: Tensor
    positions: Tensor | None = None


@dataclass
class Paper:
    """Gates before qkv, output projection and MLP of every block; L = prefix tokens + N tokens.

    Windowed blocks recompute the attention of every window that holds a refreshed token in full, from the buffered
    q, k and v. Prefix tokens are gated like the others. Gates remember no ages: `GateInput.age` is all ones.

    Results are those of the official code; see `Counts.spared` for what is not computed on the way there.

    Args:
        policy: selects tokens, by the same rule at every gate.
        ablation: what is incremental in global blocks: token-wise operations alone ("tokenwise"), also QK^T
            ("qk"), also A.V ("full").
        pool: average keys and values over cells of `pool` x `pool` tokens in global blocks; 1 = do not.
        gate_before_norm: gate before the layer norms instead of after them (before qkv and MLP).
        stgt: replace the reference of all tokens on every frame, as STGT does, instead of the selected ones'.
    """

    policy: Policy = TopFraction(0.25)
    ablation: Ablation = "full"
    pool: int = 1
    gate_before_norm: bool = False
    stgt: bool = False

    def __post_init__(self) -> None:
        if self.ablation not in ("full", "tokenwise", "qk"):
            raise UserError(f"Paper: ablation must be 'full', 'tokenwise' or 'qk', got {self.ablation!r}")
        if self.pool < 1:
            raise UserError(f"Paper: pool must be 1 (no pooling) or more tokens, got {self.pool}")

    @property
    def layout(self) -> tuple[str | int, ...]:
        """What the form of the state depends on."""
        return "paper", self.ablation, self.pool, self.gate_before_norm

    def init_stream(self, anatomy: Anatomy, grid: Grid) -> PaperState:
        """Allocate the state of a stream whose frames have `grid` tokens.

        Raises:
            UserError: keys cannot be pooled on this grid, or beside prefix tokens.
        """
        return self.init_tokens(anatomy.blocks, grid, anatomy.prefix_count)

    def init_tokens(self, blocks: Sequence[Block], grid: Grid, prefix: int = 0) -> PaperState:
        """Allocate the state for some blocks alone; see `step_tokens`."""
        if self.pool > 1 and prefix:
            raise UserError(f"Paper: pool={self.pool} needs a network without class or register tokens; use pool=1")
        if grid[0] % self.pool or grid[1] % self.pool:
            raise UserError(
                f"Paper: a grid of {grid[0]} x {grid[1]} tokens is not divisible by pool={self.pool}; "
                f"pad the frame or use pool=1"
            )
        weight = blocks[-1].qkv.weight
        return PaperState(
            layout=self.layout,
            grid=grid,
            frame=0,
            blocks=[self._init_block(block, grid, prefix) for block in blocks],
            output=weight.new_zeros(grid[0] * grid[1], blocks[-1].dim),
        )

    @torch.no_grad()
    def step(
        self,
        anatomy: Anatomy,
        patches: Sequence[Tensor],
        states: Sequence[PaperState],
        joint: JointPolicy | None = None,
    ) -> list[Update]:
        """Process the next frame of every stream.

        Args:
            anatomy: the network.
            patches: `(N, P)` pixel patches of each stream's frame.
            states: of the streams, updated in place.
            joint: not supported by this rule, which decides at every gate of every block.

        Raises:
            UserError: a joint policy is given.
        """
        if joint is not None:
            raise UserError("the paper rule decides gate by gate; streams can share a budget under the rows rule only")
        return [self._step_stream(anatomy, *pair) for pair in zip(patches, states, strict=True)]

    def _step_stream(self, anatomy: Anatomy, patches: Tensor, state: PaperState) -> Update:
        """The next frame of one stream."""
        flush = state.frame == 0
        x = anatomy.embed(patches)
        counts = Counts(linear=x.numel() * patches.shape[1], bias=x.numel())
        if flush:
            state.positions = None if anatomy.positions is None else anatomy.positions(state.grid).detach().clone()
        if state.positions is not None:
            x = x.add_(state.positions)
            counts += Counts(add=x.numel())
        if anatomy.prefix is not None:
            x = torch.cat([anatomy.prefix(), x])
        tokens = patches.shape[0]
        x, work, block_counts = self.step_tokens(anatomy.blocks, x, state)
        x = anatomy.norm(x[-tokens:])
        differs = (x != state.output).any(1) | flush
        state.output.copy_(x)
        return Update(
            tokens=x.unflatten(0, state.grid),
            changed=differs.nonzero().squeeze(1),
            work=work[-tokens:],
            flush=flush,
            counts=counts + block_counts,
        )

    @torch.no_grad()
    def step_tokens(self, blocks: Sequence[Block], x: Tensor, state: PaperState) -> tuple[Tensor, Tensor, Counts]:
        """Carry embedded tokens through the blocks.

        Args:
            blocks: those that `state` was allocated for.
            x: `(L, D)` tokens after the patch embedding and the position encoding.
            state: updated in place, but for `output`.

        Returns:
            The tokens `(L, D)` after the last block; `(L,)` the share of its token-wise work that each had done;
            the operations that ran.
        """
        x, work, counts = x.clone(), torch.zeros(len(x), device=x.device), Counts()
        for block, block_state in zip(blocks, state.blocks, strict=True):
            counts += self._step_block(block, x, block_state, state.grid, state.frame, work)
        state.frame += 1
        return x, work / sum(part.size for block in blocks for part in _operations(block, state.grid)), counts

    def _step_block(
        self, block: Block, x: Tensor, state: PaperBlockState, grid: Grid, frame: int, work: Tensor
    ) -> Counts:
        """One block on `x (L, D)`, in place; adds to `work (L,)` the multiply-adds of linear layers on each token."""
        if frame == 0:  # presets the slots of padded tokens, which nothing else writes
            state.qkv.buffer.copy_(block.padding_qkv.expand_as(state.qkv.buffer))
        qkv, proj, mlp = _operations(block, grid)
        index, qkv_counts = self._refresh(qkv, state.qkv, x, frame, work)
        if state.attended is not None:
            attended = state.attended
            attention_counts = attend_windows(block, state.qkv.buffer, attended, index, grid)
        else:
            attended, attention_counts = attend_frame(
                block, state.qkv.buffer, state.products, index, grid, self.pool, flush=frame == 0
            )
        _, proj_counts = self._refresh(proj, state.proj, attended, frame, work)
        x.add_(state.proj.buffer)
        _, mlp_counts = self._refresh(mlp, state.mlp, x, frame, work)
        x.add_(state.mlp.buffer)
        return qkv_counts + attention_counts + proj_counts + mlp_counts + Counts(add=2 * x.numel())

    def _refresh(
        self, operation: Operation, state: PaperGateState, x: Tensor, frame: int, work: Tensor
    ) -> tuple[Tensor, Counts]:
        """Select tokens of `x (L, D)`, recompute and buffer the operation on them; returns their indices `(r,)`."""
        compared = x if self.gate_before_norm else operation.norm(x)
        if frame == 0:
            index, counts = torch.arange(len(x), device=x.device), Counts()
        else:
            error = torch.linalg.vector_norm(compared - state.reference, dim=1)
            age = torch.ones(len(x), dtype=torch.int32, device=x.device)
            index = self.policy(GateInput(error, age, frame)).sort().values  # neighbours in memory one after another
            counts = Counts(gate=state.reference.numel())
        rows = compared.index_select(0, index)
        if self.stgt:
            state.reference.copy_(compared)
        else:
            state.reference.index_copy_(0, index, rows)
        result = operation.apply(operation.norm(rows) if self.gate_before_norm else rows)
        slots = index if operation.slots is None else operation.slots.index_select(0, index)
        state.buffer.index_copy_(0, slots, result)
        work[index] += operation.size
        return index, counts + operation.counts(len(index))

    def _init_block(self, block: Block, grid: Grid, prefix: int) -> PaperBlockState:
        tokens, dim = prefix + grid[0] * grid[1], block.dim
        windows = windows_of(grid, block.window, block.qkv.weight.device)
        zeros = block.qkv.weight.new_zeros
        slots = windows.count * windows.slots if block.window else tokens
        products: Products | Mixture | None = None
        if not block.window and self.ablation != "tokenwise":
            empty = empty_mixture if self.ablation == "full" else empty_products
            sides = () if block.rel_pos is None else (grid[0] // self.pool, grid[1] // self.pool)
            keys, width = tokens // self.pool**2, dim // block.heads
            products = empty(block.qkv.weight, block.heads, tokens, keys, width, sides)
        return PaperBlockState(
            qkv=PaperGateState(zeros(tokens, dim), zeros(slots, 3 * dim)),
            proj=PaperGateState(zeros(tokens, dim), zeros(tokens, dim)),
            mlp=PaperGateState(zeros(tokens, dim), zeros(tokens, dim)),
            attended=zeros(tokens, dim) if block.window else None,
            products=products,
        )


@dataclass(frozen=True)
class Operation:
    """A token-wise operation behind a gate.

    Attributes:
        norm: before the gate (after it with `gate_before_norm`).
        apply: the operation, `(r, D) -> (r, out)`.
        layers: the linear layers in it.
        slots: `(N,)` where each token's result lies in the buffer; None = in order.
    """

    norm: nn.Module
    apply: Callable[[Tensor], Tensor]
    layers: tuple[nn.Linear, ...]
    slots: Tensor | None = None

    @property
    def size(self) -> int:
        """Multiply-adds per token."""
        return sum(layer.weight.numel() for layer in self.layers)

    def counts(self, tokens: int) -> Counts:
        """Operations on some tokens."""
        biases = sum(layer.out_features for layer in self.layers if layer.bias is not None)
        return Counts(linear=tokens * self.size, bias=tokens * biases)


def _operations(block: Block, grid: Grid) -> tuple[Operation, Operation, Operation]:
    """qkv, output projection and MLP of a block."""
    slots = None
    if block.window:
        windows = windows_of(grid, block.window, block.qkv.weight.device)
        slots = windows.window * windows.slots + windows.slot
    return (
        Operation(block.norm1, block.qkv, (block.qkv,), slots),
        Operation(nn.Identity(), block.project, (block.proj,)),
        Operation(block.norm2, block.mlp, (block.fc1, block.fc2)),
    )
