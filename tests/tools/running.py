"""Running the tools as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python command...` in the repository and return what it printed; with `check`, it has to succeed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def make_tree(root: Path, *options: str) -> Path:
    """A small synthetic data set, prepared."""
    run("datasets/make_synthetic_vid.py", "--output", str(root), "--workers", "1", *options)
    run("datasets/prepare_imagenet_vid.py", str(root))
    return root
