"""Update rules: what each of them is, and the step of several streams by any of them."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import State, StreamState, Update
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.gating.windows import Grid

S = TypeVar("S", bound=StreamState)
T = TypeVar("T")

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
