"""The selected rows of all streams on their way through the blocks.

Norms, linear layers and MLPs do not care where a row comes from: the rows of all streams pass through them as one
matrix. Attention is each stream's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.gating.anatomy import Anatomy, Block, Grid
from eventful_det.gating.cost import Counts
from eventful_det.gating.rows_attention import Queries, attend


@dataclass(frozen=True)
class Selection:
    """What is recomputed of one stream, and what its rows meet on the way.

    Attributes:
        index: `(r,)` tokens, window by window.
        grid: tokens of the frame.
        caches, tables: per block, see `attend`.
    """

    index: Tensor
    grid: Grid
    caches: list[Tensor]
    tables: list[Tensor | None]


def run_blocks(
    anatomy: Anatomy, z: Tensor, selections: Sequence[Selection], static: bool
) -> tuple[list[Tensor], list[Counts]]:
    """Carry rows through all blocks, refreshing the caches.

    Args:
        anatomy: the network.
        z: `(r, D)` embedded tokens with their positions, stream after stream; overwritten.
        selections: of the streams, none of them empty.
        static: as for `Queries.of`.

    Returns:
        For each stream its rows `(r, C)` after the last block, and the operations that ran.
    """
    prefix = anatomy.prefix_count
    if anatomy.prefix is not None:
        own = z.split([len(selection.index) for selection in selections])
        z = torch.cat([part for rows in own for part in (anatomy.prefix(), rows)])
    lengths = [prefix + len(selection.index) for selection in selections]
    queries = [_queries(anatomy, selection, static) for selection in selections]
    for i, block in enumerate(anatomy.blocks):
        qkv = block.qkv(block.norm1(z)).split(lengths)
        attended = [
            attend(block, rows, selection.caches[i], layout[block.window], selection.tables[i])
            for rows, selection, layout in zip(qkv, selections, queries, strict=True)
        ]
        z += block.project(joined(attended))
        z += block.mlp(block.norm2(z))
    outputs = [rows[prefix:] for rows in anatomy.norm(z).split(lengths)]
    return outputs, [_counts(anatomy, *stream) for stream in zip(lengths, selections, queries, strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after another; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _queries(anatomy: Anatomy, selection: Selection, static: bool) -> dict[int, Queries]:
    """Where the rows stand in the attention, for every size of windows."""
    relative = {block.window: block.rel_pos is not None for block in anatomy.blocks}
    return {
        side: Queries.of(selection.index, selection.grid, side, anatomy.prefix_count, positions, static)
        for side, positions in relative.items()
    }


def _counts(anatomy: Anatomy, rows: int, selection: Selection, queries: dict[int, Queries]) -> Counts:
    """Operations of one stream in all blocks."""
    counts = Counts()
    for block, cache in zip(anatomy.blocks, selection.caches, strict=True):
        counts += queries[block.window].counts(block, cache.shape[1]) + _linear_counts(block, rows)
    return counts


def _linear_counts(block: Block, rows: int) -> Counts:
    layers = (block.qkv, block.proj, block.fc1, block.fc2)
    return Counts(
        linear=rows * sum(layer.weight.numel() for layer in layers),
        bias=rows * sum(layer.out_features for layer in layers if layer.bias is not None),
        add=2 * rows * block.dim,
    )
