"""What a recogniser is made of, and how clips become its input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.windows import Grid
from eventful_det.options import Count, Positive, convert_fields, from_values


@dataclass(frozen=True)
class RecogniserConfig:
    """Sizes of a factorised ViViT, its classes, and the clips that it takes.

    Attributes:
        classes: names of each head's classes, such as `{"verb": (...), "noun": (...)}`; the first head is the main one.
        dim: width D of tokens and of spatial outputs.
        depth, heads, mlp: blocks of the spatial model, their attention heads and hidden width.
        temporal_depth, temporal_heads, temporal_mlp: the same of the temporal model.
        tubelet: frames, rows and columns of pixels that become a token.
        frames: of a view; a whole number of tubelets.
        size: height and width of a view in pixels.
        position_grid: tokens that the spatial position encoding is made for; it is resized where views differ.
        stride: distance of a view's frames in frames of the clip ...
        fps: ... which runs at so many frames per second.
        mean, std: of the colours, each a number per channel; pixels are in [0, 1] before.
        temporal_views, spatial_views: excerpts of a clip, and crops of each of them, that are averaged.
        dropout: before the heads, in training.
    """

    classes: Mapping[str, tuple[str, ...]]
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    temporal_depth: int = 4
    temporal_heads: int = 12
    temporal_mlp: int = 3072
    tubelet: tuple[Count, Count, Count] = (2, 16, 16)
    frames: Count = 32
    size: Grid = (224, 224)
    position_grid: Grid = (14, 14)
    stride: Count = 2
    fps: Positive = 25.0
    mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    std: tuple[Positive, ...] = (0.225, 0.225, 0.225)
    temporal_views: Count = 4
    spatial_views: Count = 3
    dropout: float = 0.5

    def __post_init__(self) -> None:
        convert_fields(self, "recogniser")
        if not self.classes or not all(self.classes.values()):
            raise UserError("recogniser: every head needs classes")
        if not len(self.mean) == len(self.std) > 0:
            raise UserError("recogniser: mean and std need one number per colour channel")

    def check_sizes(self) -> None:
        """Raise a UserError unless views divide into tubelets, and tokens into attention heads."""
        problem = ""
        if self.frames % self.tubelet[0]:
            problem = f"{self.frames} frames are no whole number of tubelets of {self.tubelet[0]}"
        elif any(side % patch for side, patch in zip(self.size, self.tubelet[1:], strict=True)):
            problem = f"views of {self.size} pixels do not divide into tubelets of {self.tubelet[1:]}"
        elif self.dim % self.heads or self.dim % self.temporal_heads:
            problem = f"dim={self.dim} does not divide into {self.heads} and {self.temporal_heads} attention heads"
        if problem:
            raise UserError(f"recogniser: {problem}")

    @property
    def channels(self) -> int:
        """Colour channels."""
        return len(self.mean)

    @property
    def steps(self) -> int:
        """Tubelets of a view, T'."""
        return self.frames // self.tubelet[0]

    @property
    def grid(self) -> Grid:
        """Tokens of a view's tubelet (H, W)."""
        return self.size[0] // self.tubelet[1], self.size[1] // self.tubelet[2]

    @property
    def span(self) -> int:
        """Frames of a clip that a view reaches over."""
        return self.frames * self.stride

    def to_json(self) -> str:
        """As text, for metadata."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_dict(values: JsonObject) -> RecogniserConfig:
        """The inverse of `dataclasses.asdict`, also after JSON made lists of tuples.

        Raises:
            UserError: unknown names, or values that do not fit.
        """
        return from_values(RecogniserConfig, values, "recogniser")


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that nobody named."""
    return tuple(f"class_{i}" for i in range(count))


def vivit_b_epic(classes: Mapping[str, tuple[str, ...]] | None = None) -> RecogniserConfig:
    """The paper's model for EPIC-Kitchens 100; by default with its 97 verbs, by number."""
    classes = {"verb": numbered(97)} if classes is None else classes
    return RecogniserConfig(classes, size=(320, 320), position_grid=(20, 20), stride=1, fps=30.0)


def vivit_b_k400(classes: Mapping[str, tuple[str, ...]] | None = None) -> RecogniserConfig:
    """The paper's model for Kinetics-400; by default with its 400 classes, by number."""
    return RecogniserConfig({"action": numbered(400)} if classes is None else classes)


def vivit_tiny(classes: Mapping[str, tuple[str, ...]]) -> RecogniserConfig:
    """A small model with the widths of ViT-Ti, for 16 frames of 112 x 112 pixels."""
    return RecogniserConfig(
        classes,
        dim=192,
        heads=3,
        mlp=768,
        temporal_depth=2,
        temporal_heads=3,
        temporal_mlp=768,
        frames=16,
        size=(112, 112),
        position_grid=(7, 7),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        temporal_views=1,
        spatial_views=1,
    )
