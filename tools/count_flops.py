"""Count what a frame costs, in GMACs by part, for any model, size, rule and budget.

    python tools/count_flops.py          # the cases of configs/count_flops.yaml: the paper's figures, and ours
    python tools/count_flops.py model=vitdet_tiny size=[320,512] rule=rows k=[80,160]
    python tools/count_flops.py model=vitdet_b_vid size=[[576,1024],[384,672]] fraction=[0.125,0.25]
    python tools/count_flops.py model=vitdet_tiny +model.window=8 k=160
    python tools/count_flops.py model=rf-detr-nano fraction=[0.125,0.25]

Nothing runs and no weights are needed: networks are built without memory (on torch's meta device; RF-DETR with random
weights) and counted in closed form. Counts are of steady frames, in which k tokens are recomputed; a flush costs what
dense does. The heads are counted as the detector runs them when anything changed: in full, with the most proposals
that it keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import actions
import torch
from common import command, console, say, show_table, write_results

from eventful_det.data.video.transforms import fit_size
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.projector import everywhere, projector_macs
from eventful_det.detectors.rf_detr.sizes import SIZES, random_model
from eventful_det.detectors.vitdet.config import MODELS, ModelConfig
from eventful_det.detectors.vitdet.detector import DIVISOR, Detector
from eventful_det.errors import UserError
from eventful_det.gating.macs import (
    Ablation,
    Macs,
    ViTShape,
    dense_macs,
    expected_cells,
    most_window_queries,
    paper_macs,
    paper_sizes,
    rows_macs,
    rows_sizes,
)
from eventful_det.gating.windows import Grid
from eventful_det.options import Count, Range, Share, from_values, nearest
from eventful_det.outputs import markdown_table, owned, write_text
from eventful_det.testing.official import official_counts

RuleName = Literal["dense", "paper", "rows"]
LARGEST = 16384  # side of an input in pixels
Fraction = Annotated[float, Range(0, 1, above=True)]

_NOTES = (
    "Steady frames; a flush costs what dense does. official: the backbone as the paper's code counts it. backbone to "
    "total: our multiply-adds, with patch embedding and gates; heads in full, with as many proposals as are kept, "
    "an upper bound for gated frames: there the heads recompute only what changed tokens reach. attention: "
    "the products QK^T and A.V, which counters that do not see fused attention leave out; linear: all else."
)


@dataclass(frozen=True)
class Case:
    """One line of the table; `k` is None for dense, `ablation` for other rules than the paper's."""

    model: str
    height: int
    width: int
    rule: str
    k: int | None = None
    ablation: Ablation | None = None
    pool: int = 1


@dataclass(frozen=True)
class Assumptions:
    """Where the selected tokens lie; see configs/count_flops.yaml."""

    padding: Annotated[float, Range(1)] | None  # queries per selected token
    scatter: Share


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to count of one model: all combinations of its lists; configs/count_flops.yaml explains it."""

    model: dict[str, Any] | str | None = None
    size: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    rule: RuleName | tuple[RuleName, ...] | None = None
    k: Count | tuple[Count, ...] | None = None
    fraction: Fraction | tuple[Fraction, ...] | None = None
    ablation: Ablation | tuple[Ablation, ...] | None = None
    pool: Count | tuple[Count, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Options(Wish):
    """What may be asked of the counter; configs/count_flops.yaml explains it."""

    task: actions.Task | None
    durations: str | None
    classes: Count
    assume: Assumptions
    output: str
    cases: tuple[Wish, ...]


class Network:
    """A ViTDet without memory, for its sizes."""

    rules: tuple[str, ...] = get_args(RuleName)

    def __init__(self, model: Mapping[str, Any], classes: int) -> None:
        changes = {key: value for key, value in model.items() if key not in ("name", "init")}
        name = model["name"]
        if name not in MODELS:
            raise UserError(f"unknown model {name!r}; {nearest(name, [*MODELS, *SIZES])}")
        config = MODELS[name](tuple(f"class{i}" for i in range(classes)))
        self.name = str(name)
        self.config = from_values(ModelConfig, {**dataclasses.asdict(config), **changes}, "model")
        with torch.device("meta"):
            self.detector = Detector(self.config)
        self.shape = self.detector.spec.shape

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width of its input for a 16:9 video."""
        return fit_size(1080, 1920, self.config.short_side, self.config.long_side)

    def grid(self, height: int, width: int) -> Grid:
        """Tokens (rows, columns) of a frame, padded as the detector pads it."""
        rows, cols = (-(-side // DIVISOR) * DIVISOR // self.shape.patch for side in (height, width))
        return rows, cols

    def heads(self, grid: Grid) -> dict[str, Macs]:
        """MACs of the parts behind the backbone."""
        dense = self.detector.head_weights.dense(grid, self.config.proposals)
        return {part: Macs(linear=macs) for part, macs in dense.items()}


class RFDETRNetwork:
    """An RF-DETR of `transformers`, for its sizes."""

    rules: tuple[str, ...] = ("dense", "rows")  # the paper's rule does not know it

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.name = str(model["name"])
        if unknown := sorted(set(model) - {"name"}):
            raise UserError(f"model: unknown option {unknown[0]!r}; {self.name} has none")
        self.detector = EventfulRFDETR(random_model(model["name"]))
        self.shape = self.detector.spec.shape

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width of its input."""
        side = self.detector.input_transform.short_side
        return side, side

    def grid(self, height: int, width: int) -> Grid:
        """Tokens (rows, columns) of a frame, padded to whole windows."""
        return self.detector.spec.grid(height, width)

    def heads(self, grid: Grid) -> dict[str, Macs]:
        """MACs of the parts behind the backbone."""
        parts = self.detector.parts
        attention = parts.decoder.queries**2 * parts.decoder.attention
        return {
            "projector": Macs(linear=projector_macs(parts.projector, everywhere(parts.projector, grid))),
            "decoder": Macs(linear=parts.decoder.macs(grid[0] * grid[1]) - attention, attention=attention),
        }


def expand(wish: Wish, network: Network | RFDETRNetwork) -> Iterator[Case]:
    """The cases that one wish asks of one network: all combinations of its lists that differ."""
    pools, ablations = _list(wish.pool or 1), _list(wish.ablation or "full")
    rules = _list(wish.rule or network.rules)
    if unknown := [rule for rule in rules if rule not in network.rules]:
        raise UserError(
            f"{network.name}: rule={unknown[0]} does not know its windows; known: {', '.join(network.rules)}"
        )
    for size, rule in itertools.product(_sizes(wish.size or network.usual_size), rules):
        if rule == "rows" and pools != [1]:
            raise UserError("rule=rows does not pool keys; set pool=1 or rule=[dense,paper]")
        budgets = [None] if rule == "dense" else _budgets(wish, network.grid(*size))
        for pool, ablation, k in itertools.product(pools, ablations if rule == "paper" else [None], budgets):
            yield Case(network.name, *size, rule, k, ablation, pool)


def count(case: Case, network: Network | RFDETRNetwork, assume: Assumptions) -> dict[str, Any]:
    """A case's entry in `results.json`; counts in GMACs."""
    grid = network.grid(case.height, case.width)
    official, backbone, assumed = _count_backbone(case, network.shape, grid, assume)
    parts = {"backbone": backbone, **network.heads(grid)}
    return {
        **dataclasses.asdict(case),
        "pool": None if case.pool == 1 else case.pool,
        "tokens": grid[0] * grid[1],
        "official_gmacs": None if official is None else official / 1e9,
        **{part: macs.total / 1e9 for part, macs in parts.items()},
        "total": sum(macs.total for macs in parts.values()) / 1e9,
        "attention": {part: macs.attention / 1e9 for part, macs in parts.items()},
        "assumed": assumed,
    }


def _count_backbone(
    case: Case, shape: ViTShape, grid: Grid, assume: Assumptions
) -> tuple[int | None, Macs, str | None]:
    """Operations of the backbone as the official code counts them; its MACs; what was assumed, if anything."""
    tokens = grid[0] * grid[1]
    if case.pool < 1 or grid[0] % case.pool or grid[1] % case.pool:
        raise UserError(f"pool={case.pool} does not divide a grid of {grid[0]} x {grid[1]} tokens")
    if case.rule == "rows" and case.k is not None:
        queries, assumed = _queries(shape, grid, case.k, assume.padding)
        return None, rows_macs(shape, grid, rows_sizes(shape, grid, case.k, queries)), assumed
    if shape.prefix:
        return None, dense_macs(shape, grid), None
    sizes, assumed = paper_sizes(shape, grid, tokens), None
    if case.k is not None:
        cells, assumed = _cells(grid, case.k, case.pool, assume.scatter)
        sizes = tuple(dataclasses.replace(block, cells=cells) for block in paper_sizes(shape, grid, case.k))
    how = (case.ablation or "full", case.pool, case.k is None)
    return official_counts(shape, grid, sizes, *how).total, paper_macs(shape, grid, sizes, *how), assumed


def _queries(shape: ViTShape, grid: Grid, k: int, padding: float | None) -> tuple[int | None, str | None]:
    """Queries that the tokens make in windows; None = the most there can be."""
    if not shape.windowed:
        return None, None
    if padding is None or shape.prefix:
        return None, "selected tokens fall into windows the costliest way"
    assumed = f"windowed attention pads its queries to {padding} per selected token (assume.padding)"
    return min(round(padding * k), most_window_queries(grid, shape.window, k)), assumed


def _cells(grid: Grid, k: int, pool: int, scatter: float) -> tuple[int, str | None]:
    """Pooled cells that the tokens fall in."""
    if pool == 1:
        return k, None
    compact, scattered = k / pool**2, expected_cells(grid, k, pool)
    cells = round(compact + scatter * (scattered - compact))
    among = f"{compact:.0f} if compact, {scattered:.0f} if scattered; assume.scatter={scatter}"
    return cells, f"{k} tokens fall in {cells} cells ({among})"


def _budgets(wish: Wish, grid: Grid) -> list[int]:
    """Numbers of tokens, none more than the frame has."""
    tokens = grid[0] * grid[1]
    budgets = _list(wish.k) if wish.k is not None else [int(f * tokens) for f in _list(wish.fraction or 0.25)]
    for k in budgets:
        if not 1 <= k <= tokens:
            raise UserError(f"k must be a whole number of 1 to {tokens} tokens ({grid[0]} x {grid[1]}), got {k}")
    return budgets


def _sizes(value: Any) -> list[tuple[int, int]]:
    sizes: list[tuple[int, int]] = list(value) if isinstance(value[0], tuple) else [value]
    for height, width in sizes:
        if not (0 < height <= LARGEST and 0 < width <= LARGEST):
            raise UserError(f"size must be [height,width] of 1 to {LARGEST} pixels, got {[height, width]}")
    return sizes


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[list[str]]]]:
    """A title and lines, the first with the columns' names, per model and input size; shares are of its dense total."""
    for (model, height, width), members in itertools.groupby(rows, lambda r: (r["model"], r["height"], r["width"])):
        group = list(members)
        parts = [*group[0]["attention"], "total"]
        dense = next((row["total"] for row in group if row["rule"] == "dense" and not row["pool"]), None)
        lines = [["rule", "k", "official", *parts, "share"]]
        for row in group:
            k, share = ("" if row["k"] is None else str(row["k"])), (f"{row['total'] / dense:.0%}" if dense else "")
            lines.append([_label(row), k, *_numbers(row, ("official_gmacs", *parts)), share])
            if row["rule"] == "dense":
                attention = {**row["attention"], "total": sum(row["attention"].values())}
                linear = {part: row[part] - attention[part] for part in parts}
                lines.append(["  linear", "", "", *_numbers(linear, parts), ""])
                lines.append(["  attention", "", "", *_numbers(attention, parts), ""])
        yield f"{model}, {height} x {width} pixels, {group[0]['tokens']} tokens: GMACs per frame", lines


def _numbers(row: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    return ["" if row[part] is None else f"{row[part]:.2f}" for part in parts]


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What a reader of the tables should know."""
    assumed = dict.fromkeys((_label(row), row["assumed"]) for row in rows if row["assumed"])
    return [_NOTES, *(f"Assumed of {rule}: {what}." for rule, what in assumed)]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    for title, lines in tables(rows):
        show_table(lines, title)
    console.print(*notes(rows), sep="\n")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    text = f"`{command()}`\n\n{' '.join(notes(rows))}\n"
    for title, lines in tables(rows):
        text += f"\n## {title}\n\n"
        text += markdown_table([cell.strip() for cell in line] for line in lines)
    return text


def _label(row: Mapping[str, Any]) -> str:
    variant = [] if row["ablation"] in (None, "full") else [row["ablation"]]
    return ", ".join([row["rule"], *variant, *([f"pool {row['pool']}"] if row["pool"] else [])])


def name_of(model: dict[str, Any] | str | None) -> str | None:
    """The name of the model asked for, if any."""
    return model.get("name") if isinstance(model, dict) else model


def count_recognisers(options: Options) -> None:
    """Count, print and write the table of recognisers."""
    rows = actions.count(name_of(options.model), None if options.k is None else _list(options.k), options.durations)
    note = (
        "GMACs as the official code counts them, in closed form: of a step; of a clip, each of whose views is computed "
        "by itself; and of one whose views share their tubelets, on average over clips."
    )
    cells = actions.cells_of(rows)
    with owned(Path(options.output)):
        write_results(Path(options.output), {"command": command(), "note": note, "rows": rows})
        write_text(Path(options.output) / "count_flops.md", f"`{command()}`\n\n{note}\n\n{markdown_table(cells)}")
    show_table(cells)
    say(note)


def collect(options: Options) -> list[dict[str, Any]]:
    """The rows of `results.json` that a config asks for.

    Raises:
        UserError: a value cannot be used.
    """
    axes = [field.name for field in dataclasses.fields(Wish)]
    own = any(getattr(options, axis) is not None for axis in axes)
    rows: dict[Case, dict[str, Any]] = {}
    for wish in [options] if own else options.cases:
        model = {"name": wish.model} if isinstance(wish.model, str) else wish.model or {}
        model = {"name": "vitdet_tiny", **model}
        network = RFDETRNetwork(model) if model["name"] in SIZES else Network(model, options.classes)
        rows |= {case: count(case, network, options.assume) for case in expand(wish, network)}
    return sorted(rows.values(), key=lambda row: (row["model"], -row["height"], -row["width"]))


def run(options: Options) -> None:
    """Count, print and write the table."""
    if options.task == "recognition" or name_of(options.model) in actions.MODELS:
        count_recognisers(options)
        return
    rows = collect(options)
    with owned(Path(options.output)):
        results = {"command": command(), "assume": dataclasses.asdict(options.assume), "rows": rows}
        write_results(Path(options.output), results)
        write_text(Path(options.output) / "count_flops.md", markdown(rows))
    show(rows)


if __name__ == "__main__":
    from command_line import start

    start("count_flops")
