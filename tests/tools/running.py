"""Running the tools as a user does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python command...` in the repository and return what it printed; with `check`, it has to succeed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def compose_config(name: str, *options: str) -> DictConfig:
    """The config of a tool, as its command line would make it."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, list(options))


def import_tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A tool as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


def make_tree(root: Path, *options: str) -> Path:
    """A small synthetic data set, prepared."""
    run("datasets/make_synthetic_vid.py", "--output", str(root), "--workers", "1", *options)
    run("datasets/prepare_imagenet_vid.py", str(root))
    return root
