"""One view of the vision transformers that can be made eventful: timm's SAM ViT and plain ViT, detectron2's ViT.

The view refers to the network's own modules and parameters; it owns none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError

Grid = tuple[int, int]  # (rows, columns) of tokens

_SUPPORTED = "timm VisionTransformerSAM, timm VisionTransformer (class token, no windows) and detectron2 ViT"


@dataclass(frozen=True)
class Block:
    """The parts of one pre-norm Transformer block.

    Attributes:
        heads: number of attention heads.
        window: side of the attention windows in tokens; 0 = global attention.
        rel_pos: relative position tables `(2 * size - 1, D / heads)` along y and x, or None.
    """

    norm1: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    fc1: nn.Linear
    activation: nn.Module
    fc2: nn.Linear
    heads: int
    window: int = 0
    rel_pos: tuple[Tensor, Tensor] | None = None
    scale1: nn.Module | None = None
    scale2: nn.Module | None = None

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.qkv.in_features

    def project(self, x: Tensor) -> Tensor:
        """Output projection of the attention, with its layer scale, `(r, D)`."""
        x = self.proj(x)
        return x if self.scale1 is None else self.scale1(x)

    def mlp(self, x: Tensor) -> Tensor:
        """The token-wise MLP after its layer norm, with its layer scale, `(r, D)`."""
        x = self.fc2(self.activation(self.fc1(x)))
        return x if self.scale2 is None else self.scale2(x)

    @property
    def padding_qkv(self) -> Tensor:
        """qkv of a padded (zero) token `(3 D,)`: the bias."""
        if self.qkv.bias is None:
            return self.qkv.weight.new_zeros(3 * self.dim)
        return self.qkv.bias.detach()


@dataclass(frozen=True)
class Anatomy:
    """A Vision Transformer as the gating rules see it.

    Attributes:
        projection: the patch embedding, a convolution whose kernel equals its stride.
        positions: position encoding of a token grid, `(H, W) -> (H * W, D)`, or None.
        prefix: class and register tokens with their positions, `() -> (p, D)`, or None.
        blocks: the Transformer blocks in order.
        norm: token-wise norm after the last block.
    """

    projection: nn.Conv2d
    positions: Callable[[Grid], Tensor] | None
    prefix: Callable[[], Tensor] | None
    blocks: tuple[Block, ...]
    norm: nn.Module

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.projection.kernel_size[0])

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.projection.out_channels

    @property
    def prefix_count(self) -> int:
        """Number of class and register tokens."""
        return 0 if self.prefix is None else self.prefix().shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def grid(self, height: int, width: int) -> Grid:
        """Token grid of a frame of `height` x `width` pixels, padded to whole patches."""
        return -(-height // self.patch), -(-width // self.patch)

    def patches(self, frame: Tensor) -> Tensor:
        """Cut a normalised frame `(C, h, w)` into patches `(N, C * patch^2)`; zero padding to whole patches."""
        channels, height, width = frame.shape
        rows, cols = self.grid(height, width)
        p = self.patch
        if (height, width) != (rows * p, cols * p):
            frame = F.pad(frame, (0, cols * p - width, 0, rows * p - height))
        return frame.view(channels, rows, p, cols, p).permute(1, 3, 0, 2, 4).reshape(rows * cols, channels * p * p)

    def embed(self, patches: Tensor) -> Tensor:
        """Patch embedding without positions, `(r, C * patch^2) -> (r, D)`."""
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


def anatomy_of(vit: nn.Module) -> Anatomy:
    """The anatomy of a supported network.

    Raises:
        UserError: the network is of another kind, or uses a part whose result is not token-wise.
    """
    name, module = type(vit).__name__, type(vit).__module__
    for base in type(vit).__mro__:
        if base.__module__ == "timm.models.vision_transformer_sam" and base.__name__ == "VisionTransformerSAM":
            return _checked(_timm_sam(vit))
        if base.__module__ == "timm.models.vision_transformer" and base.__name__ == "VisionTransformer":
            return _checked(_timm_plain(vit))
        if base.__module__.startswith("detectron2.") and base.__name__ == "ViT":
            return _checked(_detectron2(vit))
    raise UserError(f"cannot make {module}.{name} eventful; supported: {_SUPPORTED}")


def resize_positions(positions: Tensor, grid: Grid, antialias: bool) -> Tensor:
    """Resize a position encoding `(H, W, D)` bicubically to `grid`; returns `(rows * cols, D)`."""
    if positions.shape[:2] != grid:
        image = positions.float().permute(2, 0, 1)[None]
        image = F.interpolate(image, grid, mode="bicubic", align_corners=False, antialias=antialias)
        positions = image[0].permute(1, 2, 0).to(positions.dtype)
    return positions.reshape(grid[0] * grid[1], -1)


def resize_table(table: Tensor, size: int) -> Tensor:
    """Relative position embeddings along one axis, for `size` tokens.

    Args:
        table: `(2 * n - 1, d)`; resized linearly when n is not `size`, as detectron2 does.
        size: tokens along the axis.

    Returns:
        `(2 * size - 1, d)`, indexed by query minus key position plus `size` - 1.
    """
    if table.shape[0] == 2 * size - 1:
        return table
    return F.interpolate(table.float().T[None], 2 * size - 1, mode="linear")[0].T.to(table.dtype)


def relative_table(table: Tensor, size: int) -> Tensor:
    """Relative position embeddings of all pairs along one axis.

    Args:
        table: see `resize_table`.
        size: tokens along the axis.

    Returns:
        `(size, size, d)`, indexed by query then key position.
    """
    axis = torch.arange(size, device=table.device)
    return resize_table(table, size)[axis[:, None] - axis[None, :] + size - 1]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UserError(f"cannot make this ViT eventful: {what} is not supported")


def _identity(module: object) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _checked(anatomy: Anatomy) -> Anatomy:
    windows = sorted({block.window for block in anatomy.blocks if block.window})
    _require(len(windows) < 2, f"windows of more than one size ({windows})")
    size, stride = anatomy.projection.kernel_size, anatomy.projection.stride
    _require(size == stride and size[0] == size[1], f"a patch embedding of size {size} and stride {stride}")
    return anatomy


def _timm_patches(vit: Any) -> nn.Conv2d:
    embedding = vit.patch_embed
    _require(type(embedding).__name__ == "PatchEmbed", f"a patch embedding of type {type(embedding).__name__}")
    _require(_identity(embedding.norm), "a norm after the patch embedding")
    return embedding.proj


def _timm_block(block: Any, window: int) -> Block:
    _require(type(block).__name__ == "Block", f"a block of type {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    _require(type(attn).__name__ == "Attention", f"attention of type {type(attn).__name__}")
    _require(type(mlp).__name__ == "Mlp", f"an MLP of type {type(mlp).__name__}")
    _require(attn.qkv.out_features == 3 * attn.qkv.in_features, "attention of another width than the tokens")
    for extra in ("q_norm", "k_norm", "norm"):
        _require(_identity(getattr(attn, extra, None)), f"attention with {extra}")
    for extra in ("rope", "gate"):
        _require(getattr(attn, extra, None) is None, f"attention with {extra}")
    _require(_identity(getattr(mlp, "norm", None)), "an MLP with norm")
    return Block(
        norm1=block.norm1,
        qkv=attn.qkv,
        proj=attn.proj,
        norm2=block.norm2,
        fc1=mlp.fc1,
        activation=mlp.act,
        fc2=mlp.fc2,
        heads=attn.num_heads,
        window=window,
        rel_pos=(attn.rel_pos_h, attn.rel_pos_w) if getattr(attn, "use_rel_pos", False) else None,
        scale1=None if _identity(getattr(block, "ls1", None)) else block.ls1,
        scale2=None if _identity(getattr(block, "ls2", None)) else block.ls2,
    )


def _timm_sam(vit: Any) -> Anatomy:
    _require(_identity(vit.norm_pre), "a norm before the blocks")
    encoding, antialias = vit.pos_embed, getattr(vit, "position_antialias", True)
    return Anatomy(
        projection=_timm_patches(vit),
        positions=None if encoding is None else lambda grid: resize_positions(encoding[0], grid, antialias),
        prefix=None,
        blocks=tuple(_timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
    )


def _timm_plain(vit: Any) -> Anatomy:
    _require(_identity(vit.norm_pre), "a norm before the blocks")
    _require(not hasattr(vit, "dist_token"), "a distillation token")
    skip = 0 if vit.no_embed_class or vit.pos_embed is None else vit.num_prefix_tokens
    side = vit.patch_embed.grid_size

    def positions(grid: Grid) -> Tensor:
        return resize_positions(vit.pos_embed[0, skip:].unflatten(0, side), grid, antialias=True)

    def prefix() -> Tensor:
        tokens = torch.cat([t[0] for t in (vit.cls_token, vit.reg_token) if t is not None])
        return tokens + vit.pos_embed[0, :skip] if skip else tokens

    return Anatomy(
        projection=_timm_patches(vit),
        positions=None if vit.pos_embed is None else positions,
        prefix=prefix if vit.num_prefix_tokens else None,
        blocks=tuple(_timm_block(block, 0) for block in vit.blocks),
        norm=vit.norm,
    )


def _detectron2(vit: Any) -> Anatomy:
    for block in vit.blocks:
        _require(not getattr(block, "use_residual_block", False), "a residual convolution block")
    skip = int(vit.pretrain_use_cls_token)

    def positions(grid: Grid) -> Tensor:
        encoding = vit.pos_embed[0, skip:]
        side = int(encoding.shape[0] ** 0.5)
        return resize_positions(encoding.unflatten(0, (side, side)), grid, antialias=False)

    return Anatomy(
        projection=vit.patch_embed.proj,
        positions=None if vit.pos_embed is None else positions,
        prefix=None,
        blocks=tuple(_timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
    )
