"""Section 4.1: a gate before a token-wise operation, and a buffer behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.gating.selector import GateInput, Select, token_errors
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


def open_gate(state: GateState, x: Tensor, select: Select, frame: int, stgt: bool, keep: int = 0) -> Tensor:
    """Let some tokens through.

    Args:
        state: its reference is updated in place.
        x: `(L, D)` tokens before the operation.
        select: chooses by the norm of the error, the token minus its reference; asked unless the frame is a flush.
        frame: frames since the last flush; 0 = all tokens pass.
        stgt: whether the reference of all tokens is replaced, as in STGT, instead of that of the selected ones.
        keep: the first so many tokens pass in any case, beside those selected.

    Returns:
        Their indices `(r,)`, ascending.
    """
    index = torch.arange(len(x), device=x.device)
    if frame:
        ages = torch.ones_like(index, dtype=torch.int32)
        (chosen,) = select([GateInput(token_errors(x, state.reference), ages, frame)])
        index = torch.cat([index[:keep], chosen[chosen >= keep].sort().values])
    if stgt:
        state.reference.copy_(x)
    else:
        state.reference.index_copy_(0, index, x.index_select(0, index))
    return index
