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

from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC, find_weights

TINY = [
    "model.init=null", "+model.dim=48", "+model.depth=2", "+model.global_blocks=[1]", "+model.channels=16",
    "+model.box_fc=[32]", "augment.sizes=[[64,96]]", "train.batch=1", "train.workers=0",
    "train.log_every=1", "train.checkpoint_every=1", "device=cpu", "evaluate=false", "probe=false",
]  # fmt: skip
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


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
def test_the_recipe_in_small(tree: Path, tmp_path: Path) -> None:
    """experiment=vitdet_b_vid with tiny widths, 30 steps in two processes: the same path, gradients added up."""
    train = tree / "annotations" / "imagenet_vid_train.json"
    options = [
        "experiment=vitdet_b_vid", f"data.root={tree}", f"mix=[{{train: {train}, ratio: 0.5}}]", *TINY, "probe=true",
        "+model.heads=3", "+model.window=4", "+model.box_convs=1", "+model.rpn_convs=1", "+model.proposals_train=50",
        "train.steps=30", "train.warmup=5", "train.batch=4", "train.at_once=1", "train.amp=bfloat16", "train.ema=0.9",
        "train.eval_every=15", "val_every=1", "train.checkpoint_every=10",
    ]  # fmt: skip
    done = run(*LAUNCHER, "tools/train_net.py", *options, f"output={tmp_path}")
    assert "million parameters" in done.stdout
    assert "2 of them" in done.stdout
    lines = logged(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in lines if "val_ap50" in line] == [15, 30]
    rates = [line["lr"] for line in lines if "loss" in line]
    assert rates[4] == pytest.approx(1e-4)
    assert rates[27] == pytest.approx(1e-5)  # the first milestone is at 0.889
    assert rates[29] == pytest.approx(1e-6)
    assert load_file(tmp_path / "best.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.slow
def test_training_with_gates_on(tree: Path, tmp_path: Path) -> None:
    options = ["clips.length=3", "clips.sprites=1", "train.steps=2", f"output={tmp_path}"]
    tiny = [option for option in TINY if "model." not in option]  # the shipped weights say what the model is
    run("tools/train_net.py", "experiment=eventful_finetune", f"data.root={tree}", *tiny, *options)
    assert [line["loss_distil"] > 0 for line in logged(tmp_path)] == [True, True]
    shipped, trained = (load_file(path) for path in (find_weights(SYNTHETIC), tmp_path / "model.safetensors"))
    distances = {key: float((trained[key] - shipped[key].float()).abs().max()) for key in shipped}
    assert 0 < max(distances.values()) < 0.01
    other = [option.replace("clips.length=3", "clips.length=4") for option in options]
    done = run("tools/train_net.py", "experiment=eventful_finetune", f"data.root={tree}", *tiny, *other, check=False)
    assert done.returncode == 2 and "the run was begun with other values of clips" in done.stderr


def test_shipped_weights_start_classes_of_ones_own(tree: Path, tmp_path: Path) -> None:
    options = [f"data.root={tree}", *(o for o in TINY if "model." not in o), "train.steps=1", f"output={tmp_path}"]
    done = run("tools/train_net.py", *options, "start=vitdet_tiny_vid")
    assert "vitdet_tiny_vid.safetensors: the last layer starts anew, for" in done.stderr
    trained, shipped = (load_file(path) for path in (tmp_path / "model.safetensors", find_weights("vitdet_tiny_vid")))
    assert trained.keys() == shipped.keys()
    others = {key for key in trained if trained[key].shape != shipped[key].shape}
    assert others and all(key.startswith("roi_heads.box_predictor.") for key in others)
    near = [float((trained[key] - shipped[key].float()).abs().max()) < 0.01 for key in trained.keys() - others]
    assert all(near)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.root=nowhere", "cannot read the data set"),
        ("model.init=nothing.safetensors", "no backbone weights"),
        ("device=tpu", "cannot be used here (there is no such kind); try device=cpu"),
        ("+model.headz=3", "unknown option"),
        ("experiment=eventful_finetune start=null", "has the classes"),  # the shipped default knows others
        ("+data.emphasis.rabbit=2", "emphasis: no class rabbit"),
        ("data.absent={folder:[airplane,bear]}", "data.absent: no class airplane, bear"),
    ],
)
def test_errors_are_one_line(tree: Path, tmp_path: Path, option: str, message: str) -> None:
    options = [f"data.root={tree}", *TINY, f"output={tmp_path / 'run'}", *option.split()]
    done = run("tools/train_net.py", *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
