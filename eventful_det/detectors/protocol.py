"""What streams, pools and evaluation know of a detector: nothing but this.

A detector of another kind fits without touching them if it has the members of `VideoDetector`. A network that gives
something else, such as classes of actions, is a `Network` for steps and pools; see `eventful_det.runtime.session`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from eventful_det.data.video.transforms import Image, fit_size, resize, to_tensor
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import DEFAULT_RULE as DEFAULT_RULE
from eventful_det.gating.rules import AnyRule as AnyRule
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, TensorTree
from eventful_det.gating.windows import Grid

S = TypeVar("S", bound=TensorTree)


class Costed(Protocol):
    """What a step gives for a stream."""

    @property
    def cost(self) -> FrameCost:
        """Of the frame."""


T = TypeVar("T", bound=Costed)


def exactly(rule: AnyRule) -> AnyRule:
    """The rule, with results that do not depend by a bit on which streams share a step."""
    return dataclasses.replace(rule, exact=True) if isinstance(rule, Rows) else rule


@dataclass(frozen=True)
class InputTransform:
    """From a frame of any size to the input of a detector, and from its boxes back to pixels of the frame.

    Attributes:
        short_side: of the input in pixels ...
        long_side: ... unless its long side would exceed this one.
        token: side of a token in pixels of the input.
        fill: colour, RGB in [0, 1], of padding.
        square: inputs are padded to squares at the bottom and right.
    """

    short_side: int
    long_side: int
    token: int
    fill: tuple[float, ...] = (0.5, 0.5, 0.5)
    square: bool = False

    def with_sides(self, short_side: int | None, long_side: int | None) -> InputTransform:
        """The same transform to other sides; None = as it is."""
        return dataclasses.replace(
            self, short_side=short_side or self.short_side, long_side=long_side or self.long_side
        )

    def scaled(self, scale: float) -> InputTransform:
        """The same transform to sides of another scale."""
        return self.with_sides(round(scale * self.short_side), round(scale * self.long_side))

    def squared(self) -> InputTransform:
        """The same transform to squares."""
        return dataclasses.replace(self, square=True)

    def __call__(self, image: Image) -> Tensor:
        """A frame `(h, w, 3)` as input `(3, h', w')`, RGB in [0, 1]. Resized frames are not resized again."""
        frame = to_tensor(resize(image, *self._size(image)))
        if not self.square:
            return frame
        height, width = frame.shape[1:]
        side = max(height, width)
        canvas = frame.new_tensor(self.fill).view(3, 1, 1).repeat(1, side, side)
        canvas[:, :height, :width] = frame
        return canvas

    def restore(self, detections: Detections, image: Image) -> Detections:
        """Detections in an input as detections in its frame, in pixels of the frame.

        Boxes end where padding begins; those that lie in it whole are dropped.
        """
        if self.square:
            height, width = self._size(image)
            boxes = detections.boxes.clamp(max=detections.boxes.new_tensor([width, height, width, height]))
            inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
            detections = dataclasses.replace(detections, boxes=boxes)[inside]
        y, x = self._scale(image)
        return detections.scaled(x, y)

    def token_size(self, image: Image) -> tuple[float, float]:
        """Height and width of a token in pixels of a frame."""
        y, x = self._scale(image)
        return self.token * y, self.token * x

    def _size(self, image: Image) -> tuple[int, int]:
        return fit_size(image.shape[0], image.shape[1], self.short_side, self.long_side)

    def _scale(self, image: Image) -> tuple[float, float]:
        height, width = self._size(image)
        return image.shape[0] / height, image.shape[1] / width


class CostModel(Protocol):
    """What frames will cost, before they run."""

    @property
    def variable(self) -> str:
        """The part of `FrameCost.macs` whose cost depends on what is in the frame; only a bound of it is known."""

    def macs(self, grid: Grid, order: Tensor, variable: int | None = None) -> Tensor:
        """MACs of the whole detector if the first 0, 1, ... n tokens of an order are recomputed.

        Args:
            grid: tokens of the frame (H, W).
            order: `(n,)` flat indices of tokens.
            variable: MACs of the variable part whenever a token is recomputed; None = the most there can be.

        Returns:
            `(n + 1,)`; they do not fall.
        """

    def everything(self, grid: Grid) -> int:
        """MACs of the whole detector, at most, if all tokens are recomputed."""
        return int(self.macs(grid, torch.arange(grid[0] * grid[1]))[-1])


class Network(Protocol[S, T]):
    """A network for video. `S` is what it remembers of a stream between frames, `T` what a step gives."""

    @property
    def device(self) -> torch.device:
        """Where it computes; the frames of `step` have to be there."""

    def init_state(self, batch: int = 1) -> State[S]:
        """An empty state for `batch` streams."""

    def step(
        self,
        frames: Sequence[Tensor],
        state: State[S],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[T]:
        """Process the next frame of every stream.

        Args:
            frames: `(3, h, w)` of each stream, RGB in [0, 1]; sizes may differ. Of recognisers tubelets
                `(tt, 3, h, w)`.
            state: of the streams, updated in place. A frame of a new size flushes its stream alone.
            rule: how tokens are recomputed.
            selector: which tokens are recomputed; asked about all streams together that are not recomputed in full.
            flush: streams to recompute in full.
            timing: measure the seconds of each part, for which a GPU is waited for once per step.
        """

    def cost_model(self, rule: AnyRule) -> CostModel:
        """What frames will cost under a rule.

        Raises:
            UserError: that cannot be told in advance.
        """


class VideoDetector(Network[S, StepResult], Protocol[S]):
    """A detector for video."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""

    @property
    def input_transform(self) -> InputTransform:
        """How a frame becomes an input, in the detector's usual size."""
