"""Recordings ("goldens") of the official eventful code: reading a file, and selectors that know what was selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.selector import GateInput, LargestError, Selector
from eventful_det.gating.spec import Block, relative_table
from eventful_det.gating.windows import Grid, Side
from eventful_det.testing.replay import pair, replaying

FORMAT = "eventful-golden/1"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Golden:
    """A recording.

    Attributes:
        grid: token grid (H, W).
        blocks: the network's blocks.
        positions: `(h, w, D)` position encoding, to be resized to the grid.
        inputs: `(T, B, N, D)` tokens before the position encoding.
        runs: what the official code computed, see the format's description.
        notes: what is known of the official code's faults on this network.
    """

    grid: Grid
    blocks: list[Block]
    positions: Tensor
    inputs: Tensor
    runs: list[JsonObject]
    notes: list[str]

    @property
    def padded_blocks(self) -> int:
        """Number of windowed blocks whose windows do not tile the grid."""
        return sum(self._pads(block.window) for block in self.blocks)

    def _pads(self, window: Side) -> bool:
        return isinstance(window, int) and window > 0 and any(size % window for size in self.grid)


class Recorded:
    """A selector beside what the official code selected.

    Where the two differ only among tokens whose errors tie to float precision, the recorded choice is followed: a
    tie has no right answer, but the outputs can be compared only if it is broken alike.

    Args:
        selector: ours.
        choices: `(r,)` recorded indices in the order in which the gates are asked, None for a gate that was not
            recorded; or None for no gate at all.
    """

    def __init__(self, selector: Selector, choices: Sequence[Tensor | None] | None) -> None:
        self.selector = selector
        self.choices = None if choices is None else iter(choices)
        self.outcomes: Counter[str] = Counter()

    def __call__(self, gates: Sequence[GateInput]) -> list[Tensor]:
        (ours,) = self.selector(gates)
        if self.choices is None:
            return [ours]
        theirs = next(self.choices)
        if theirs is None:
            return [ours]
        outcome = self._compare(ours, theirs, gates[0].error)
        self.outcomes[outcome] += 1
        return [theirs if outcome == "tied" else ours]

    def _compare(self, ours: Tensor, theirs: Tensor, error: Tensor) -> str:
        ours_mask, theirs_mask = (torch.zeros_like(error).index_fill(0, index, 1) > 0 for index in (ours, theirs))
        odd = error[ours_mask != theirs_mask]
        if not odd.numel():
            return "equal"
        policy = self.selector.policy
        threshold = policy.threshold if isinstance(policy, LargestError) else None
        boundary = float(error[ours].min()) if threshold is None else threshold
        return "tied" if float((odd - boundary).abs().max()) <= 1e-4 * boundary + 1e-5 else "different"

    @staticmethod
    def summary(recorders: Sequence[Recorded]) -> str:
        """How the choices of all gates compare, in a few words."""
        outcomes = sum((recorder.outcomes for recorder in recorders), Counter[str]())
        if not outcomes:
            return "-"
        words = [f"{outcomes[kind]} {kind}" for kind in ("tied", "different") if outcomes[kind]]
        return f"{', '.join(words)} of {outcomes.total()}" if words else "equal"


def read_recording(path: Path) -> JsonObject:
    """The contents of a file that says its "format".

    Raises:
        UserError: it is no such file.
    """
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a golden ({type(error).__name__})") from error
    if not isinstance(data, dict) or "format" not in data:
        raise UserError(f"{path}: not of the format {FORMAT}")
    return data


def load_golden(path: Path, data: JsonObject) -> Golden:
    """Build the blocks of a golden.

    Raises:
        UserError: it is not of this format.
    """
    if data["format"] != FORMAT:
        raise UserError(f"{path}: not of the format {FORMAT}")
    with replaying(str(path)):
        return _build(data)


def _build(data: JsonObject) -> Golden:
    config, weights, inputs, runs = data["config"], data["state_dict"], data["inputs"], data["runs"]
    grid = pair(config["input_size"])
    if inputs.ndim != 4 or inputs.shape[2:] != (grid[0] * grid[1], config["dim"]) or not inputs.numel():
        raise UserError(f"inputs of shape {tuple(inputs.shape)} do not fit {grid[0]} x {grid[1]} tokens")
    if not isinstance(runs, list) or not runs:
        raise UserError("no runs")
    side = 0
    if config["window_indices"]:
        sides = set(pair(config["window_size"]))
        if len(sides) > 1:
            raise UserError(f"windows must be square, got {config['window_size']}")
        side = sides.pop()
    blocks = [
        _block(weights, i, config["heads"], side if i in config["window_indices"] else 0, grid)
        for i in range(config["depth"])
    ]
    resized = any(block.rel_pos is not None and block.rel_pos()[0].ndim == 3 for block in blocks)
    note = "official fault: relative tables were resized bicubically in 2-D; their resize is used here, ours is linear"
    return Golden(
        grid=grid,
        blocks=blocks,
        positions=weights["position_encoding.encoding"][0].unflatten(0, pair(config["position_encoding_size"])),
        inputs=inputs,
        runs=runs,
        notes=[note] if resized else [],
    )


def _block(weights: dict[str, Tensor], i: int, heads: int, window: int, grid: Grid) -> Block:
    def linear(name: str) -> nn.Linear:
        weight = weights[f"blocks.{i}.{name}.weight"]
        return fill(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), name)

    def norm(name: str) -> nn.LayerNorm:
        weight = weights[f"blocks.{i}.{name}.weight"]
        return fill(nn.LayerNorm(weight.shape[0], eps=1e-6, device="meta"), name)

    def fill(layer: M, name: str) -> M:
        prefix = f"blocks.{i}.{name}."
        layer.load_state_dict({part: weights[prefix + part] for part in ("weight", "bias")}, assign=True)
        return layer

    tables = [weights.get(f"blocks.{i}.relative_position.{axis}_embedding") for axis in "yx"]
    shape = (window, window) if window else grid
    resized = None if tables[0] is None or tables[1] is None else _tables((tables[0], tables[1]), shape)
    qkv, projection, mlp = linear("qkv"), linear("projection"), (linear("mlp_1"), linear("mlp_2"))
    return Block(
        norm1=norm("input_layer_norm"),
        qkv=lambda x: qkv(x).unflatten(-1, (3, heads, -1)),
        proj=projection,
        norm2=norm("mlp_layer_norm"),
        mlp=lambda x: mlp[1](F.gelu(mlp[0](x))),
        layers=((qkv,), (projection,), mlp),
        heads=heads,
        window=window,
        rel_pos=None if resized is None else lambda: resized,
    )


def _tables(tables: tuple[Tensor, Tensor], shape: Grid) -> tuple[Tensor, Tensor]:
    """Relative tables `(2 n - 1, d)`; where n is not the attention's size, expanded and resized as officially."""
    sizes = [(table.shape[0] + 1) // 2 for table in tables]
    if tuple(sizes) == shape:
        return tables
    y, x = (
        F.interpolate(relative_table(table, size).permute(2, 0, 1)[None], (target, target), mode="bicubic")[0]
        for table, size, target in zip(tables, sizes, shape, strict=True)
    )
    return y.permute(1, 2, 0), x.permute(1, 2, 0)
