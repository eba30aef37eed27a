"""What replays of recordings have in common: rules and selectors as recorded, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.macs import Ablation
from eventful_det.gating.paper import Paper
from eventful_det.gating.selector import EVERYTHING, Selector, Threshold, TopFraction, TopK
from eventful_det.gating.windows import Grid
from eventful_det.testing.official import OfficialCounts

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
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{place} is malformed ({type(error).__name__}: {first})") from error


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
