"""The backbone: a windowed ViT and the simple feature pyramid on its last token map (ViTDet, Li et al. 2022)."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.gating.spec import resize_positions
from eventful_det.gating.windows import Grid

STRIDES = (4, 8, 16, 32, 64)
SCALES = (4, 2, 1, 1)  # cells of p2 to p5 along a side of a token, or of 2x2 tokens for p5


class WindowedViT(VisionTransformerSAM):
    """timm's SAM ViT as ViTDet uses it.

    Modifications against timm:
      - no neck and no classifier: `forward` returns the token map `(B, D, H, W)`;
      - the position encoding is stored at its pre-training size and resized as detectron2 does (bicubic, no
        antialiasing), independently of the size of the relative tables.
    """

    position_antialias = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            img_size=config.relative_size * config.patch,
            patch_size=config.patch,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            drop_path_rate=config.drop_path,
            norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6)),
            use_rel_pos=True,
            window_size=config.window,
            global_attn_indexes=config.global_blocks,
            neck_chans=0,
            num_classes=0,
        )
        self.prune_intermediate_layers(prune_norm=True, prune_head=True)
        side = config.position_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, grid: Grid) -> Tensor:
        """Position encoding of a token grid, `(H * W, D)`."""
        return resize_positions(self.pos_embed[0], grid, antialias=self.position_antialias)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 3, h, w)`, whose sides are multiples of the patch, to the token map `(B, D, H, W)`."""
        x = cast(nn.Conv2d, self.patch_embed.proj)(x).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        x = x + self.positions(grid).unflatten(0, grid)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """A convolution followed by layer norm over channels, as one module with detectron2's parameter names."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = LayerNorm2d(outputs, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class ViTDetBackbone(nn.Module):
    """A windowed ViT and the simple feature pyramid p2 to p6 (strides 4 to 64) made of its token map."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = WindowedViT(config)
        dim, out = config.dim, config.channels
        up4 = [
            nn.ConvTranspose2d(dim, dim // 2, 2, 2),
            LayerNorm2d(dim // 2, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        ]
        self.simfp_2 = nn.Sequential(*up4, ConvNorm(dim // 4, out, 1), ConvNorm(out, out, 3))
        up2 = nn.ConvTranspose2d(dim, dim // 2, 2, 2)
        self.simfp_3 = nn.Sequential(up2, ConvNorm(dim // 2, out, 1), ConvNorm(out, out, 3))
        self.simfp_4 = nn.Sequential(ConvNorm(dim, out, 1), ConvNorm(out, out, 3))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, 2), ConvNorm(dim, out, 1), ConvNorm(out, out, 3))

    @property
    def stages(self) -> list[nn.Sequential]:
        """Those that make p2 to p5 of the token map."""
        return [self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5]

    def pyramid(self, tokens: Tensor) -> list[Tensor]:
        """Token map `(B, D, H, W)` to the levels p2 to p6, each `(B, channels, h, w)`."""
        levels = [stage(tokens) for stage in self.stages]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, h, w)` to the levels p2 to p6."""
        return self.pyramid(self.net(images))
