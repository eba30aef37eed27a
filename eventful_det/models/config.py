"""What a detector is made of, as one typed record that travels inside its weights file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from eventful_det.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a ViTDet detector. The defaults are those of `vitdet_tiny`.

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
        anchor_sizes: anchor side in pixels for each of the levels p2 to p6.
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
    dim: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 16
    window: int = 4
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    position_grid: int = 14
    relative_size: int = 32
    drop_path: float = 0.0
    channels: int = 64
    rpn_convs: int = 1
    anchor_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    box_convs: int = 2
    box_fc: tuple[int, ...] = (256,)
    box_stages: int = 1
    canonical_box: int = 112
    proposals: int = 100
    proposals_train: int = 200
    nms_candidates: int = 200
    nms_candidates_train: int = 400
    region_samples: int = 64
    box_loss: str = "l1"
    box_loss_weight: float = 1.0
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    short_side: int = 256
    long_side: int = 512
    square_pad: int = 0
    pixel_mean: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))
    pixel_std: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise UserError(f"model: dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if self.box_loss not in ("l1", "giou"):
            raise UserError(f"model: box_loss must be 'l1' or 'giou', got {self.box_loss!r}")
        if self.box_stages not in (1, 3):
            raise UserError(f"model: box_stages must be 1, or 3 for a cascade, got {self.box_stages}")
        if not set(self.dropped) <= set(self.classes):
            raise UserError(f"model: dropped={list(self.dropped)} names no class; classes: {', '.join(self.classes)}")
        if self.window == 0 and self.global_blocks:
            raise UserError("model: window=0 makes every block global; leave global_blocks empty")

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> ModelConfig:
        """A config from plain values; lists become tuples.

        Raises:
            UserError: a name is unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"model: unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()})  # type: ignore[arg-type]

    def to_json(self) -> str:
        """The config as JSON, read back by `from_dict(json.loads(...))`."""
        return json.dumps(dataclasses.asdict(self))


def vitdet_tiny(classes: tuple[str, ...], **changes: object) -> ModelConfig:
    """ViT-Ti/16 widths with a light pyramid and heads, for CPUs."""
    return dataclasses.replace(ModelConfig(classes=classes), **changes)  # type: ignore[arg-type]


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
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


MODELS = {"vitdet_tiny": vitdet_tiny, "vitdet_b_vid": vitdet_b_vid}
