"""Section 4.1: a gate before a token-wise operation, and a buffer behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eventful_det.gating.comparison import token_errors
from eventful_det.gating.selector import GateInput, Select
from eventful_det.gating.state import TensorTree


@dataclass
class GateState(TensorTree):
    """A gate and the buffer of the operation behind it; L = prefix tokens + N tokens.

    Attributes:
        reference: `(L, D)` every token as last let through: u in the paper.
        buffer: `(L, out)` the operation's last result for every token.
    """

    reference: Tensor
    buffer: Tensor


def gated(
    state: GateState,
    x: Tensor,
    operation: Callable[[Tensor], Tensor],
    norm: nn.Module | None,
    select: Select,
    frame: int,
    norm_behind: bool,
    stgt: bool,
) -> Tensor:
    """A gate, the operation on the tokens that it lets through, and the buffer of all results.

    Args:
        state: updated in place.
        x: `(L, D)` all tokens.
        operation: `(r, D) -> (r, ...)`.
        norm: before the operation, or None.
        select: chooses by the norm of the error, the token minus its reference; asked unless the frame is a flush.
        frame: frames since the last flush; 0 = all tokens pass.
        norm_behind: whether the norm comes behind the gate and not before it.
        stgt: whether the reference of all tokens is replaced, as in STGT, instead of that of the selected ones.

    Returns:
        Indices `(r,)` of the refreshed tokens, ascending.
    """
    x = x if norm is None or norm_behind else norm(x)
    index = torch.arange(len(x), device=x.device)
    if frame:
        ages = torch.ones_like(index, dtype=torch.int32)
        (chosen,) = select([GateInput(token_errors(x, state.reference), ages, frame)])
        index = chosen.sort().values
    rows = x.index_select(0, index)  # (r, D)
    if stgt:
        state.reference.copy_(x)
    else:
        state.reference.index_copy_(0, index, rows.to(state.reference.dtype))
    result = operation(norm(rows) if norm is not None and norm_behind else rows).flatten(1)  # (r, out)
    state.buffer.index_copy_(0, index, result.to(state.buffer.dtype))
    return index
