"""tools/train_net.py end to end: killed and resumed, in two processes, and its error lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ENVIRONMENT, ROOT, make_tree, run
from safetensors.torch import load_file

TINY = [
    "model.init=null", "+model.dim=48", "+model.depth=2", "+model.global_blocks=[1]", "+model.channels=16",
    "+model.box_fc=[32]", "augment.sizes=[[64,96]]", "train.batch=1", "train.workers=0",
    "train.log_every=1", "train.checkpoint_every=1", "device=cpu", "evaluate=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ["--width", "96", "--height", "64", "--train-videos", "2", "--train-frames", "2"]
    return make_tree(tmp_path_factory.mktemp("vid") / "tree", *sizes, "--val-videos", "1", "--val-frames", "2")


def logged(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_killed_run_resumes_exactly(tree: Path, tmp_path: Path) -> None:
    command = ["tools/train_net.py", f"data.root={tree}", *TINY, "train.steps=12"]
    run(*command, f"output={tmp_path / 'whole'}")
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, *command, f"output={parts}"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (parts / "metrics.jsonl").is_file() or len(logged(parts)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(*command, f"output={parts}")
    assert logged(parts) == logged(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert json.loads((parts / "results.json").read_text())["steps"] == 12


@pytest.mark.slow
def test_two_processes_train(tree: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [f"data.root={tree}", *TINY, "train.steps=2", f"output={tmp_path / 'run'}"]
    run(*launcher, "tools/train_net.py", *options)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.root=nowhere", "cannot read the data set"),
        ("model.init=nothing.safetensors", "no backbone weights"),
        ("device=tpu", "cannot be used here"),
        ("+model.headz=3", "unknown option"),
    ],
)
def test_errors_are_one_line(tree: Path, tmp_path: Path, option: str, message: str) -> None:
    options = [f"data.root={tree}", *TINY, f"output={tmp_path / 'run'}", option]
    done = run("tools/train_net.py", *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
