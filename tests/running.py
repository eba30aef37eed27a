"""Running the tools as a user does."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


_FORKS = multiprocessing.get_context("forkserver")  # its server imports what is large once, for all runs
_OURS = ["eventful_det.detectors.checkpoints.files", "eventful_det.evaluation.sweep"]
_FORKS.set_forkserver_preload(["hydra", "matplotlib.figure", "rich.progress", *_OURS])


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python command...` in the repository and return what it printed; with `check`, it has to succeed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        printed = [str(Path(folder, name)) for name in ("out", "err")]
        process = _FORKS.Process(target=_run_here, args=(command, *printed))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        done = subprocess.CompletedProcess(command, process.exitcode or 0, *(Path(p).read_text() for p in printed))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _run_here(command: tuple[str, ...], out: str, err: str) -> None:
    """Become `python command...`, with its output in files."""
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.update(ENVIRONMENT)
    os.chdir(ROOT)
    module = command[0] == "-m"
    sys.argv = list(command[module:])
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str((ROOT / command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()


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
