"""What a Vision Transformer is made of: one description of timm's SAM ViT and plain ViT and of detectron2's ViT.

It refers to the network's own modules and owns no parameters. It is built once; a copy of a network (`copy.deepcopy`,
pickling) that holds its description takes it along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.macs import ViTShape
from eventful_det.gating.windows import Grid

_SUPPORTED = "timm VisionTransformerSAM, timm VisionTransformer (class token, no windows) and detectron2 ViT"


@dataclass(frozen=True)
class Block:
    """One pre-norm Transformer block: x += proj(attention(qkv(norm1(x)))), x += mlp(norm2(x)).

    Attributes:
        module: the whole block.
        norm1, norm2: token-wise norms.
        qkv: `(r, D) -> (r, 3, heads, d)`.
        proj, mlp: `(r, D) -> (r, D)`, each with its layer scale.
        layers: the linear layers of qkv, proj and mlp.
        heads: number of attention heads.
        window: side of the attention windows in tokens; 0 = global attention.
        rel_pos: gives the relative position tables `(2 * size - 1, d)` along y and x; or None.
    """

    module: nn.Module
    norm1: nn.Module
    qkv: Callable[[Tensor], Tensor]
    proj: Callable[[Tensor], Tensor]
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]
    layers: tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...], tuple[nn.Linear, ...]]
    heads: int
    window: int = 0
    rel_pos: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.layers[0][0].in_features

    @property
    def weights(self) -> tuple[int, ...]:
        """Weights of the linear layers of qkv, proj and mlp."""
        return tuple(sum(layer.weight.numel() for layer in layers) for layers in self.layers)

    @property
    def weight(self) -> Tensor:
        """A parameter, for its device and type."""
        return self.layers[0][0].weight

    def padding_qkv(self) -> Tensor:
        """qkv of a padded token, which is zero after the norm, `(3, heads, d)`."""
        biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in self.layers[0]]
        return torch.cat(biases).view(3, self.heads, -1)

    def tables(self, shape: Grid) -> list[Tensor]:
        """Relative position tables along y and x for windows of `shape` tokens; or none. See `resize_table`."""
        tables = () if self.rel_pos is None else self.rel_pos()
        return [resize_table(table.detach(), size) for table, size in zip(tables, shape, strict=False)]


class PatchEmbedding(Protocol):
    """An `nn.Conv2d` whose kernel equals its stride, or what looks like one."""

    kernel_size: Any
    stride: Any
    in_channels: int
    out_channels: int

    @property
    def weight(self) -> Tensor:
        """`(D, channels, patch, patch)`."""

    @property
    def bias(self) -> Tensor | None:
        """`(D,)`, or None."""

    def __call__(self, x: Tensor, /) -> Any:
        """`(B, channels, h, w)` to `(B, D, H, W)`."""


@dataclass(frozen=True)
class ViTSpec:
    """A Vision Transformer as the update rules see it.

    Attributes:
        projection: the patch embedding, a convolution whose kernel equals its stride.
        positions: position encoding of a token grid, `(H, W) -> (H * W, D)`, or None.
        prefix: class and register tokens with their positions, `() -> (p, D)`, or None.
        blocks: the Transformer blocks in order.
        norm: token-wise norm after the last block.
        maps: whether the dense blocks take token maps `(B, H, W, D)` rather than sequences `(B, L, D)`.
    """

    projection: PatchEmbedding
    positions: Callable[[Grid], Tensor] | None
    prefix: Callable[[], Tensor] | None
    blocks: tuple[Block, ...]
    norm: nn.Module
    maps: bool

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.projection.kernel_size[0])

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.projection.out_channels

    @cached_property
    def prefix_count(self) -> int:
        """Number of class and register tokens."""
        return 0 if self.prefix is None else self.prefix().shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.projection.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.projection.weight.device

    @property
    def window(self) -> int:
        """Side of the windows of windowed blocks, in tokens; 0 = there are none."""
        return max(block.window for block in self.blocks)

    @cached_property
    def shape(self) -> ViTShape:
        """The sizes that costs depend on.

        Raises:
            UserError: the blocks differ in more than being windowed or global.
        """
        sizes = {(b.heads, b.weights, b.rel_pos is None) for b in self.blocks}
        _require(len(sizes) == 1, "a network whose blocks differ in more than their windows")
        return ViTShape(
            depth=len(self.blocks),
            dim=self.dim,
            heads=self.blocks[0].heads,
            linear=sum(self.blocks[0].weights),
            window=self.window,
            global_blocks=tuple(i for i, block in enumerate(self.blocks) if not block.window),
            patch=self.patch,
            channels=self.projection.in_channels,
            rel_pos=self.blocks[0].rel_pos is not None,
            prefix=self.prefix_count,
        )

    def grid(self, height: int, width: int) -> Grid:
        """Token grid of a frame of `height` x `width` pixels, padded to whole patches."""
        return -(-height // self.patch), -(-width // self.patch)

    def pad(self, frame: Tensor) -> Tensor:
        """A frame `(C, h, w)`, zero-padded at the bottom and right to whole patches, in the network's type."""
        rows, cols = self.grid(*frame.shape[1:])
        below, right = rows * self.patch - frame.shape[1], cols * self.patch - frame.shape[2]
        frame = frame.to(self.dtype)
        return F.pad(frame, (0, right, 0, below)) if below or right else frame

    def patches(self, frame: Tensor) -> Tensor:
        """Cut a normalised frame `(C, h, w)` into patches `(N, C * patch^2)`."""
        (rows, cols), p = self.grid(*frame.shape[1:]), self.patch
        x = self.pad(frame).unflatten(2, (cols, p)).unflatten(1, (rows, p))  # (C, H, p, W, p)
        return x.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)  # (H * W, C * p * p)

    def embed(self, patches: Tensor) -> Tensor:
        """Patch embedding without positions, `(r, C * patch^2) -> (r, D)`."""
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)

    def dense(self, frame: Tensor) -> tuple[Tensor, Tensor | None]:
        """The dense network on a normalised frame `(C, h, w)`: tokens `(H, W, C)` and prefix tokens `(p, C)`."""
        x = self.projection(self.pad(frame)[None]).permute(0, 2, 3, 1)  # (1, H, W, D)
        grid = (x.shape[1], x.shape[2])
        if self.positions is not None:
            x = x + self.positions(grid).unflatten(0, grid)
        if not self.maps:
            x = x.flatten(1, 2)  # (1, N, D)
            x = x if self.prefix is None else torch.cat([self.prefix()[None], x], 1)  # (1, L, D)
        for block in self.blocks:
            x = block.module(x)
        x = self.norm(x)[0]
        if self.maps:
            return x, None
        prefix, tokens = x.tensor_split([self.prefix_count])
        return tokens.unflatten(0, grid), prefix if self.prefix_count else None


def spec_of(vit: nn.Module) -> ViTSpec:
    """The description of a supported network.

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

    Example: for two tokens a table holds the embeddings of the offsets -1, 0 and 1; the result is
    `[[e(0), e(-1)], [e(1), e(0)]]`.

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


def _checked(vit: ViTSpec) -> ViTSpec:
    windows = sorted({block.window for block in vit.blocks if block.window})
    _require(len(windows) < 2, f"windows of more than one size ({windows})")
    size, stride = vit.projection.kernel_size, vit.projection.stride
    _require(size == stride and size[0] == size[1], f"a patch embedding of size {size} and stride {stride}")
    return vit


# The parts below are partials of functions and not closures: they can be copied and pickled with their network.


def _fused_qkv(attention: Any, x: Tensor) -> Tensor:
    return attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))


def _scaled(module: nn.Module, scale: nn.Module, x: Tensor) -> Tensor:
    return scale(module(x))


def _rel_pos(attention: Any) -> tuple[Tensor, Tensor]:
    return attention.rel_pos_h, attention.rel_pos_w


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
    scales = [nn.Identity() if getattr(block, name, None) is None else getattr(block, name) for name in ("ls1", "ls2")]
    return Block(
        module=block,
        norm1=block.norm1,
        qkv=partial(_fused_qkv, attn),
        proj=partial(_scaled, attn.proj, scales[0]),
        norm2=block.norm2,
        mlp=partial(_scaled, mlp, scales[1]),
        layers=((attn.qkv,), (attn.proj,), (mlp.fc1, mlp.fc2)),
        heads=attn.num_heads,
        window=window,
        rel_pos=partial(_rel_pos, attn) if getattr(attn, "use_rel_pos", False) else None,
    )


def _sam_positions(vit: Any, antialias: bool, grid: Grid) -> Tensor:
    return resize_positions(vit.pos_embed[0], grid, antialias)


def _timm_sam(vit: Any) -> ViTSpec:
    _require(_identity(vit.norm_pre), "a norm before the blocks")
    antialias = getattr(vit, "position_antialias", True)
    return ViTSpec(
        projection=_timm_patches(vit),
        positions=None if vit.pos_embed is None else partial(_sam_positions, vit, antialias),
        prefix=None,
        blocks=tuple(_timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
        maps=True,
    )


def _plain_positions(vit: Any, skip: int, grid: Grid) -> Tensor:
    return resize_positions(vit.pos_embed[0, skip:].unflatten(0, vit.patch_embed.grid_size), grid, antialias=True)


def _plain_prefix(vit: Any, skip: int) -> Tensor:
    tokens = torch.cat([t[0] for t in (vit.cls_token, vit.reg_token) if t is not None])
    return tokens + vit.pos_embed[0, :skip] if skip else tokens


def _timm_plain(vit: Any) -> ViTSpec:
    _require(_identity(vit.norm_pre), "a norm before the blocks")
    _require(not hasattr(vit, "dist_token"), "a distillation token")
    skip = 0 if vit.no_embed_class or vit.pos_embed is None else vit.num_prefix_tokens
    return ViTSpec(
        projection=_timm_patches(vit),
        positions=None if vit.pos_embed is None else partial(_plain_positions, vit, skip),
        prefix=partial(_plain_prefix, vit, skip) if vit.num_prefix_tokens else None,
        blocks=tuple(_timm_block(block, 0) for block in vit.blocks),
        norm=vit.norm,
        maps=False,
    )


def _detectron2_positions(vit: Any, grid: Grid) -> Tensor:
    encoding = vit.pos_embed[0, int(vit.pretrain_use_cls_token) :]
    side = int(encoding.shape[0] ** 0.5)
    return resize_positions(encoding.unflatten(0, (side, side)), grid, antialias=False)


def _detectron2(vit: Any) -> ViTSpec:
    for block in vit.blocks:
        _require(not getattr(block, "use_residual_block", False), "a residual convolution block")
    return ViTSpec(
        projection=vit.patch_embed.proj,
        positions=None if vit.pos_embed is None else partial(_detectron2_positions, vit),
        prefix=None,
        blocks=tuple(_timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
        maps=True,
    )
