"""What replays of recordings have in common: rules and selectors as recorded, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from eventful_det.errors import UserError, first_line
from eventful_det.files import JsonObject
from eventful_det.gating.macs import Ablation, ViTShape
from eventful_det.gating.paper import Paper
from eventful_det.gating.selector import EVERYTHING, Select, Selector, Threshold, TopFraction, TopK
from eventful_det.gating.spec import Block
from eventful_det.gating.windows import Grid
from eventful_det.testing.official import OfficialCounts, official_block

TOLERANCE = 1e-4  # largest accepted relative error

ABLATIONS: dict[str, Ablation | None] = {  # None: dense
    "Block": None,
    "EventfulTokenwiseBlock": "tokenwise",
    "EventfulMatmul1Block": "qk",
    "EventfulBlock": "full",
}


def recorded_ablation(name: str) -> Ablation | None:
    """What a class of blocks of the official code makes incremental; None = it is dense.

    Raises:
        UserError: the class is unknown.
    """
    if name not in ABLATIONS:
        raise UserError(f"unknown block class {name!r}; known: {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def recorded_rule(ablation: Ablation | None, options: JsonObject, pool: int = 1) -> Paper:
    """The rule of a run; a dense one has to be flushed on every step.

    Raises:
        UserError: an option is unknown.
    """
    if unknown := set(options) - {"stgt", "gate_before_ln"}:
        raise UserError(f"unknown options {', '.join(sorted(unknown))}; known: stgt, gate_before_ln")
    return Paper(
        ablation=ablation or "tokenwise",
        pool=pool,
        gate_before_norm=bool(options.get("gate_before_ln", False)),
        stgt=bool(options.get("stgt", False)),
    )


class ReplayedBlock:
    """A block of one stream under the rule of a class of the official code; a dense one flushes on every step."""

    def __init__(
        self, block: Block, grid: Grid, name: str, options: JsonObject, select: Select, pool: int = 1, prefix: int = 0
    ) -> None:
        ablation = recorded_ablation(name)
        self.block, self.select, self.dense = block, select, ablation is None
        self.rule = recorded_rule(ablation, options, pool)
        self.state = self.rule.init_tokens([block], grid, prefix)
        rel_pos, weights = block.rel_pos is not None, sum(block.weights)
        self.shape = ViTShape(1, block.dim, block.heads, weights, block.window, rel_pos=rel_pos, prefix=prefix)

    def __call__(self, x: Tensor) -> tuple[Tensor, OfficialCounts]:
        """Tokens `(L, D)` of a step to those after the block, and what was counted."""
        if self.dense:
            self.state.frame = 0
        flush, windowed, rule = self.state.frame == 0, bool(self.block.window), self.rule
        x, _, (sizes,) = rule.step_tokens([self.block], x, self.state, self.select)
        return x, official_block(self.shape, self.state.grid, windowed, sizes, rule.ablation, rule.pool, flush)


def recorded_selector(description: JsonObject | None) -> Selector:
    """The selector of a run's policy."""
    if description is None:
        return EVERYTHING
    name, value = description["name"], description["value"]
    if name == "topk":
        return TopK(int(value))
    if name == "fraction":
        return TopFraction(float(value))
    if name == "threshold":
        return Threshold(float(value))
    raise UserError(f"unknown policy {name!r}; known: topk, fraction, threshold")


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest ||ours - theirs|| / ||theirs|| over the last axis of `(..., n)`; NaN counts as infinite."""
    difference = torch.linalg.vector_norm(ours - theirs, dim=-1)
    ratio = difference / torch.linalg.vector_norm(theirs, dim=-1)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def compare_counts(
    ours: list[OfficialCounts], theirs: list[dict[str, int]], surplus: OfficialCounts, skipped: set[str]
) -> str:
    differing = set()
    for own, recorded in zip(ours, theirs, strict=True):
        official = {kind.removesuffix("_flops"): int(value) for kind, value in recorded.items()}
        if unknown := official.keys() - asdict(own).keys():
            raise UserError(f"unknown kinds of operations in counts: {', '.join(sorted(unknown))}")
        differing |= {
            kind
            for kind, value in asdict(own).items()
            if value - getattr(surplus, kind) != official.get(kind, 0) and kind not in skipped
        }
    return f"differ: {','.join(sorted(differing))}" if differing else "equal"


def pair(size: int | Sequence[int]) -> Grid:
    """A size as the official code writes it, one number for both sides or two."""
    rows, cols = (size, size) if isinstance(size, int) else size
    return int(rows), int(cols)


@contextmanager
def replaying(place: str) -> Iterator[None]:
    """Errors of a malformed recording as one line that names the place.

    Raises:
        UserError: in place of whatever a value of another kind, shape or name leads to.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{place} is malformed ({type(error).__name__}: {first_line(error)})") from error


def run_cells(run: JsonObject) -> tuple[str, str]:
    """The policy and the options of a run, for a table."""
    policy = run["policy"] or {"name": "-", "value": ""}
    options = " ".join(name for name, value in run.get("options", {}).items() if value)
    return f"{policy['name']} {policy['value']}".strip(), options or "-"


def verdict(agrees: bool) -> str:
    """The last cell of a row."""
    return "agrees" if agrees else "DIFFERS"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> None:
    """The rows in columns, between a title and what the errors are of."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)))
    print(f"error: largest ||ours - official|| / ||official|| {note}")


def all_agree(rows: Sequence[Sequence[str]], what: str) -> bool:
    """Print how many rows agree; returns whether all do."""
    agreeing = sum(row[-1] == verdict(True) for row in rows)
    print(f"{agreeing} of {len(rows)} {what} agree")
    return agreeing == len(rows)
