"""MACs of the heads from the sizes of what they read, and the cost of a frame by part."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from eventful_det.gating.anatomy import Grid
from eventful_det.gating.closed_form import ViTShape
from eventful_det.models.rpn import ProposalHead
from eventful_det.models.roi_heads import Regions
from eventful_det.models.vitdet import ViTDetBackbone

PARTS = ("backbone", "pyramid", "rpn", "roi")


@dataclass(frozen=True)
class FrameCost:
    """What one frame cost.

    Attributes:
        macs: multiply-adds of each part in `PARTS`, gate arithmetic included.
        dense: what the dense detector would have spent on the same frame, by part.
        seconds: time of each part, plus "other"; empty when not measured.
        recomputed: tokens recomputed.
        tokens: tokens of the frame.
        flush: whether everything was recomputed because the stream began anew.
    """

    macs: dict[str, int]
    dense: dict[str, int]
    recomputed: int
    tokens: int
    flush: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether the detector did not run: a frame on which nothing changed still costs a comparison."""
        return not self.total

    def idle(self) -> FrameCost:
        """The cost of a frame like this one on which the detector does not run."""
        return FrameCost(dict.fromkeys(self.dense, 0), self.dense, 0, self.tokens, False)

    @property
    def total(self) -> int:
        """MACs of the whole detector."""
        return sum(self.macs.values())

    @property
    def dense_total(self) -> int:
        """MACs of the whole dense detector on the same frame."""
        return sum(self.dense.values())

    @property
    def latency(self) -> float:
        """Seconds of the whole detector; 0 when not measured."""
        return sum(self.seconds.values())


def level_sizes(grid: Grid) -> list[Grid]:
    """Cells (rows, columns) of the levels p2 to p6 over a token grid of stride 16."""
    rows, cols = grid
    p5 = (rows // 2, cols // 2)
    return [(4 * rows, 4 * cols), (2 * rows, 2 * cols), grid, p5, (-(-p5[0] // 2), -(-p5[1] // 2))]


def window_padding_macs(shape: ViTShape, grid: Grid) -> int:
    """MACs that timm's dense blocks spend on the padded tokens of incomplete windows, and the update rules do not."""
    if not shape.window:
        return 0
    rows, cols = (-(-side // shape.window) * shape.window for side in grid)
    padded = rows * cols - grid[0] * grid[1]
    return shape.windowed * padded * 4 * shape.dim**2  # qkv and output projection


def pyramid_macs(backbone: ViTDetBackbone, grid: Grid) -> int:
    """MACs of the simple feature pyramid over a token grid."""
    stages = (backbone.simfp_2, backbone.simfp_3, backbone.simfp_4, backbone.simfp_5)
    return sum(stage_macs(stage, grid) for stage in stages)


def rpn_macs(head: ProposalHead, grid: Grid) -> int:
    """MACs of the proposal head over all levels."""
    weights = sum(m.weight.numel() for m in head.modules() if isinstance(m, nn.Conv2d))
    return weights * sum(rows * cols for rows, cols in level_sizes(grid))


def roi_macs(heads: Regions, proposals: int) -> int:
    """MACs of the region heads for a number of proposals; reading the regions is not counted."""
    cells = 49
    convolutions = sum(m.weight.numel() for m in heads.modules() if isinstance(m, nn.Conv2d))
    linears = sum(m.weight.numel() for m in heads.modules() if isinstance(m, nn.Linear))
    return proposals * (convolutions * cells + linears)


def stage_macs(stage: nn.Module, grid: Grid) -> int:
    """MACs of a chain of convolutions over a grid (rows, columns); each changes it as its stride says."""
    (rows, cols), macs = grid, 0
    for layer in stage.children():
        if isinstance(layer, nn.ConvTranspose2d):
            macs += rows * cols * layer.weight.numel()
            rows, cols = rows * layer.stride[0], cols * layer.stride[0]
        elif isinstance(layer, nn.MaxPool2d):
            rows, cols = rows // 2, cols // 2
        elif isinstance(layer, nn.Conv2d):
            macs += rows * cols * layer.weight.numel()
    return macs
