"""What tools/benchmark.py can be asked to run; see configs/benchmark.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import plain
from omegaconf import DictConfig

from eventful_det.detectors.protocol import AnyRule
from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.models.detector import DIVISOR

DENSE = "dense"  # what all other methods are compared with
GATED: dict[str, AnyRule] = {"rows": Rows(), "paper": Paper(), "rows_half": Rows(cache_dtype="float16")}
OURS, PEERS = (DENSE, *GATED), ("peer_dense", "peer")
USUAL = (DENSE, "rows", "paper")  # of a case that names no methods
PARTS = {"backbone": ("backbone",), "detector": ("backbone", "heads", "total")}


@dataclass(frozen=True)
class Case:
    """What is run and on what; see configs/benchmark.yaml."""

    model: str
    size: tuple[int, int]
    what: str = "detector"
    k: int | None = None
    fraction: float | None = None
    changes: str = "synthetic"
    methods: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.what not in PARTS:
            raise UserError(f"{self.name}: what must be one of {', '.join(PARTS)}")
        if self.changes not in ("synthetic", "clip", "still"):
            raise UserError(f"{self.name}: changes must be synthetic, clip or still, got {self.changes!r}")
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.size):
            raise UserError(f"{self.name}: size must be [height,width] in pixels")
        if any(side % DIVISOR for side in self.size):
            raise UserError(f"{self.name}: height and width must be multiples of {DIVISOR} pixels")
        self._check_budget()
        usable = OURS + (PEERS if self.what == "backbone" else ())
        if self.methods is not None and (unknown := sorted(set(self.methods) - set(usable))):
            raise UserError(f"{self.name}: unknown method {unknown[0]!r}; known for a {self.what}: {', '.join(usable)}")
        if self.methods is not None and DENSE not in self.methods:
            raise UserError(f"{self.name}: methods need dense, which all others are compared with")

    def _check_budget(self) -> None:
        given = self.k if self.fraction is None else self.fraction
        if self.changes == "still":
            if given is not None:
                raise UserError(f"{self.name}: nothing changes in still frames; give neither k nor fraction")
        elif (self.k is None) == (self.fraction is None):
            raise UserError(f"{self.name}: give exactly one of k (tokens) and fraction (share of the tokens)")
        elif not (isinstance(self.k, int) if self.fraction is None else isinstance(self.fraction, (int, float))):
            raise UserError(f"{self.name}: k must be a whole number, and fraction a number")

    @property
    def name(self) -> str:
        """For people, and for `only`."""
        budgets = [f"{key}={value}" for key in ("k", "fraction") if (value := getattr(self, key)) is not None]
        parts = [self.model, self.what, "x".join(map(str, self.size)), *budgets, self.changes]
        return " ".join([*parts, *(["+".join(self.methods)] if self.methods else [])])

    def budget(self, tokens: int) -> int:
        """Tokens that gated methods recompute."""
        if self.changes == "still":
            return 0
        k = round((self.fraction or 0.0) * tokens) if self.k is None else self.k
        if not 1 <= k <= tokens:
            raise UserError(f"{self.name}: asks for {k} tokens; frames have 1 to {tokens}")
        return k


def cases_of(config: DictConfig) -> tuple[list[Case], list[str]]:
    """The cases of a config, and the names of those left out because they need a clip or a peer.

    Raises:
        UserError: a case is not written as in configs/benchmark.yaml, or none is left.
    """
    cases = [_case({"changes": config.changes, **entry}) for entry in plain(config)["cases"]]
    wanted = [case for case in cases if config.only is None or str(config.only) in case.name]
    usable = [
        case
        for case in wanted
        if (config.clip is not None or case.changes != "clip")
        and (config.peer is not None or not set(case.methods or ()) & set(PEERS))
    ]
    if not usable:
        raise UserError(f"no case left of {len(cases)}; see only={config.only}, clip={config.clip}, peer={config.peer}")
    return usable, [case.name for case in wanted if case not in usable]


def _case(entry: dict[str, Any]) -> Case:
    known = [f.name for f in dataclasses.fields(Case)]
    if unknown := sorted(set(entry) - set(known)):
        raise UserError(f"cases: unknown option {unknown[0]}; known: {', '.join(known)}")
    if missing := sorted({"model", "size"} - set(entry)):
        raise UserError(f"cases: an entry has no {missing[0]}")
    lists = {"size": entry["size"], "methods": entry.get("methods") or []}
    if wrong := next((key for key, value in lists.items() if not isinstance(value, list)), None):
        raise UserError(f"cases: {wrong} must be a list, got {entry[wrong]!r}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Case(**values)
