"""What the tools share: printing, devices, and building models and gates from their options."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC
from eventful_det.detectors.protocol import AnyRule, VideoDetector
from eventful_det.engine.backends import Precision
from eventful_det.errors import UserError, printable
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, Focus, LargestError, RandomOrder, Selector
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.options import Count, Natural, NonNegative, Positive, Range, Share, from_values, nearest
from eventful_det.outputs import Stdout, write_json

Texts = str | int | tuple[str | int, ...]  # several names, or one; some are numbers
Side = Annotated[int, Range(32, 16384)]  # of the network's input in pixels
RULES: dict[str, type[AnyRule]] = {"rows": Rows, "windows": Windows, "paper": Paper, "dense": Dense}


class Gate(NamedTuple):
    """How tokens are recomputed, and which."""

    rule: AnyRule
    selector: Selector


@dataclass(frozen=True, kw_only=True)
class _Largest:
    """Tokens by their change; see configs/gate/policy."""

    age_power: NonNegative = 0.0
    saliency: NonNegative = 0.0

    def within(self, budget: float | int, threshold: float | None = None) -> Selector:
        return Selector(LargestError(threshold, self.age_power, self.saliency), budget)


@dataclass(frozen=True, kw_only=True)
class _TopK(_Largest):
    k: Natural

    def selector(self) -> Selector:
        return self.within(self.k)


@dataclass(frozen=True, kw_only=True)
class _Fraction(_Largest):
    fraction: Share = 0.25

    def selector(self) -> Selector:
        return self.within(self.fraction)


@dataclass(frozen=True, kw_only=True)
class _Threshold(_Largest):
    threshold: float
    cap: Share = 1.0

    def selector(self) -> Selector:
        return self.within(self.cap, self.threshold)


@dataclass(frozen=True, kw_only=True)
class _Focus:
    threshold: float
    cap: Share = 1.0
    floor: Share = 0.0
    saliency: NonNegative = 100.0
    block: Count = 4
    renew: NonNegative = 2.0

    def selector(self) -> Selector:
        return Selector(Focus(self.threshold, self.floor, self.saliency, self.block, self.renew), self.cap)


@dataclass(frozen=True, kw_only=True)
class _Random:
    k: Natural | None = None
    fraction: Share | None = None
    seed: Natural = 0

    def selector(self) -> Selector:
        return Selector(RandomOrder(self.seed), self.k if self.fraction is None else self.fraction)


POLICIES: dict[str, type[_TopK | _Fraction | _Threshold | _Focus | _Random]] = {
    "topk": _TopK,
    "fraction": _Fraction,
    "threshold": _Threshold,
    "focus": _Focus,
    "random": _Random,
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set; configs/data explains it."""

    root: str
    val: str
    train: str | None = None
    repeat_threshold: NonNegative = 0.0
    emphasis: dict[str, Positive] = field(default_factory=dict)
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    videos: str | None = None
    verbs: str | None = None
    nouns: str | None = None
    unseen: str | None = None
    tail_verbs: str | None = None
    tail_nouns: str | None = None
    weights: str | None = None


AnyDetector = VideoDetector[Any]
console = Console(file=Stdout(), markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]


def say(text: str) -> None:
    """Print a line of text."""
    console.print(printable(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning:", "yellow"), " ", printable(text)), soft_wrap=True)


def progress_bar(*, disable: bool = False, auto_refresh: bool = True) -> Progress:
    """A bar with a description, how many are done, and the time; without `auto_refresh` no thread of it takes time."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, disable=disable, auto_refresh=auto_refresh)


def show_table(lines: Iterable[Sequence[str]], title: str | None = None, left: int = 1) -> None:
    """Print a table whose first line is the header; all but the first `left` columns are aligned to the right."""
    header, *rows = lines
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def as_list(texts: Texts | None) -> list[str]:
    """None, one or several texts as a list."""
    several = texts if isinstance(texts, tuple) else () if texts is None else (texts,)
    return [str(text) for text in several]


def at_least_one(texts: Texts | None, name: str) -> list[str]:
    """One or several texts as a list.

    Raises:
        UserError: there is none; the message calls them `name`.
    """
    if not (found := as_list(texts)):
        raise UserError(f"{name}: give at least one")
    return found


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and requests to terminate wait until the block is done."""
    asked: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt(asked[0])


def command() -> str:
    """The command of this run, for its results: without passwords."""
    return " ".join(map(printable, sys.argv))


def write_results(directory: Path, results: dict[str, Any]) -> Path:
    """Write `results.json` and print where it is.

    Raises:
        UserError: it cannot be written.
    """
    path = directory / "results.json"
    write_json(path, results)
    say(f"results: {path}")
    return path


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" = a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = "there is no such kind" if "device string" in str(error) else str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used here ({why}); try device=cpu") from error


def open_detector(
    weights: str | None,
    labels: str | None,
    device: str,
    sources: Sequence[Any],
    precision: Precision | Literal["auto"] = "float32",
) -> AnyDetector:
    """A detector; without a name of weights, the shipped ones that know the sources."""
    synthetic = bool(sources) and all(str(source).startswith("synthetic") for source in sources)
    name = weights or (SYNTHETIC if synthetic else None)
    return load_detector(name, labels, precision=precision).to(choose_device(device))


def build_gate(gate: Mapping[str, Any]) -> Gate:
    """The rule and the selector of a `gate` config (configs/gate/*.yaml).

    Args:
        gate: "rule" ("rows", "windows", "paper" or "dense"), "policy" with its "name" ("topk", "fraction", "threshold",
            "focus", "random") and its options, and the options of the rule.

    Raises:
        UserError: a name is unknown, or an option does not belong to the rule or policy it was given to.
    """
    options = dict(gate)
    rule, policy = options.pop("rule", None), options.pop("policy", None)
    made = _build("rule", RULES, rule, options, "gate")
    if policy is None:
        return Gate(made, DEFAULT)
    if rule == "dense":
        raise UserError("unknown option gate.policy; gate=dense has none")
    if not isinstance(policy, Mapping):
        raise UserError(f"gate.policy must be a group of options, got {policy!r}; choose with gate/policy={policy}")
    policy = dict(policy)
    return Gate(made, _build("policy", POLICIES, policy.pop("name", None), policy, "gate.policy").selector())


def _build(kind: str, table: Mapping[str, Any], name: Any, options: dict[str, Any], where: str) -> Any:
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}; {nearest(name, table)}")
    return from_values(table[name], options, where)
