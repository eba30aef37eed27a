"""`eventify`: make a Vision Transformer eventful, without copying or re-training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Anatomy, Grid, anatomy_of
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import JointPolicy, Policy
from eventful_det.gating.rows import Rows
from eventful_det.gating.state import State
from eventful_det.gating.update import Update


class Rule(Protocol):
    """An update rule: how a frame's tokens are recomputed."""

    policy: Policy

    @property
    def layout(self) -> tuple[str | int, ...]:
        """What the form of the state depends on: a stream's state is of use only to rules of the same layout."""

    def init_stream(self, anatomy: Anatomy, grid: Grid) -> Any:
        """Allocate the state of one stream."""

    def step(
        self, anatomy: Anatomy, patches: Sequence[Tensor], states: Sequence[Any], joint: JointPolicy | None = None
    ) -> list[Update]:
        """Process the next frame `(N, P)` of every stream, updating the states in place."""


RULES: dict[str, type[Rule]] = {"rows": Rows, "paper": Paper}


class EventfulViT(nn.Module):
    """A dense ViT and the rule by which it is updated from frame to frame.

    Modifications against the dense network:
      - none of its modules or parameters: they are registered here under their own names, so state dicts fit both;
      - `step` replaces `forward` for video: it takes and updates an explicit `State`;
      - `policy` and `rule` may be exchanged between any two frames; a rule of another kind flushes the streams.

    Args:
        vit: the dense network, shared and left intact.
        rule: an update rule.
    """

    def __init__(self, vit: nn.Module, rule: Rule) -> None:
        super().__init__()
        anatomy_of(vit)  # raises on unsupported networks
        self._dense = [vit]  # in a list, so that its parameters are not registered twice
        for name, parameter in vit.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in vit.named_children():
            self.add_module(name, module)
        self.rule = rule

    @property
    def dense(self) -> nn.Module:
        """The dense network that this one shares all parameters with."""
        return self._dense[0]

    @property
    def anatomy(self) -> Anatomy:
        """The network as the rules see it."""
        return anatomy_of(self.dense)

    @property
    def policy(self) -> Policy:
        """Which tokens are recomputed; settable between any two frames."""
        return self.rule.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.rule.policy = policy

    def init_state(self, batch: int = 1) -> State:
        """An empty state for `batch` streams; buffers are allocated at each stream's first frame."""
        return State([None] * batch)

    @torch.no_grad()
    def step(
        self,
        frames: Tensor | Sequence[Tensor],
        state: State,
        flush: Sequence[bool] | bool = False,
        joint: JointPolicy | None = None,
    ) -> list[Update]:
        """Process the next frame of every stream.

        Args:
            frames: `(B, 3, h, w)` or B tensors `(3, h, w)`, normalised as the network expects; sizes may differ.
            state: of the B streams, updated in place. A frame of a new size flushes its stream alone.
            flush: streams to recompute in full.
            joint: selects the tokens of all streams together; by default `policy` is asked about each alone.

        Raises:
            UserError: the numbers of frames and streams differ, or a frame is no `(3, h, w)` of the network's type.
        """
        flushes = flush_flags(frames, state, flush)
        anatomy = self.anatomy
        for frame in frames:
            _check_frame(frame, anatomy)
        updates = step_streams(self.rule, anatomy, frames, state, flushes, joint)
        return [dataclasses.replace(update, tokens=update.tokens.clone()) for update in updates]

    def forward(self, x: Tensor) -> Tensor:
        """The dense network, as it was."""
        return cast(Tensor, self.dense(x))


def step_streams(
    rule: Rule,
    anatomy: Anatomy,
    frames: Tensor | Sequence[Tensor],
    state: State,
    flushes: Sequence[bool],
    joint: JointPolicy | None = None,
) -> list[Update]:
    """Process the next frame `(3, h, w)` of every stream.

    A new size, a rule of another kind or its flag in `flushes` recompute all tokens of a stream.
    """
    for i, (frame, flush) in enumerate(zip(frames, flushes, strict=True)):
        grid = anatomy.grid(*frame.shape[-2:])
        stream = state.streams[i]
        if stream is None or (stream.layout, stream.grid) != (rule.layout, grid):
            with torch.inference_mode(False):  # so that the stream can go on outside of inference mode
                state.streams[i] = stream = rule.init_stream(anatomy, grid)
        if flush:
            stream.frame = 0
    return rule.step(anatomy, [anatomy.patches(frame) for frame in frames], state.streams, joint)


def flush_flags(frames: Tensor | Sequence[Tensor], state: State, flush: Sequence[bool] | bool) -> list[bool]:
    """One flush flag per stream.

    Raises:
        UserError: the numbers of frames, streams and flags differ.
    """
    if len(frames) != len(state):
        raise UserError(f"got {len(frames)} frames for a state of {len(state)} streams; give one frame per stream")
    flushes = [flush] * len(frames) if isinstance(flush, bool) else list(flush)
    if len(flushes) != len(frames):
        raise UserError(f"got {len(flushes)} flush flags for {len(frames)} frames; give one flag per frame, or one")
    return flushes


def _check_frame(frame: Tensor, anatomy: Anatomy) -> None:
    channels = anatomy.projection.in_channels
    if frame.dim() != 3 or frame.shape[0] != channels:
        raise UserError(f"got a frame of shape {tuple(frame.shape)}; frames are ({channels}, height, width)")
    if frame.dtype != anatomy.dtype:
        raise UserError(f"got a frame of {frame.dtype} for a network of {anatomy.dtype}; normalise and convert it")


def eventify(
    vit: nn.Module, rule: Rule | Literal["rows", "paper"] = "rows", policy: Policy | None = None
) -> EventfulViT:
    """Make a dense ViT eventful; its parameters are shared, nothing is copied or re-trained.

    Args:
        vit: timm `VisionTransformerSAM` or `VisionTransformer`, or detectron2 `ViT`.
        rule: "rows" (default), "paper", or a configured `Rows` or `Paper`.
        policy: which tokens to recompute; the rule's own by default.

    Raises:
        UserError: the network or the rule is not supported.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise UserError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
        rule = RULES[rule]()
    if policy is not None:
        rule.policy = policy
    return EventfulViT(vit, rule)
