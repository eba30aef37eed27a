"""What the tools share: one-line errors, results files, building models, gates and data from a config."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from eventful_det.detectors.protocol import AnyRule
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, Focus, LargestError, RandomOrder, Selector
from eventful_det.models.checkpoints import SYNTHETIC, load_detector
from eventful_det.models.detector import Detector

console = Console()

RULES: dict[str, Callable[..., AnyRule]] = {"rows": Rows, "paper": Paper, "dense": Dense}


class Gate(NamedTuple):
    """How tokens are recomputed, and which."""

    rule: AnyRule
    selector: Selector


def _largest(
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    cap: float = 1.0,
    age_power: float = 0.0,
    saliency: float = 0.0,
) -> Selector:
    budget = k if k is not None else float(cap if fraction is None else fraction)
    return Selector(LargestError(threshold, age_power, saliency), budget)


def _focus(
    threshold: float, cap: float = 1.0, floor: float = 0.0, saliency: float = 100.0, block: int = 4, renew: float = 2.0
) -> Selector:
    return Selector(Focus(threshold, floor, saliency, block, renew), float(cap))


def _random(k: int | None = None, fraction: float | None = None, seed: int = 0) -> Selector:
    return Selector(RandomOrder(seed), k if fraction is None else float(fraction))


SELECTORS: dict[str, Callable[..., Selector]] = {
    "topk": _largest,
    "fraction": _largest,
    "threshold": _largest,
    "focus": _focus,
    "random": _random,
}


def tool(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Print a user's error in one line and exit with 2, without a traceback.

    Ctrl-C and a request to terminate end the tool in the same orderly way, with 128 + the signal's number.
    """

    @functools.wraps(main)
    def wrapped(config: DictConfig) -> None:
        signal.signal(signal.SIGTERM, _stop)
        try:
            main(config)
        except UserError as error:
            message = str(error).rpartition("UserError: ")[2]  # of a data loader's process: without its traceback
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            print(f"error: {error.strerror or error}{place}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print("stopped", file=sys.stderr)
            sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))

    return wrapped


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


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


def plain(config: Any) -> dict[str, Any]:
    """A config node as a plain dictionary; lists become tuples, as our dataclasses hold them."""
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def write_results(directory: Path, results: dict[str, Any]) -> Path:
    """Write `results.json` atomically and print where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    part = path.with_name("results.json.part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)
    console.print(f"results: {path}", soft_wrap=True)
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
        raise UserError(f"device={name} cannot be used here ({str(error).splitlines()[0]}); try device=cpu") from error


def open_detector(config: DictConfig, sources: Sequence[Any]) -> Detector:
    """The detector of a config; without a name, the shipped weights that know the sources.

    Args:
        config: "weights", "labels" and "device".
        sources: what it is to watch.
    """
    synthetic = bool(sources) and all(str(source).startswith("synthetic") for source in sources)
    detector = load_detector(config.weights or (SYNTHETIC if synthetic else None), config.labels)
    return detector.to(choose_device(config.device))


def build_gate(gate: DictConfig) -> Gate:
    """The rule and the selector of a `gate` config (configs/gate/*.yaml).

    Args:
        gate: "rule" ("rows", "paper" or "dense"), "policy" with its "name" ("topk", "fraction", "threshold",
            "focus", "random") and its options, and the options of the rule.

    Raises:
        UserError: a name is unknown, or an option does not belong to the rule or policy it was given to.
    """
    options = plain(gate)
    rule, policy = options.pop("rule"), options.pop("policy", None)
    selector = DEFAULT
    if policy is not None:
        policy = dict(policy)
        selector = _build("policy", SELECTORS, policy.pop("name"), policy)
    return Gate(_build("rule", RULES, rule, options), selector)


def _build(kind: str, table: Mapping[str, Callable[..., Any]], name: str, options: dict[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(table)}")
    try:
        return table[name](**options)
    except TypeError as error:
        raise UserError(f"{kind} {name}: {str(error).partition('() ')[2] or error}") from error
