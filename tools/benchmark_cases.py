"""What tools/benchmark.py can be asked to run; see configs/benchmark.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common import Side

from eventful_det.detectors.protocol import AnyRule
from eventful_det.detectors.rf_detr.sizes import SIZES
from eventful_det.detectors.vitdet.detector import DIVISOR
from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.whole_windows.cuda_graphs import CapturedWindows
from eventful_det.gating.whole_windows.rule import SHARES, Windows
from eventful_det.options import Count, Range, Seed, Share, from_values

DENSE = "dense"  # what all other methods are compared with
GATED: dict[str, AnyRule] = {
    "rows": Rows(),
    "paper": Paper(),
    "rows_half": Rows(cache_dtype="float16"),
    "windows": Windows(),
    "windows_graph": CapturedWindows(),
}
OURS, PEERS = (DENSE, *GATED), ("peer_dense", "peer")
TIMM = "timm:"  # before the name of a backbone of timm
USUAL = (DENSE, "rows", "paper")  # of a case that names no methods
EngineName = Literal["torch", "compile", "openvino", "onnxruntime"]
Arithmetic = Literal["float32", "bfloat16", "int8"]
Changes = Literal["synthetic", "clip", "still"]
PARTS = {"backbone": ("backbone",), "detector": ("backbone", "heads", "total")}


@dataclass(frozen=True)
class Options:
    """What may be asked of the benchmark; configs/benchmark.yaml explains it."""

    repetitions: Count
    warm_up: Count
    threads: Annotated[int, Range(1, 1024)] | None
    device: str
    seed: Seed
    clip: str | None
    peer: str | None
    only: str | None
    engine: tuple[EngineName, ...] | None
    precision: tuple[Arithmetic, ...]
    onnx: str | None
    save: str | None
    streams: tuple[Count, ...] | None
    weights: str | None
    budget: float | int | str
    hold: Count
    profile: bool
    changes: Changes
    classes: Count
    output: str
    cases: tuple[dict[str, Any], ...]
    recogniser: str | None
    k: Count | None


@dataclass(frozen=True)
class Case:
    """What is run and on what; see configs/benchmark.yaml."""

    model: str
    size: tuple[Side, Side]
    what: Literal["backbone", "detector"] = "detector"
    k: Count | None = None
    fraction: Share | None = None
    changes: Changes = "synthetic"
    methods: tuple[str, ...] | None = None
    buckets: tuple[int | float, ...] = SHARES
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model not in SIZES and not self.model.startswith(TIMM) and any(side % DIVISOR for side in self.size):
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
        elif given is None and self.changes == "clip":
            return  # the default policy
        elif (self.k is None) == (self.fraction is None):
            raise UserError(f"{self.name}: give exactly one of k (tokens) and fraction (share of the tokens)")

    @property
    def name(self) -> str:
        """For people, and for `only`."""
        budgets = [f"{key}={value}" for key in ("k", "fraction") if (value := getattr(self, key)) is not None]
        parts = [self.model, self.what, "x".join(map(str, self.size)), *budgets, self.changes]
        return " ".join([*parts, *(["+".join(self.methods)] if self.methods else [])])

    def budget(self, tokens: int) -> int:
        """Tokens that gated methods recompute; 0 = as many as the default policy wants."""
        if self.k is None and self.fraction is None:
            return 0
        k = round((self.fraction or 0.0) * tokens) if self.k is None else self.k
        if not 1 <= k <= tokens:
            raise UserError(f"{self.name}: asks for {k} tokens; frames have 1 to {tokens}")
        return k


def cases_of(config: Options) -> tuple[list[Case], list[str]]:
    """The cases of a config, and the names of those left out because they need a clip or a peer.

    Raises:
        UserError: a case is not written as in configs/benchmark.yaml, or none is left.
    """
    entries = [{"changes": config.changes, **entry} for entry in config.cases]
    cases = [from_values(Case, entry, f"cases[{i}]") for i, entry in enumerate(entries)]
    wanted = [case for case in cases if config.only is None or config.only in case.name]
    usable = [
        case
        for case in wanted
        if (config.clip is not None or case.changes != "clip")
        and (config.peer is not None or not set(case.methods or ()) & set(PEERS))
    ]
    if not usable:
        raise UserError(f"no case left of {len(cases)}; see only={config.only}, clip={config.clip}, peer={config.peer}")
    return usable, [case.name for case in wanted if case not in usable]
