"""What is compiled of a detector: a list of graphs, whose shapes follow from how much of a frame is recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A part to compile.

    Attributes:
        name: of its file.
        module: that computes it.
        example: inputs.
        free: for each input the dimensions that depend on the number of windows or regions.
    """

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    free: tuple[tuple[int, ...], ...]


REMEMBERED = ("backbone", "pyramid")
"""Graphs whose outputs a stream keeps, in the type of its engine; those of others are float32."""
