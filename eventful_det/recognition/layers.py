"""The parts of a factorised ViViT, under the official parameter names, and how the update rules see them."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.gating.macs import ViTShape, dense_macs
from eventful_det.gating.spec import Block, resize_positions
from eventful_det.gating.vit_spec.parts import call
from eventful_det.gating.windows import Grid

EPSILON = 1e-6  # of layer norms


class TubeletEmbedding(nn.Module):
    """Tubelets to tokens: a 3-D convolution, which is a 2-D patch embedding of frames of c * tt channels.

    It has the attributes of that `nn.Conv2d`, so that the update rules take it for one.
    """

    def __init__(self, channels: int, dim: int, tubelet: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, dim, tubelet, stride=tubelet)
        self.kernel_size, self.stride, self.padding = tubelet[1:], tubelet[1:], 0
        self.in_channels, self.out_channels = channels * tubelet[0], dim

    @property
    def weight(self) -> Tensor:
        """`(D, c * tt, th, tw)`, a view; channels outside, time inside."""
        return self.conv.weight.flatten(1, 2)

    @property
    def bias(self) -> Tensor | None:
        """`(D,)`."""
        return self.conv.bias

    def forward(self, frames: Tensor) -> Tensor:
        """`(B, c * tt, h, w)` to `(B, D, H, W)`."""
        return F.conv2d(frames, self.weight, self.bias, self.stride)


class PositionEncoding(nn.Module):
    """Learned positions, those of the class token first."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.encoding = nn.Parameter(torch.zeros(1, 1 + tokens, dim))


class TransformerBlock(nn.Module):
    """A pre-norm block with global attention."""

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layer_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.mlp_layer_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp_1 = nn.Linear(dim, mlp)
        self.mlp_2 = nn.Linear(mlp, dim)

    def heads_of(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., 3, heads, d)`."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))

    def mlp(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return cast(Tensor, self.mlp_2(F.gelu(self.mlp_1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, L, D)`."""
        # Not one permutation of all three: OpenVINO gets that wrong where there are as many tokens as heads.
        qkv = self.heads_of(self.input_layer_norm(x))  # (B, L, 3, heads, d)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, L, d) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)
        x = x + self.projection(attended)
        return x + self.mlp(self.mlp_layer_norm(x))

    def described(self) -> Block:
        """The block as the update rules see it."""
        return Block(
            norm1=self.input_layer_norm,
            qkv=partial(TransformerBlock.heads_of, self),
            proj=self.projection,
            norm2=self.mlp_layer_norm,
            mlp=partial(TransformerBlock.mlp, self),
            layers=((self.qkv,), (self.projection,), (self.mlp_1, self.mlp_2)),
            heads=self.heads,
            run=partial(call, self),
        )


class Backbone(nn.Module):
    """Positions and blocks."""

    def __init__(self, tokens: int, dim: int, depth: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.position_encoding = PositionEncoding(tokens, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp) for _ in range(depth))


class SubModel(nn.Module):
    """The spatial or the temporal model: tokens in, the class token out.

    Args:
        grid: tokens that its positions are made for; `(1, T')` in time.
        dim, depth, heads, mlp: sizes.
    """

    def __init__(self, grid: Grid, dim: int, depth: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.grid = grid
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.backbone = Backbone(grid[0] * grid[1], dim, depth, heads, mlp)
        self.layer_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.shape = ViTShape(depth, dim, heads, linear=4 * dim**2 + 2 * dim * mlp, channels=0, prefix=1)

    def positions(self, grid: Grid) -> Tensor:
        """Positions of tokens on a grid, `(N, D)`."""
        encoding = self.backbone.position_encoding.encoding[0, 1:]
        return resize_positions(encoding.unflatten(0, self.grid), grid, antialias=False)

    def prefix(self) -> Tensor:
        """The class token with its position, `(1, D)`."""
        return self.class_token[0] + self.backbone.position_encoding.encoding[0, :1]

    def embed(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens `(..., N, D)` behind the class token, with positions: `(..., 1 + N, D)`."""
        prefix = self.prefix().expand(*x.shape[:-2], 1, -1)
        return torch.cat([prefix, x + self.positions(grid)], -2)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Tokens `(B, N, D)` on a grid (its own if None) to class tokens `(B, D)`."""
        x = self.embed(x, grid or self.grid)
        for block in self.backbone.blocks:
            x = block(x)
        return cast(Tensor, self.layer_norm(x[:, 0]))

    def blocks(self) -> tuple[Block, ...]:
        """The blocks as the update rules see them."""
        return tuple(cast(TransformerBlock, block).described() for block in self.backbone.blocks)

    def macs(self, grid: Grid | None = None) -> int:
        """Multiply-adds of the dense model on a grid, its own if None; it embeds nothing."""
        return dense_macs(self.shape, grid or self.grid).total
