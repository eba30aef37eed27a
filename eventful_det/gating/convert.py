"""`eventify`: make a Vision Transformer eventful, without copying or re-training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic, cast, overload

from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.rules import Rule, S, step_streams
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, Update
from eventful_det.gating.vit_spec import spec_of


class EventfulViT(nn.Module, Generic[S]):
    """A dense ViT and the rule by which it is updated from frame to frame.

    Modifications against the dense network:
      - none of its modules or parameters: they are registered here under their own names, so state dicts fit both;
      - `step` replaces `forward` for video: it takes and updates an explicit `State`.

    Args:
        vit: the dense network, shared and left intact.
        rule: how a frame's tokens are recomputed.
        selector: which tokens are, unless `step` is given another.

    Attributes:
        spec: the network as the rules see it.
    """

    def __init__(self, vit: nn.Module, rule: Rule[S], selector: Select = DEFAULT) -> None:
        super().__init__()
        self.spec = spec_of(vit)
        self._dense = [vit]  # in a list, so that its parameters are not registered twice
        for name, parameter in vit.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in vit.named_children():
            self.add_module(name, module)
        self.rule = rule
        self.selector = selector

    @property
    def dense(self) -> nn.Module:
        """The dense network that this one shares all parameters with."""
        return self._dense[0]

    def init_state(self, batch: int = 1) -> State[S]:
        """An empty state for `batch` streams; buffers are allocated at each stream's first frame."""
        return State([None] * batch)

    def step(
        self,
        frames: Tensor | Sequence[Tensor],
        state: State[S],
        *,
        selector: Select | None = None,
        flush: Sequence[bool] | bool = False,
        saliency: Sequence[Tensor | None] | None = None,
    ) -> list[Update]:
        """Process the next frame of every stream.

        Args:
            frames: `(B, 3, h, w)` or B tensors `(3, h, w)`, normalised as the network expects; sizes may differ.
            state: of the B streams, updated in place. A frame of a new size flushes its stream alone.
            selector: which tokens are recomputed on this frame; None = that of the network.
            flush: streams to recompute in full.
            saliency: for each stream `(N,)` how much each token matters on this frame, 0 to 1, or None.

        Raises:
            UserError: the numbers of frames and streams differ, or a frame is no `(3, h, w)` of floating point.
        """
        selector = self.selector if selector is None else selector
        updates = step_streams(
            self.spec, frames, state, rule=self.rule, selector=selector, flush=flush, saliency=saliency
        )
        return [
            dataclasses.replace(
                update, tokens=update.tokens.clone(), prefix=None if update.prefix is None else update.prefix.clone()
            )
            for update in updates
        ]

    def forward(self, x: Tensor) -> Tensor:
        """The dense network, as it was."""
        return cast(Tensor, self.dense(x))


@overload
def eventify(vit: nn.Module, *, selector: Select = DEFAULT) -> EventfulViT[RowsState]: ...


@overload
def eventify(vit: nn.Module, rule: Rule[S], selector: Select = DEFAULT) -> EventfulViT[S]: ...


def eventify(vit: nn.Module, rule: Rule[S] | None = None, selector: Select = DEFAULT) -> EventfulViT[S]:
    """Make a dense ViT eventful; its parameters are shared, nothing is copied or re-trained.

    Args:
        vit: timm `VisionTransformerSAM` or `VisionTransformer`, or detectron2 `ViT`.
        rule: how tokens are recomputed, a `Rows` (the default), `Paper` or `Dense`.
        selector: which tokens are recomputed.

    Raises:
        UserError: the network is not supported, or the rule is none.
    """
    if rule is not None and not callable(getattr(rule, "init_stream", None)):
        raise UserError(f"rule must be Rows(), Paper() or Dense() with their options, got {rule!r}")
    return EventfulViT(vit, cast(Rule[S], Rows()) if rule is None else rule, selector)
