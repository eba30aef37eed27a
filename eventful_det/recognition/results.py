"""What a recogniser gives for a tubelet, what that cost, and what it remembers of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from eventful_det.gating.state import StreamState, TensorTree


@dataclass
class RecogniserStream(TensorTree):
    """What is remembered of one stream.

    Attributes:
        spatial: of the spatial model.
        window: `(T', D)` its last outputs, oldest first; the first `seen` rows count until it is full.
        seen: outputs since the stream began, at most T'.
    """

    spatial: StreamState | None
    window: Tensor
    seen: int


@dataclass(frozen=True)
class StepCost:
    """What one step cost.

    Attributes:
        macs: multiply-adds by part: "backbone" (the spatial model), "temporal" and "heads".
        dense: what the dense recogniser would have spent, by part.
        recomputed: patch tokens recomputed.
        tokens: patch tokens of a tubelet.
        flush: whether everything was recomputed because the stream began anew.
        seconds: time of each part; empty when not measured.
    """

    macs: dict[str, int]
    dense: dict[str, int]
    recomputed: int
    tokens: int
    flush: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            {part: macs + other.macs[part] for part, macs in self.macs.items()},
            {part: macs + other.dense[part] for part, macs in self.dense.items()},
            self.recomputed + other.recomputed,
            self.tokens + other.tokens,
            self.flush or other.flush,
        )

    @property
    def total(self) -> int:
        """Multiply-adds of the whole recogniser."""
        return sum(self.macs.values())

    @property
    def dense_total(self) -> int:
        """Multiply-adds of the whole dense recogniser."""
        return sum(self.dense.values())


@dataclass(frozen=True)
class RecognitionStep:
    """One step of one stream.

    Attributes:
        logits: of each head, `(classes,)`, over the window of spatial outputs that ends with this step.
        feature: `(D,)` spatial output of the tubelet.
        cost: of this step.
        work: `(H, W)` share of its token-wise work that each token had done, 0 to 1.
    """

    logits: dict[str, Tensor]
    feature: Tensor
    cost: StepCost
    work: Tensor

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """Of each head, `(classes,)`; they sum to 1."""
        return {head: logits.float().softmax(-1) for head, logits in self.logits.items()}
