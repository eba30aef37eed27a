"""Count what a frame costs, in GMACs by part, for any model, size, rule and budget.

    python tools/count_flops.py          # the cases of configs/count_flops.yaml: the paper's figures, and ours
    python tools/count_flops.py model=vitdet_tiny size=[320,512] rule=rows k=[80,160]
    python tools/count_flops.py model=vitdet_b_vid size=[[576,1024],[384,672]] fraction=[0.125,0.25]
    python tools/count_flops.py model=vitdet_tiny rule=dense changes.depth=6

Nothing runs and no weights are needed: networks are built without memory (on torch's meta device) and counted in
closed form. Counts are of steady frames, in which k tokens are recomputed; a flush costs what dense does. The heads
are counted as the detector runs them when anything changed: in full, with the most proposals that it keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from common import console, plain, tool, write_results
from omegaconf import DictConfig
from rich.table import Table

from eventful_det.data.transforms import fit_size
from eventful_det.errors import UserError
from eventful_det.gating.anatomy import Grid, anatomy_of
from eventful_det.gating.closed_form import (
    ViTShape,
    WindowLoad,
    dense_counts,
    expected_cells,
    paper_counts,
    rows_counts,
    window_load_bound,
)
from eventful_det.gating.cost import Counts
from eventful_det.models.config import MODELS, ModelConfig
from eventful_det.models.cost import pyramid_macs, roi_macs, rpn_macs
from eventful_det.models.detector import DIVISOR, Detector

RULES = ("dense", "rows", "paper")
ABLATIONS = ("full", "tokenwise", "qk")
AXES = ("model", "size", "rule", "k", "fraction", "ablation", "pool")


@dataclass(frozen=True)
class Case:
    """One line of the table; `k` is None for dense, `ablation` for other rules than the paper's."""

    model: str
    height: int
    width: int
    rule: str
    k: int | None = None
    ablation: str | None = None
    pool: int = 1


@dataclass(frozen=True)
class Assumptions:
    """Where the selected tokens lie; see configs/count_flops.yaml."""

    padding: float | None
    scatter: float

    def __post_init__(self) -> None:
        if self.padding is not None and self.padding < 1:
            raise UserError(f"assume.padding must be at least 1 query per selected token, got {self.padding}")
        if not 0 <= self.scatter <= 1:
            raise UserError(f"assume.scatter must lie in [0, 1], got {self.scatter}")


class Network:
    """A detector without memory, for its sizes."""

    def __init__(self, name: str, classes: int, changes: Mapping[str, Any]) -> None:
        if name not in MODELS:
            raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
        config = MODELS[name](tuple(f"class{i}" for i in range(classes)))
        self.config = ModelConfig.from_dict({**dataclasses.asdict(config), **changes})
        with torch.device("meta"):
            self.detector = Detector(self.config)
        self.shape = ViTShape.of(anatomy_of(self.detector.backbone.net))

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width of its input for a 16:9 video."""
        return fit_size(1080, 1920, self.config.short_side, self.config.long_side)

    def grid(self, height: int, width: int) -> Grid:
        """Tokens (rows, columns) of a frame, padded as the detector pads it."""
        rows, cols = (-(-side // DIVISOR) * DIVISOR // self.shape.patch for side in (height, width))
        return rows, cols

    def heads(self, grid: Grid) -> dict[str, int]:
        """MACs of the parts behind the backbone."""
        return {
            "pyramid": pyramid_macs(self.detector.backbone, grid),
            "rpn": rpn_macs(self.detector.proposal_generator.rpn_head, grid),
            "roi": roi_macs(self.detector.roi_heads, self.config.proposals),
        }


def expand(wish: Mapping[str, Any], network: Network) -> Iterator[Case]:
    """The cases of one wish: all combinations of its lists that mean something, for one network."""
    sizes = wish.get("size") or network.usual_size
    rules = _list(wish.get("rule") or RULES)
    pools, ablations = _list(wish.get("pool") or 1), _list(wish.get("ablation") or "full")
    for rule, (height, width) in itertools.product(rules, _pairs(sizes)):
        if rule not in RULES:
            raise UserError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
        if rule == "rows" and set(pools) != {1}:
            raise UserError("rule rows does not pool keys; set rule=[dense,paper] or pool=1")
        budgets = [None] if rule == "dense" else _budgets(wish, network.grid(height, width))
        for pool, ablation, k in itertools.product(pools, ablations if rule == "paper" else [None], budgets):
            yield Case(wish["model"], height, width, rule, k, ablation, pool)


def count(case: Case, network: Network, assume: Assumptions) -> dict[str, Any]:
    """A case's entry in `results.json`; counts in GMACs."""
    grid = network.grid(case.height, case.width)
    if grid[0] % case.pool or grid[1] % case.pool:
        raise UserError(f"{grid[0]} x {grid[1]} tokens are not divisible by pool={case.pool}")
    counts, official, assumption = _backbone(case, network.shape, grid, assume)
    parts = {"backbone": counts.macs, **(network.heads(grid) if case.k != 0 else dict.fromkeys(("pyramid", "rpn", "roi"), 0))}
    return {
        **dataclasses.asdict(case),
        "pool": None if case.pool == 1 else case.pool,
        "tokens": grid[0] * grid[1],
        "official_gmacs": official / 1e9,
        **{part: macs / 1e9 for part, macs in parts.items()},
        "total": sum(parts.values()) / 1e9,
        "assumption": assumption,
    }
