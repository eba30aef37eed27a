"""Recognition of whole clips by the official protocol, each tubelet computed once where views share it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule
from eventful_det.gating.selector import Select
from eventful_det.gating.state import State, Update
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.data.views import average, crop_views, frame_indices, normalise, shared_tubelets
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.results import StepCost
from eventful_det.recognition.session import DEFAULT


@dataclass(frozen=True)
class ClipResult:
    """What a clip is taken for.

    Attributes:
        logits: of each head `(classes,)`, averaged over the views.
        features: `(V, T', D)` spatial outputs of all views, spatial views outside.
        cost: of the whole clip; `tokens` and `recomputed` are those of all tubelets.
        tubelets: how many of them, over all crops.
    """

    logits: dict[str, Tensor]
    features: Tensor
    cost: StepCost
    tubelets: int

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """Of each head, `(classes,)`; they sum to 1."""
        return {head: logits.float().softmax(-1) for head, logits in self.logits.items()}


class Clip(Protocol):
    """Frames, uint8 RGB: a tensor `(T, c, H, W)`, or what gives some of them as one."""

    def __len__(self) -> int:
        """Number of frames T."""

    def __getitem__(self, indices: list[int], /) -> Tensor:
        """Frames by a list of their numbers, `(n, c, H, W)`."""


def recognise(
    recogniser: Recogniser,
    clip: Clip,
    *,
    rule: AnyRule = DEFAULT_RULE,
    selector: Select = DEFAULT,
    shared: bool = True,
    hold: int = 1,
) -> ClipResult:
    """Recognise a clip from all its views.

    Args:
        recogniser: in evaluation mode.
        clip: `(T, c, H, W)` uint8 RGB, at the frame rate of the recogniser.
        rule: how tokens are recomputed.
        selector: which tokens are recomputed.
        shared: compute each tubelet of a crop once, though several temporal views hold it. Views then start at whole
            tubelets, which moves them by less than one. False = as the official code does, view by view.
        hold: run the spatial model on every n-th tubelet only, and hold its output in between (a baseline).

    Raises:
        UserError: the clip is empty, or of another shape or type.
    """
    if not len(clip) or clip[[0]].dim() != 4 or clip[[0]].dtype != torch.uint8:
        raise UserError("a clip is (T, c, H, W) uint8, with at least one frame")
    if hold < 1:
        raise UserError(f"hold must be at least 1 (= every tubelet), got {hold}")
    run = _shared if shared else _view_by_view
    with torch.no_grad():
        features, costs, tubelets = run(recogniser, clip, rule, selector, hold)
        logits = {head: average(values) for head, values in recogniser.temporal(features).items()}
    return ClipResult(logits, features, functools.reduce(StepCost.__add__, costs), tubelets)


def _view_by_view(
    recogniser: Recogniser, clip: Clip, rule: AnyRule, selector: Select, hold: int
) -> tuple[Tensor, list[StepCost], int]:
    """Each view is a stream: features `(V, T', D)`, the cost of each step, and the number of tubelets."""
    config = recogniser.config
    excerpts = [normalise(clip[indices], config) for indices in frame_indices(len(clip), config)]
    frames = recogniser.tubelets(crop_views(torch.stack(excerpts), config))  # (V, T', c * tt, h, w)
    features, costs = spatial_outputs(recogniser, frames, rule, selector, hold)
    return features, costs, frames.shape[0] * frames.shape[1]


def spatial_outputs(
    recogniser: Recogniser, frames: Tensor, rule: AnyRule, selector: Select, hold: int = 1
) -> tuple[Tensor, list[StepCost]]:
    """The spatial model step by step over views, each of which is a stream.

    Args:
        recogniser: in evaluation mode.
        frames: `(V, T', c * tt, h, w)` tubelets of the views, normalised.
        rule, selector, hold: as of `recognise`.

    Returns:
        `(V, T', D)`, and the costs of all steps.
    """
    state: State[Any] = State([None] * len(frames))
    features: list[Tensor] = []
    costs: list[StepCost] = []
    updates: list[Update] = []
    for step in range(frames.shape[1]):
        if step % hold:
            features.append(features[-1])
            costs += [recogniser.cost(update, windows=0).idle() for update in updates]
            continue
        updates = recogniser.spatial_step(list(frames[:, step]), state, rule=rule, selector=selector)
        features.append(_features(updates))
        costs += [recogniser.cost(update, windows=step == 0) for update in updates]
    return torch.stack(features, 1), costs


def _shared(
    recogniser: Recogniser, clip: Clip, rule: AnyRule, selector: Select, hold: int
) -> tuple[Tensor, list[StepCost], int]:
    """Each crop is a stream over the distinct tubelets, which begins anew where some are left out."""
    config = recogniser.config
    starts, views = shared_tubelets(len(clip), config)
    state: State[Any] = State([None] * config.spatial_views)
    features: list[Tensor] = []
    costs: list[StepCost] = []
    updates: list[Update] = []
    run = 0  # tubelets since the stream began anew
    for i, start in enumerate(starts):
        gap = i > 0 and start - starts[i - 1] != config.tubelet[0] * config.stride
        run = 0 if gap else run
        run += 1
        if (run - 1) % hold:
            features.append(features[-1])
            costs += [recogniser.cost(update, windows=0).idle() for update in updates]
            continue
        frames = recogniser.tubelets(crop_views(normalise(_tubelet(clip, start, config), config)[None], config))
        updates = recogniser.spatial_step(list(frames[:, 0]), state, rule=rule, selector=selector, flush=gap)
        features.append(_features(updates))
        costs += [recogniser.cost(update, windows=len(views) * (i == 0)) for update in updates]
    distinct = torch.stack(features, 1)  # (S, distinct, D)
    each = torch.stack([distinct[:, view] for view in views], 1)  # (S, E, T', D)
    return each.flatten(0, 1), costs, len(starts) * config.spatial_views


def _tubelet(clip: Clip, start: int, config: RecogniserConfig) -> Tensor:
    """Frames `(tt, c, H, W)` of a tubelet; beyond the clip its last is repeated."""
    indices = [min(start + i * config.stride, len(clip) - 1) for i in range(config.tubelet[0])]
    return clip[indices]


def _features(updates: Sequence[Update]) -> Tensor:
    """Spatial outputs of some streams, `(B, D)`."""
    return torch.stack([cast(Tensor, update.prefix)[0].clone() for update in updates])
