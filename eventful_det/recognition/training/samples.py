"""What recognisers learn from end to end: views of clips, rendered or read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.recognition.data.clip_reader import read_clips
from eventful_det.recognition.data.segments import Segments
from eventful_det.recognition.data.synthetic_actions import ActionClip, ActionOptions, mirrored, render_action
from eventful_det.recognition.data.views import frame_indices, normalise
from eventful_det.recognition.recogniser import Recogniser

Labels = dict[str, int]
Sample = tuple[Tensor, Labels, Tensor | None]


class Samples(Protocol):
    """What to learn from: an endless sequence, of which sample n follows from n alone."""

    def sample(self, n: int) -> Sample:
        """A view `(t, c, h, w)` normalised, or features `(V, T', D)`; its labels; and hints, if there are any.

        Hints `(T', K)` in [0, 1] are what a linear layer, which is thrown away, shall read from the spatial outputs.
        """


class SyntheticClips:
    """Synthetic actions: one view of `config.size` each, mirrored anew along random axes each time.

    A clip is rendered when it is first asked for. Hints say where objects are.

    Args:
        recogniser: whose views they are.
        options: what they are like.
        seed: of clips and order.
        split: of the clips.
        count: of different clips.
        keep: hold clips in memory once they are rendered.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        options: ActionOptions,
        seed: int = 0,
        split: str = "train",
        count: int = 6000,
        keep: bool = True,
    ) -> None:
        config = recogniser.config
        if options.frames < config.span:
            raise UserError(f"clips of {options.frames} frames are too short for views that span {config.span}")
        self.config, self.options, self.seed, self.split, self.count = config, options, seed, split, count
        self.keep = keep
        self.rendered: dict[int, ActionClip] = {}

    def sample(self, n: int) -> Sample:
        """See `Samples`. The order is drawn anew for each round."""
        index = int(np.random.default_rng([self.seed, n // self.count]).permutation(self.count)[n % self.count])
        rendered = self.rendered.get(index)
        if rendered is None:
            frames = range(0, self.config.span, self.config.stride)
            rendered = render_action(self.options, self.seed, index, self.split, frames)
            if self.keep:
                self.rendered[index] = rendered
        rng = np.random.default_rng([self.seed, n, 7])
        clip = mirrored(rendered, *(axis for axis in ("x", "y", "time") if rng.random() < 0.5))
        view = normalise(torch.from_numpy(clip.frames).permute(0, 3, 1, 2), self.config)
        hints = torch.from_numpy(clip.coverage).unflatten(0, (self.config.steps, -1)).mean(1).flatten(1)
        return centre(view, self.config.size), {next(iter(self.config.classes)): clip.label}, hints


class VideoClips:
    """Views of segments of videos, at a random moment and place; in an order drawn anew for each round."""

    def __init__(self, recogniser: Recogniser, segments: Segments, seed: int = 0) -> None:
        self.config, self.segments, self.seed = recogniser.config, segments, seed

    def sample(self, n: int) -> Sample:
        """See `Samples`. A segment that cannot be read gives way to the next."""
        count = len(self.segments)
        order = np.random.default_rng([self.seed, n // count]).permutation(count)
        rng = np.random.default_rng([self.seed, n, 11])
        chosen = [self.segments.items[order[(n + i) % count]] for i in range(min(count, 20))]
        for segment, clip in read_clips(chosen, self.config, shared=False):
            if isinstance(clip, UserError):
                continue
            start = int(rng.integers(max(1, self.config.temporal_views)))
            numbers = frame_indices(len(clip), self.config)[start]
            frames = normalise(clip[numbers], self.config)
            top, left = (
                int(rng.integers(outer - inner + 1))
                for outer, inner in zip(frames.shape[-2:], self.config.size, strict=True)
            )
            view = frames[..., top : top + self.config.size[0], left : left + self.config.size[1]]
            return view, dict(segment.labels), None
        raise UserError(f"20 segments in a row cannot be read, {chosen[0].video} the first of them")


def centre(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The central crop of frames `(..., H, W)`."""
    top, left = (frames.shape[-2] - size[0]) // 2, (frames.shape[-1] - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]
