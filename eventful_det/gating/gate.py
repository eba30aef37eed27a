"""The gate of a frame: what it remembers of a stream, and the tokens that it lets through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.gating.comparison import Comparison
from eventful_det.gating.macs import Macs
from eventful_det.gating.selector import GateInput, Select
from eventful_det.gating.state import StreamState, Update


@dataclass
class GatedState(StreamState):
    """State of one stream under a rule with one gate per frame.

    Attributes:
        reference: `(N, P)` patches or `(N, D)` embeddings last let through.
        age: `(N,)` frames since each token was let through.
        caches: keys and values of blocks, in the form of the rule.
        output: `(N, C)` the last computed output of every token.
        prefix: `(p, C)` the same of the prefix tokens, or None.
    """

    reference: Tensor
    age: Tensor
    caches: list[Tensor]
    output: Tensor
    prefix: Tensor | None = None

    def let_through(self, index: Tensor, rows: Tensor) -> None:
        """Take in the tokens `(r,)` of a frame: what is compared of them, `(r, P or D)`, becomes their reference."""
        self.frame += 1
        self.age.add_(1).index_fill_(0, index, 1)
        self.reference.index_copy_(0, index, rows.to(self.reference.dtype))

    def update(self, index: Tensor, flush: bool, macs: Macs) -> Update:
        """What a frame hands on whose tokens `(r,)` were recomputed."""
        work = torch.zeros(len(self.age), device=self.age.device).index_fill_(0, index, 1.0)
        return Update(self.output.unflatten(0, self.grid), self.prefix, index, work, flush, macs)


def select_tokens(
    compare: Callable[[Tensor, Tensor], Comparison],
    compared: Sequence[Tensor],
    states: Sequence[GatedState],
    full: Sequence[bool],
    select: Select,
    saliency: Sequence[Tensor | None],
) -> dict[int, Tensor]:
    """The only decision of a frame: the tokens `(r,)` of each stream that is not recomputed in full.

    Args:
        compare: tokens and their reference, see `comparison.compare`.
        compared: `(N, P)` tokens of each stream.
        states: of the streams; their references take on the light of the frame.
        full: streams that are recomputed in full.
        select: selects the tokens.
        saliency: `(N,)` of each stream, see `GateInput`; or None.
    """
    gates = []
    for stream, (now, state, weight) in enumerate(zip(compared, states, saliency, strict=True)):
        if not full[stream]:
            error, noise = compare(now, state.reference)
            gates.append(GateInput(error, state.age, state.frame, state.grid, weight, stream, noise))
    return dict(zip([gate.stream for gate in gates], select(gates) if gates else (), strict=True))
