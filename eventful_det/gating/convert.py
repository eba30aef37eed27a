"""`eventify`: make a Vision Transformer eventful, without copying or re-training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized
from typing import Generic, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows, RowsState
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, StreamState
from eventful_det.gating.update import Update
from eventful_det.gating.vit_spec import ViTSpec, spec_of
from eventful_det.gating.whole_windows import Windows
from eventful_det.gating.windows import Grid

S = TypeVar("S", bound=StreamState)

AnyRule = Rows | Windows | Paper | Dense
"""How the tokens of a frame are recomputed."""

DEFAULT_RULE: AnyRule = Rows()


class Rule(Protocol[S]):
    """An update rule: how a frame's tokens are recomputed. A frozen value."""

    @property
    def layout(self) -> tuple[str | int, ...]:
        """What the form of the state depends on: a stream's state is of use only to rules of the same layout."""

    def init_stream(self, vit: ViTSpec, grid: Grid) -> S:
        """Allocate the state of one stream."""

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[S],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame `(3, h, w)` of every stream, updating the states in place.

        `saliency` is of each stream, `(N,)` or None; see `GateInput`.
        """


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


@torch.inference_mode(False)  # so that the state can go on in and outside of inference mode
@torch.no_grad()
def step_streams(
    vit: ViTSpec,
    frames: Tensor | Sequence[Tensor],
    state: State[S],
    *,
    rule: Rule[S] | AnyRule,
    selector: Select = DEFAULT,
    flush: Sequence[bool] | bool = False,
    saliency: Sequence[Tensor | None] | None = None,
) -> list[Update]:
    """Process the next frame of every stream by a rule; see `EventfulViT.step`, whose tokens are copies.

    A new size, a rule of another layout or its flag in `flush` recompute all tokens of a stream.
    """
    rule = cast(Rule[S], rule)  # no type says which of the rules a stream's state is of
    flushes = per_stream("flush flags", [flush] * len(state) if isinstance(flush, bool) else flush, state)
    weights = per_stream("saliency maps", [None] * len(state) if saliency is None else saliency, state)
    frames, streams = per_stream("frames", list(frames), state), []
    for i, (frame, new) in enumerate(zip(frames, flushes, strict=True)):
        _check_frame(frame, vit)
        grid, stream = vit.grid(*frame.shape[-2:]), state.streams[i]
        if stream is None or (stream.layout, stream.grid) != (rule.layout, grid):
            state.streams[i] = stream = rule.init_stream(vit, grid)
        if new:
            stream.frame = 0
        streams.append(stream)
    return rule.step(vit, frames, streams, selector, weights)


T = TypeVar("T")


def per_stream(what: str, items: Sequence[T], state: Sized) -> Sequence[T]:
    """The items, one for each stream.

    Raises:
        UserError: they are not as many as the streams.
    """
    if len(items) != len(state):
        raise UserError(f"got {len(items)} {what} for a state of {len(state)} streams; give one for each")
    return items


def _check_frame(frame: Tensor, vit: ViTSpec) -> None:
    channels = vit.projection.in_channels
    if frame.dim() != 3 or frame.shape[0] != channels:
        raise UserError(f"got a frame of shape {tuple(frame.shape)}; frames are ({channels}, height, width)")
    if not frame.is_floating_point():
        raise UserError(f"got a frame of {frame.dtype} for a network of {vit.dtype}; normalise and convert it")


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
