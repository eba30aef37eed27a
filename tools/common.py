"""What the tools share: one-line errors, results files, building models, gates and data from a config."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from eventful_det.errors import UserError

console = Console()


def tool(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Print a user's error in one line and exit with 2, without a traceback; 130 on Ctrl-C."""

    @functools.wraps(main)
    def wrapped(config: DictConfig) -> None:
        try:
            main(config)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return wrapped


def plain(config: Any) -> Any:
    """A config as plain dictionaries and lists."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def write_results(directory: Path, results: dict[str, Any]) -> Path:
    """Write `results.json` atomically and print where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    part = path.with_name("results.json.part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)
    console.print(f"results: {path}")
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
