"""Parts that blocks are put together from.

Descriptions hold partials of them and no closures, so that they can be copied and pickled with their network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from eventful_det.gating.spec import resize_positions
from eventful_det.gating.windows import Grid


def is_identity(module: object) -> bool:
    """Whether a part is missing or does nothing."""
    return module is None or isinstance(module, nn.Identity)


def linears(*modules: nn.Module | None) -> tuple[nn.Linear, ...]:
    """The linear layers of some parts."""
    return tuple(x for module in modules if module is not None for x in module.modules() if isinstance(x, nn.Linear))


def call(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    """A block that takes tokens alone."""
    result: Tensor = block(x)
    return result


def fused_qkv(linear: nn.Module, heads: int, x: Tensor) -> Tensor:
    """`(r, D) -> (r, 3, heads, d)` by one linear layer."""
    qkv: Tensor = linear(x)
    return qkv.unflatten(-1, (3, heads, -1))


def separate_qkv(linears: Sequence[nn.Module], heads: int, x: Tensor) -> Tensor:
    """`(r, D) -> (r, 3, heads, d)` by three linear layers."""
    return torch.stack([linear(x) for linear in linears], 1).unflatten(-1, (heads, -1))


def norm_qk(q_norm: nn.Module, k_norm: nn.Module, qkv: Tensor) -> Tensor:
    """`(r, 3, heads, d)` with queries and keys normed."""
    q, k, v = qkv.unbind(1)  # (r, heads, d) each
    return torch.stack([q_norm(q), k_norm(k), v], 1)


def then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Two functions of tokens, one after the other."""
    return second(first(x))


def scaled(module: nn.Module, scale: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A part and its layer scale."""
    return scale(module(x))


def times(block: nn.Module, name: str, x: Tensor) -> Tensor:
    """A layer scale that is a parameter of its block, or None."""
    scale: Tensor | None = getattr(block, name)
    return x if scale is None else x * scale


def relative_positions(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Relative position tables along y and x."""
    return cast(Tensor, attention.rel_pos_h), cast(Tensor, attention.rel_pos_w)


def square_positions(module: nn.Module, name: str, skip: int, antialias: bool, grid: Grid) -> Tensor:
    """Position encoding of a grid from that of a square, which follows `skip` prefix tokens: `(H * W, D)`."""
    encoding: Tensor = getattr(module, name)[0, skip:]
    side = int(len(encoding) ** 0.5)
    return resize_positions(encoding.unflatten(0, (side, side)), grid, antialias)
