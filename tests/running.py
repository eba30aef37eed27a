"""Running the tools as a user does."""

from __future__ import annotations

import importlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python command...` in the repository and return what it printed; with `check`, it has to succeed.

    Scripts run in this process, which has imported already what they need. Modules (`-m`) get one of their own.
    """
    done = _in_a_process(command) if command[0] == "-m" else _run_here(command)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _in_a_process(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def _run_here(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    status: int | str | None = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, _as_it_was():
        told = logging.StreamHandler(err)  # as without a handler, which pytest has
        told.setLevel(logging.WARNING)
        logging.getLogger().addHandler(told)
        sys.argv[:] = command
        sys.path.insert(0, str((ROOT / command[0]).parent))
        os.chdir(ROOT)
        torch.set_num_threads(1)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert status is None or isinstance(status, int)
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What a script changes in its process, as it was before."""
    folder, arguments, paths, threads = os.getcwd(), list(sys.argv), list(sys.path), torch.get_num_threads()
    stops = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for number, stop in stops.items():
            signal.signal(number, stop)
        root.handlers[:] = handlers
        torch.set_num_threads(threads)
        sys.argv[:], sys.path[:] = arguments, paths
        os.chdir(folder)


def options_of(name: str, *arguments: str) -> Any:
    """The options of a tool, as its command line makes them."""
    return importlib.import_module("command_line").options_of(name, arguments)


def script_main(name: str) -> Callable[[list[str]], int]:
    """What a script of datasets/ does with its arguments; it finds its neighbours as when Python runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "datasets"))
        main: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "datasets" / name))["main"]
    return main


def make_tree(root: Path, *options: str) -> Path:
    """A small synthetic data set, prepared."""
    assert script_main("make_synthetic_vid.py")(["--output", str(root), "--workers", "1", *options]) == 0
    assert script_main("prepare_imagenet_vid.py")([str(root), "--workers", "1"]) == 0
    return root
