"""The `rows` rule on a whole clip at once, with gradients.

Which tokens a frame recomputes does not depend on what the blocks make of them, so it is known for the whole clip
before the blocks run. The rows of all frames then pass through each block together: a row attends to the last key
and value that every token had on the frame of the row, whichever frame they were computed on. The result equals
`Rows.step` frame by frame; gradients also flow through the keys and values of earlier frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eventful_det.errors import UserError
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, GateInput, Select
from eventful_det.gating.spec import Block, ViTSpec, resize_table
from eventful_det.gating.windows import Grid, Side, relative_bias, relative_places, relative_terms, windows_of


@dataclass(frozen=True)
class ClipPlan:
    """Which rows a clip of T frames is made of: those of frame 0, then those of frame 1, and so on; R in all.

    Attributes:
        grid: tokens of a frame (H, W), N = H * W.
        frame: `(R,)` frame of each row.
        token: `(R,)` token of each row.
        source: `(T, N)` the row that holds the last value of each token on each frame.
    """

    grid: Grid
    frame: Tensor
    token: Tensor
    source: Tensor

    @classmethod
    def of(cls, selected: Sequence[Tensor], grid: Grid) -> ClipPlan:
        """The plan of a clip of which frame t recomputes the tokens `selected[t]`; all of them on frame 0."""
        last = torch.empty(grid[0] * grid[1], dtype=torch.long, device=selected[0].device)
        sources, rows = [], 0
        for index in selected:
            last = last.index_copy(0, index, torch.arange(rows, rows + len(index), device=index.device))
            sources.append(last)
            rows += len(index)
        frame = torch.cat([torch.full_like(index, t) for t, index in enumerate(selected)])
        return cls(grid, frame, torch.cat(list(selected)), torch.stack(sources))


@dataclass(frozen=True)
class _Group:
    """Rows that attend in one call: `queries` `(g, n)` to `keys` `(g, slots)`; row R stands for padded tokens.

    `position` holds the row and the column of each query in its window, each `(g * n,)`.
    """

    queries: Tensor
    keys: Tensor
    position: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Layout:
    """Who attends to whom in the blocks of one window size.

    Attributes:
        shape: tokens of a window.
        groups: together they hold every row.
        place: `(R,)` place of each row among the queries of all groups.
    """

    shape: Grid
    groups: list[_Group]
    place: Tensor


def gated_tokens(
    vit: ViTSpec,
    frames: Tensor,
    *,
    rule: Rows = Rows(),  # noqa: B008 (immutable)
    selector: Select = DEFAULT,
    checkpointing: bool = False,
    saliency: Tensor | None = None,
) -> Tensor:
    """The token maps that `rule` gives on the frames of a clip; differentiable.

    Args:
        vit: the network, without class and register tokens.
        frames: `(T, C, h, w)`, normalised, in the order of time.
        rule: how tokens are recomputed; the first frame is computed in full.
        selector: which tokens are recomputed.
        checkpointing: recompute the activations of the blocks in the backward pass, to save memory.
        saliency: `(T, N)` how much each token matters to the gate on each frame, 0 to 1; None = nobody said.

    Returns:
        `(T, H, W, C)`; drop path is off.

    Raises:
        UserError: the network has class or register tokens.
    """
    vit.require_plain("training with gates on")
    if vit.prefix is not None:
        raise UserError("training with gates on needs a network without class and register tokens")
    grid = vit.grid(frames.shape[-2], frames.shape[-1])
    patches = torch.stack([vit.patches(frame) for frame in frames])
    with torch.no_grad():
        compared = patches if rule.gate == "patches" else vit.embed(patches)
        plan = ClipPlan.of(select_updates(vit, rule, selector, compared, grid, saliency), grid)
    layouts = {side: _layout(plan, side) for side in {block.window for block in vit.blocks}}
    z = vit.embed(patches[plan.frame, plan.token])
    if vit.positions is not None:
        z = z + vit.positions(grid)[plan.token]
    z = vit.norm_pre(z)
    for block in vit.blocks:
        arguments = (block, z, layouts[block.window])
        z = checkpoint(_run_block, *arguments, use_reentrant=False) if checkpointing else _run_block(*arguments)
    return vit.norm(z)[plan.source].unflatten(1, grid)


def select_updates(
    vit: ViTSpec, rule: Rows, selector: Select, compared: Tensor, grid: Grid, saliency: Tensor | None = None
) -> list[Tensor]:
    """The tokens that are recomputed on each frame of a clip, each `(r,)`.

    Args:
        vit: the network.
        rule: renews all tokens now and then.
        selector: selects some of them on all other frames but the first.
        compared: `(T, N, P)` what the gate compares with its reference.
        grid: tokens of a frame (H, W).
        saliency: `(T, N)` how much each token matters on each frame, 0 to 1; None = nobody said.
    """
    reference = torch.zeros_like(compared[0])
    age = torch.ones(compared.shape[1], dtype=torch.int32, device=compared.device)
    selected = []
    for t, values in enumerate(compared):
        if t == 0 or (rule.renew_every > 0 and t % rule.renew_every == 0):
            index = torch.arange(len(age), device=age.device)
        else:
            weight = None if saliency is None else saliency[t]
            error, noise = rule.compare(vit, values, reference)
            (index,) = selector([GateInput(error, age, t, grid, weight, noise=noise)])
        reference = reference.index_copy(0, index, values[index])
        age = (age + 1).index_fill(0, index, 1)
        selected.append(index)
    return selected


def _layout(plan: ClipPlan, side: Side) -> _Layout:
    """The layout of blocks with windows of `side` tokens; 0 = global attention."""
    return _windowed(plan, side) if side else _global(plan)


def _global(plan: ClipPlan) -> _Layout:
    """One group per frame: its rows attend to the last row of every token."""
    groups = []
    for t, source in enumerate(plan.source):
        rows = (plan.frame == t).nonzero().squeeze(1)
        if rows.numel():
            token = plan.token[rows]
            groups.append(_Group(rows[None], source[None], (token // plan.grid[1], token % plan.grid[1])))
    return _Layout(plan.grid, groups, torch.arange(len(plan.token), device=plan.token.device))


def _windowed(plan: ClipPlan, side: Side) -> _Layout:
    """One group of all windows, on any frame, that hold a row of that frame.

    The queries of such a window are computed for all its tokens, and only those of the frame's rows are used:
    attention is a small part of a windowed block.
    """
    windows = windows_of(plan.grid, side, plan.token.device)
    frames, padding = len(plan.source), len(plan.token)
    window = plan.frame * windows.count + windows.window[plan.token]
    touched, group = torch.unique(window, return_inverse=True)
    rows = plan.source.new_full((frames, windows.count * windows.slots), padding)
    rows[:, windows.window * windows.slots + windows.slot] = plan.source
    rows = rows.view(-1, windows.slots)[touched]
    slot = torch.arange(windows.slots, device=rows.device).repeat(len(touched))
    position = (slot // windows.shape[1], slot % windows.shape[1])
    place = group * windows.slots + windows.slot[plan.token]
    return _Layout(windows.shape, [_Group(rows, rows, position)], place)


def _run_block(block: Block, z: Tensor, layout: _Layout) -> Tensor:
    """Carry the rows `(R, D)` of a clip through a block."""
    padded = F.pad(block.norm1(z), (0, 0, 0, 1))  # a padded token is zero after the norm, so its qkv is the bias
    q, k, v = block.qkv(padded).unbind(1)  # (R + 1, heads, d) each
    pair = () if block.rel_pos is None else block.rel_pos()
    tables = [resize_table(table, size) for table, size in zip(pair, layout.shape, strict=False)]
    pieces = []
    for group in layout.groups:
        bias = None
        if tables:
            places = relative_places(*group.position, layout.shape)
            terms = relative_terms(q[group.queries.flatten()], places, torch.cat(tables))
            bias = relative_bias(terms, layout.shape).unflatten(0, group.queries.shape).transpose(1, 2)
        queries, keys, values = (x.transpose(1, 2) for x in (q[group.queries], k[group.keys], v[group.keys]))
        x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        pieces.append(x.transpose(1, 2).flatten(0, 1))
    z = z + block.proj(torch.cat(pieces)[layout.place].flatten(1))
    return z + block.mlp(block.norm2(z))
