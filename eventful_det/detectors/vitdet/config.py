"""What a detector is made of, as one typed record that travels inside its weights file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from eventful_det.errors import UserError
from eventful_det.options import Natural, NonNegative, Positive, Range, Share, convert_fields, from_values

Layers = Annotated[int, Range(0, 64)]
Tokens = Annotated[int, Range(0, 4096)]  # along a side
Pixels = Annotated[int, Range(1, 65536)]
Side = Annotated[int, Range(1, 8192)]  # of a frame
Width = Annotated[int, Range(1, 65536)]
Several = Annotated[int, Range(1, 1_000_000)]  # proposals, candidates, detections


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a ViTDet detector. The defaults are those of `vitdet_tiny`; the annotations say what each may be.

    Attributes:
        classes: names of the classes; the label of a detection is an index into them.
        dropped: those of them that are not reported.
        dim, depth, heads: width, blocks and attention heads of the Transformer.
        window: side of the attention windows in tokens.
        global_blocks: blocks that attend to the whole frame.
        position_grid: side of the stored position encoding in tokens; resized to each frame.
        relative_size: side in tokens that the relative tables of the global blocks are stored for.
        drop_path: stochastic depth while training.
        channels: channels of the pyramid levels p2 to p6.
        rpn_convs: 3x3 convolutions of the proposal head.
        patch: side of a token in pixels.
        anchor_sizes, anchor_ratios: anchor side in pixels for each of the levels p2 to p6; heights over widths.
        box_convs, box_fc: convolutions and fully connected layers of the region head.
        box_stages: 3 = a cascade of region heads, each on the boxes of the one before; 1 = one head.
        canonical_box: side in pixels of a box that is read from level p4.
        proposals: proposals kept per frame at inference; `proposals_train` while training.
        nms_candidates: candidates per level before non-maximum suppression; `nms_candidates_train` while training.
        region_samples: proposals per image in the region loss.
        box_loss: "l1" or "giou", times `box_loss_weight`.
        score_threshold, nms_threshold, max_detections: of the final detections.
        short_side, long_side: frames are resized to this short side in pixels, unless the long side would exceed.
        square_pad: frames are padded to squares of this side in pixels, as detectron2's zoo models do; 0 = they are
            padded as little as possible.
    """

    classes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dim: Width = 192
    depth: Annotated[int, Range(1, 256)] = 12
    heads: Width = 3
    patch: Annotated[int, Range(1, 256)] = 16
    window: Tokens = 4
    global_blocks: tuple[Natural, ...] = (2, 5, 8, 11)
    position_grid: Annotated[int, Range(1, 4096)] = 14
    relative_size: Annotated[int, Range(1, 4096)] = 32
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    channels: Width = 64
    rpn_convs: Layers = 1
    anchor_sizes: tuple[Pixels, Pixels, Pixels, Pixels, Pixels] = (16, 32, 64, 128, 256)
    anchor_ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    box_convs: Layers = 2
    box_fc: tuple[Width, ...] = (256,)
    box_stages: Literal[1, 3] = 1
    canonical_box: Pixels = 112
    proposals: Several = 100
    proposals_train: Several = 200
    nms_candidates: Several = 200
    nms_candidates_train: Several = 400
    region_samples: Several = 64
    box_loss: Literal["l1", "giou"] = "l1"
    box_loss_weight: NonNegative = 1.0
    score_threshold: Share = 0.05
    nms_threshold: Share = 0.5
    max_detections: Several = 100
    short_side: Side = 256
    long_side: Side = 512
    square_pad: Annotated[int, Range(0, 8192)] = 0
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        convert_fields(self, "model")
        if self.dim % self.heads:
            raise UserError(f"model: dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise UserError(f"model: two classes are called {', '.join(twice[:3])}; every class needs its own name")
        if not set(self.dropped) <= set(self.classes):
            raise UserError(f"model: dropped={list(self.dropped)} names no class; classes: {', '.join(self.classes)}")
        if self.window == 0 and self.global_blocks:
            raise UserError("model: window=0 makes every block global; leave global_blocks empty")
        if any(block >= self.depth for block in self.global_blocks):
            raise UserError(f"model: global_blocks={list(self.global_blocks)}, but the last block is {self.depth - 1}")
        if len(self.box_fc) > 16 or len(self.anchor_ratios) > 64 or len(self.global_blocks) > self.depth:
            raise UserError("model: box_fc, anchor_ratios or global_blocks has too many entries")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModelConfig:
        """A config from plain values, as JSON and YAML have them.

        Raises:
            UserError: a name is unknown, or a value does not fit.
        """
        return from_values(cls, values, "model")

    def to_json(self) -> str:
        """The config as JSON, read back by `from_dict(json.loads(...))`."""
        return json.dumps(dataclasses.asdict(self))


def vitdet_tiny(classes: tuple[str, ...], **changes: object) -> ModelConfig:
    """ViT-Ti/16 widths with a light pyramid and heads, for CPUs."""
    return ModelConfig.from_dict({**changes, "classes": classes})


def vitdet_b_vid(classes: tuple[str, ...], **changes: object) -> ModelConfig:
    """The model of the paper's ImageNet VID experiments: ViT-B, window 14, 4conv1fc region head."""
    config = ModelConfig(
        classes=classes,
        dim=768,
        heads=12,
        window=14,
        relative_size=64,
        drop_path=0.1,
        channels=256,
        rpn_convs=2,
        anchor_sizes=(32, 64, 128, 256, 512),
        box_convs=4,
        box_fc=(1024,),
        canonical_box=224,
        proposals=300,
        proposals_train=1000,
        nms_candidates=1000,
        nms_candidates_train=2000,
        region_samples=128,
        box_loss="giou",
        box_loss_weight=2.0,
        short_side=576,
        long_side=1024,
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
    )
    return ModelConfig.from_dict({**dataclasses.asdict(config), **changes})


MODELS = {"vitdet_tiny": vitdet_tiny, "vitdet_b_vid": vitdet_b_vid}
