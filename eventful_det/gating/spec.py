"""What a Vision Transformer is made of: one description for all families.

It refers to the network's own modules and owns no parameters. It is built once; a copy of a network (`copy.deepcopy`,
pickling) that holds its description takes it along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.macs import ViTShape
from eventful_det.gating.windows import Grid, Regions, Side, windows_of


@dataclass(frozen=True)
class Block:
    """One pre-norm Transformer block: x += proj(attention(qkv(norm1(x)))), x += mlp(norm2(x)).

    Attributes:
        norm1, norm2: token-wise norms.
        qkv: `(r, D) -> (r, 3, heads, d)`, with the norms of queries and keys.
        proj, mlp: `(r, D) -> (r, D)`, each with its layer scale.
        layers: the linear layers of qkv, proj and mlp.
        heads: number of attention heads.
        window: of attention; 0 = global attention.
        rel_pos: gives the relative position tables `(2 * size - 1, d)` along y and x; or None.
        qk_norm: the norms of queries and keys in `qkv`, on `(r, 3, heads, d)`; or None.
        run: the block's own forward, on what `ViTSpec.layout` says, with the sines and cosines `(N, 2, d)` of rotary
            positions or None.
    """

    norm1: nn.Module
    qkv: Callable[[Tensor], Tensor]
    proj: Callable[[Tensor], Tensor]
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]
    layers: tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...], tuple[nn.Linear, ...]]
    heads: int
    window: Side = 0
    rel_pos: Callable[[], tuple[Tensor, Tensor]] | None = None
    qk_norm: Callable[[Tensor], Tensor] | None = None
    run: Callable[[Tensor, Tensor | None], Tensor] | None = None

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
        qkv = torch.cat(biases).view(1, 3, self.heads, -1)
        return (qkv if self.qk_norm is None else self.qk_norm(qkv))[0]

    def tables(self, shape: Grid) -> list[Tensor]:
        """Relative position tables along y and x for windows of `shape` tokens; or none. See `resize_table`."""
        tables = () if self.rel_pos is None else self.rel_pos()
        return [resize_table(table.detach(), size) for table, size in zip(tables, shape, strict=False)]


class PatchEmbedding(Protocol):
    """An `nn.Conv2d` whose kernel equals its stride, or what looks like one."""

    in_channels: int
    out_channels: int

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Rows and columns of pixels."""

    @property
    def stride(self) -> tuple[int, ...]:
        """Rows and columns of pixels."""

    @property
    def padding(self) -> str | int | tuple[int, ...]:
        """None, in one way or another."""

    @property
    def weight(self) -> Tensor:
        """`(D, channels, patch, patch)`."""

    @property
    def bias(self) -> Tensor | None:
        """`(D,)`, or None."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """`(B, channels, h, w)` to `(B, D, H, W)`."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the patch tokens; prefix tokens have none.

    Attributes:
        table: sines and cosines of a token grid, `(H, W) -> (N, 2, d)`.
        half: how components are paired, see `rotate`.
    """

    table: Callable[[Grid], Tensor]
    half: bool


@dataclass(frozen=True)
class ViTSpec:
    """A Vision Transformer as the update rules see it.

    Attributes:
        projection: the patch embedding, a convolution whose kernel equals its stride.
        positions: position encoding of a token grid, `(H, W) -> (H * W, D)`, or None.
        prefix: class and register tokens with their positions, `() -> (p, D)`, or None. Where windows are regions,
            each has tokens of its own, window by window.
        blocks: the Transformer blocks in order.
        norm: token-wise norm of the outputs.
        layout: what the dense blocks take: "maps" `(1, H, W, D)`, a "sequence" `(1, L, D)`, or "windows"
            `(windows, p / windows + slots, D)`.
        norm_pre: token-wise norm before the blocks.
        rope: rotary positions, or None.
        outputs: after how many blocks a feature map is taken, ascending; () = after the last.
        regions: regions along each side of the frame, each with prefix tokens of its own; 1 = the frame.
        pixel_std: what pixels in [0, 1] were divided by on average; errors are told as if it were 0.5.
    """

    projection: PatchEmbedding
    positions: Callable[[Grid], Tensor] | None
    prefix: Callable[[], Tensor] | None
    blocks: tuple[Block, ...]
    norm: nn.Module
    layout: Literal["maps", "sequence", "windows"]
    norm_pre: nn.Module = field(default_factory=nn.Identity)
    rope: Rope | None = None
    outputs: tuple[int, ...] = ()
    regions: int = 1
    pixel_std: float = 0.5

    def __post_init__(self) -> None:
        outputs = self.outputs or (len(self.blocks),)
        object.__setattr__(self, "outputs", outputs)
        object.__setattr__(self, "blocks", self.blocks[: outputs[-1]])  # no output needs the others

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.projection.kernel_size[0])

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.projection.out_channels

    @property
    def width(self) -> int:
        """Width C of the outputs of a token, those of several blocks one after another."""
        return len(self.outputs) * self.dim

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
    def window(self) -> Side:
        """Windows of windowed blocks; 0 = there are none."""
        return next((block.window for block in self.blocks if block.window), 0)

    @cached_property
    def shape(self) -> ViTShape:
        """The sizes that costs depend on.

        Raises:
            UserError: the blocks differ in more than being windowed or global.
        """
        sizes = {(b.heads, b.weights, b.rel_pos is None) for b in self.blocks}
        require(len(sizes) == 1, "a network whose blocks differ in more than their windows")
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
        """Token grid of a frame of `height` x `width` pixels, padded to whole patches and whole regions."""
        side = self.patch * self.regions
        return -(-height // side) * self.regions, -(-width // side) * self.regions

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

    def rotations(self, grid: Grid) -> Tensor | None:
        """Sines and cosines `(p + N, 2, d)` of rotary positions, none (0 and 1) of the prefix tokens; or None."""
        if self.rope is None:
            return None
        table = self.rope.table(grid).detach()
        none = table.new_tensor([0.0, 1.0])[:, None].expand(self.prefix_count, 2, table.shape[-1])
        return torch.cat([none, table])

    def require_plain(self, what: str) -> None:
        """Refuse what only the `Rows` rule and the dense network know.

        Raises:
            UserError: the network has rotary positions, regions or several output blocks.
        """
        for there, part in (
            (self.rope is not None, "rotary positions"),
            (self.regions > 1, "windows that are regions of the frame"),
            (len(self.outputs) > 1, "several output blocks"),
        ):
            if there:
                raise UserError(f"{what} does not support a network with {part}; use the rows rule")

    def dense(self, frame: Tensor) -> tuple[Tensor, Tensor | None]:
        """The dense network on a normalised frame `(3, h, w)`: outputs `(H, W, C)`, and of prefix tokens `(p, C)`."""
        x = self.projection(self.pad(frame)[None]).permute(0, 2, 3, 1)  # (1, H, W, D)
        grid = (x.shape[1], x.shape[2])
        if self.positions is not None:
            x = x + self.positions(grid).unflatten(0, grid)
        if self.layout != "maps":
            x = x.flatten(1, 2)  # (1, N, D)
            x = x if self.prefix is None else torch.cat([self.prefix()[None], x], 1)  # (1, L, D)
        x = self.norm_pre(x)
        if self.layout == "windows":
            x = self._partition(x[0], grid)  # (windows, p / windows + slots, D)
        rope, outputs = None if self.rope is None else self.rope.table(grid), []
        for i, block in enumerate(self.blocks):
            assert block.run is not None
            x = block.run(x, rope)
            if i + 1 in self.outputs:
                outputs.append(self.norm(x))
        x = torch.cat(outputs, -1)
        if self.layout == "maps":
            return x[0], None
        x = self._merge(x, grid) if self.layout == "windows" else x[0]  # (L, C)
        prefix, tokens = x[: self.prefix_count], x[self.prefix_count :]  # `tensor_split` goes wrong in ONNX
        return tokens.unflatten(0, grid), prefix if self.prefix_count else None

    def _partition(self, x: Tensor, grid: Grid) -> Tensor:
        """A sequence `(L, D)` by windows `(windows, p / windows + slots, D)`."""
        windows = windows_of(grid, Regions(self.regions), x.device)
        prefix, tokens = x[: self.prefix_count], x[self.prefix_count :]  # `tensor_split` goes wrong in ONNX
        tokens = tokens.index_select(0, windows.token).unflatten(0, (windows.count, -1))
        return torch.cat([prefix.view(windows.count, -1, x.shape[-1]), tokens], 1) if len(prefix) else tokens

    def _merge(self, x: Tensor, grid: Grid) -> Tensor:
        """The inverse of `_partition`."""
        windows = windows_of(grid, Regions(self.regions), x.device)
        each = self.prefix_count // windows.count
        prefix, tokens = x[:, :each], x[:, each:]
        return torch.cat([prefix.flatten(0, 1), tokens.flatten(0, 1).index_select(0, windows.place)])


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


def require(condition: bool, what: str) -> None:
    """Refuse a network.

    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(f"cannot make this ViT eventful: {what} is not supported")


Families = dict[tuple[str, str], Callable[[Any], ViTSpec]]
"""How networks are described, by the beginning of their class's module and its name, which may be that of a base."""
