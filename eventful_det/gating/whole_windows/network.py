"""The dense network on some windows of a frame: a function of tensors, in PyTorch and in compiled graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import TensorTree
from eventful_det.gating.windows import Grid, windows_of
from eventful_det.gating.windows import Windows as Places

_NO_KEY = -1e9  # bias of a padded key


@dataclass
class WindowTables(TensorTree):
    """What depends on the weights and the grid alone.

    Attributes:
        positions: `(windows, slots, D)` position encodings, or None.
        inside: `(windows, slots, 1)` 0 at padded places, else 1; None where there are none.
        offsets: where queries find their relative positions in a table, `(slots, 2 side)` in windowed blocks and
            `(windows, slots, rows + columns)` in global ones, those to padded keys included; None without them.
        relative: per block a table of relative positions, those along y and then along x; or None.
    """

    positions: Tensor | None
    inside: Tensor | None
    offsets: tuple[Tensor, Tensor] | None
    relative: list[Tensor | None]


def tables_of(vit: ViTSpec, grid: Grid) -> WindowTables:
    """What `run_windows` needs at a grid."""
    places = windows_of(grid, vit.window, vit.device)
    by_window = (places.count, places.slots)
    positions = None if vit.positions is None else vit.positions(grid).detach()
    inside = torch.zeros(places.count * places.slots, 1, device=vit.device, dtype=vit.dtype)
    inside.index_fill_(0, places.place, 1)
    tables = [block.tables(places.shape if block.window else grid) for block in vit.blocks]
    return WindowTables(
        positions=None if positions is None else positions.index_select(0, places.token).unflatten(0, by_window),
        inside=None if len(places.token) == len(places.window) else inside.unflatten(0, by_window),
        offsets=_offsets(grid, places, vit.device) if vit.shape.rel_pos else None,
        relative=[torch.cat(pair) if pair else None for pair in tables],
    )


def _offsets(grid: Grid, places: Places, device: torch.device) -> tuple[Tensor, Tensor]:
    """`WindowTables.offsets`: a table holds the offsets along y from -(rows - 1), then those along x."""
    side = places.shape[0]
    return _offsets_of(places.shape, side, device)[0], _offsets_of(grid, side, device)


def _offsets_of(shape: Grid, side: int, device: torch.device) -> Tensor:
    """`(windows, slots, rows + columns)` for all pairs of tokens of a map of this shape, padded to whole windows."""
    (rows, cols), (down, across) = shape, (-(-shape[0] // side), -(-shape[1] // side))
    y = torch.arange(down * side, device=device)
    x = torch.arange(across * side, device=device)
    along_y = (y[:, None] - y).clamp(1 - rows, rows - 1) + rows - 1  # (padded rows, padded rows)
    along_x = (x[:, None] - x).clamp(1 - cols, cols - 1) + cols - 1 + 2 * rows - 1
    along_y = along_y.view(down, 1, side, 1, -1).expand(down, across, side, side, -1)
    along_x = along_x.view(1, across, 1, side, -1).expand(down, across, side, side, -1)
    return torch.cat([along_y, along_x], -1).reshape(down * across, side * side, -1)


def run_windows(
    vit: ViTSpec,
    tables: WindowTables,
    grid: Grid,
    patches: Tensor,
    windows: Tensor,
    caches: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The network on some windows; nothing is written.

    Args:
        vit: the network.
        tables: of the grid.
        grid: tokens of the frame.
        patches: `(W, slots, P)` of the windows, of padded places any.
        windows: `(W,)` which they are.
        caches: `(windows, slots, 2, heads, d)` of the global blocks.

    Returns:
        Outputs `(W, slots, D)`, and for each global block keys and values `(W, slots, 2, heads, d)`.
    """
    slots = vit.window**2 if isinstance(vit.window, int) else 0
    z = vit.embed(patches)  # (W, slots, D)
    if tables.positions is not None:
        z = z + tables.positions.index_select(0, windows)
    z = vit.norm_pre(z)
    inside = None if tables.inside is None else tables.inside.index_select(0, windows)
    within, across = (None, None) if tables.offsets is None else tables.offsets
    across = None if across is None else across.index_select(0, windows).flatten(0, 1)  # (W * slots, rows + columns)
    new: list[Tensor] = []
    for block, table in zip(vit.blocks, tables.relative, strict=True):
        h = block.norm1(z)
        if block.window and inside is not None:
            h = h * inside  # the dense network pads after the norm, with zeros
        qkv = block.qkv(h.flatten(0, 1)).unflatten(0, (-1, slots))  # (W, slots, 3, heads, d)
        if block.window:
            o = _attend_windows(qkv, table, within)
        else:
            kv = qkv[:, :, 1:].to(caches[len(new)].dtype)
            cache = caches[len(new)].clone()
            cache[windows] = kv  # whole rows are copied by compilers, which take `index_copy` value by value
            new.append(kv)
            o = _attend_frame(qkv[:, :, 0], cache, table, across, tables.inside, grid)
        z = z + block.proj(o.flatten(-2))  # (W, slots, heads, d) to (W, slots, D)
        z = z + block.mlp(block.norm2(z))
    return vit.norm(z), *new


def _attend_windows(qkv: Tensor, table: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Attention within windows, `(W, slots, 3, heads, d)` to `(W, slots, heads, d)`."""
    slots = qkv.shape[1]
    # Not one permutation of all three: OpenVINO gets that wrong where there are as many slots as heads.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (W, heads, slots, d) each
    bias = None
    if table is not None and offsets is not None:
        bias = _relative_bias(q, table, offsets, (1, 1)).view(-1, qkv.shape[3], slots, slots)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _attend_frame(
    q: Tensor, cache: Tensor, table: Tensor | None, offsets: Tensor | None, inside: Tensor | None, grid: Grid
) -> Tensor:
    """Attention to the keys of the frame, `(W, slots, heads, d)` to the same."""
    slots, side = q.shape[1], int(q.shape[1] ** 0.5)
    rows = q.flatten(0, 1).transpose(0, 1)[None]  # (1, heads, r, d), r = W * slots
    k, v = cache.to(q.dtype).flatten(0, 1).permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, heads, keys, d) each
    bias = None
    if table is not None and offsets is not None:
        windows = -(-grid[0] // side), -(-grid[1] // side)
        bias = _relative_bias(rows, table, offsets, windows).view(1, rows.shape[1], -1, k.shape[2])
    if inside is not None:
        hidden = (1 - inside.to(q.dtype)).flatten() * _NO_KEY  # (keys,)
        bias = hidden.expand(1, 1, rows.shape[2], -1) if bias is None else bias + hidden
    o = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)
    return o[0].transpose(0, 1).unflatten(0, (-1, slots))


def _relative_bias(q: Tensor, table: Tensor, offsets: Tensor, windows: Grid) -> Tensor:
    """Relative positions of queries `(n, heads, r, d)` to the keys of `windows` (down, across), window by window.

    Args:
        q: unscaled queries.
        table: `(offsets, d)`.
        offsets: `(r, rows + columns)`, see `WindowTables`.
        windows: that the keys lie in.

    Returns:
        `(n * heads * r, keys)`.
    """
    terms = q @ table.to(q.dtype).T  # (n, heads, r, offsets)
    # Not by sizes in numbers, which a compiler would take for fixed: there are at least as many offsets as keys.
    terms = terms.gather(3, offsets.expand_as(terms[..., : offsets.shape[-1]]))  # (n, heads, r, rows + columns)
    side = offsets.shape[1] // sum(windows)
    along_y, along_x = terms.flatten(0, 2).split([windows[0] * side, windows[1] * side], dim=1)  # (n * heads * r, ...)
    y, x = along_y.unflatten(1, (windows[0], 1, side, 1)), along_x.unflatten(1, (1, windows[1], 1, side))
    return (y + x).flatten(1)
