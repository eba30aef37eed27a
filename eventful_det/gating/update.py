"""What a gated backbone hands on for one frame of one stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eventful_det.gating.macs import Macs


@dataclass(frozen=True)
class Update:
    """The token map of a frame and what changed in it.

    Attributes:
        tokens: `(H, W, C)` the full map. `EventfulViT.step` gives a copy; a rule, its own buffer, valid until the
            stream's next step and not to be written. The same holds for `prefix`.
        prefix: `(p, C)` class and register tokens, recomputed whenever a token is; None = the network has none.
        changed: `(r,)` flat indices of the tokens whose value may differ from the last frame's.
        work: `(N,)` share of its token-wise work that each token had done, 0 to 1.
        flush: whether everything was recomputed because the stream began anew.
        macs: what it took.
    """

    tokens: Tensor
    prefix: Tensor | None
    changed: Tensor
    work: Tensor
    flush: bool
    macs: Macs
