"""What a recogniser gives for a tubelet, what that cost, and what it remembers of a stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eventful_det.detectors.results import FrameCost
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


class StepCost(FrameCost):
    """What one step cost, or several: "backbone" is the spatial model, beside it "temporal" and "heads"."""

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            {part: macs + other.macs[part] for part, macs in self.macs.items()},
            {part: macs + other.dense[part] for part, macs in self.dense.items()},
            self.recomputed + other.recomputed,
            self.tokens + other.tokens,
            self.flush or other.flush,
        )


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
