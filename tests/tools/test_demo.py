"""tools/demo.py: complete, consistent files whatever ends the run, and its error lines."""

from __future__ import annotations

import csv
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from running import ENVIRONMENT, ROOT

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video import VideoFrame, VideoSource, open_source
from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import Focus, RandomK, Threshold, TopK
from eventful_det.gating.rows import Rows
from eventful_det.models.checkpoints import save_detector
from eventful_det.models.detector import Detector

FILES = {"annotated.mp4", "detections.jsonl", "cost.csv", "cost.png", "results.json"}


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "tools/demo.py", "device=cpu", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def weights(tiny_detector: Detector, tmp_path: Path) -> str:
    save_detector(tiny_detector, tmp_path / "tiny.safetensors", torch.float32)
    return f"weights={tmp_path / 'tiny.safetensors'}"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("demo")


def config(*options: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("demo", ["device=cpu", *options])


def check_run(directory: Path) -> dict[str, Any]:
    """All files hold the same frames; returns the results."""
    assert {path.name for path in directory.iterdir()} == FILES
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    lines = [json.loads(line) for line in (directory / "detections.jsonl").read_text().splitlines()]
    with (directory / "cost.csv").open() as table:
        rows = list(csv.DictReader(table))
    with open_source(directory / "annotated.mp4") as video:
        shown = sum(1 for _ in video)
    assert len(lines) == len(rows) == shown == results["frames"]
    assert [line["frame_index"] for line in lines] == list(range(shown))
    return results


def test_complete_run_and_failed_start(weights: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(weights, "source=synthetic:1", "max_frames=4", f"output={output}", "compare=true", "show=0.2")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert str(output / "results.json") in stdout and "4 frames" in stdout
    results = check_run(output)
    assert results["stopped"] is None and results["skipped"] == 0 and results["flushes"] == 1
    assert 0 < results["share_of_dense"]["backbone"] < results["share_of_dense"]["total"] < 1
    assert results["gmacs_per_frame"]["total"] < results["dense_gmacs_per_frame"]["total"]
    assert results["state_bytes"] > 0 and results["peak_memory_mb"] > 10
    assert 0 <= results["compare"]["agreement_f1"] <= 1 and results["compare"]["times_faster_median"] > 0
    line = json.loads((output / "detections.jsonl").read_text().splitlines()[1])
    assert line["size"] == {"height": 256, "width": 384} and line["timestamp"] == 0.04
    assert line["detections"] and set(line["detections"][0]) == {"box", "score", "label", "name"}
    assert all(0 <= x <= 384 and 0 <= y <= 256 for d in line["detections"] for x, y in (d["box"][:2], d["box"][2:]))
    assert set(line["cost"]) == {"macs", "dense", "ms", "recomputed", "tokens", "flush"}
    assert line["cost"]["macs"]["total"] == sum(v for k, v in line["cost"]["macs"].items() if k != "total")

    before = {path.name: path.read_bytes() for path in output.iterdir()}
    process = start(weights, "source=missing.mp4", f"output={output}")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.startswith("error: no such file or folder: 'missing.mp4'") and stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_interrupted_run(weights: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(weights, "source=synthetic", f"output={output}")
    lines = output / "detections.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    results = check_run(output)
    assert results["stopped"] == "interrupted" and 3 <= results["frames"] < 150


class Breaking(VideoSource):
    def _read(self) -> Iterator[VideoFrame]:
        for frame in render_video(SceneOptions(width=64, height=48, frames=5)):
            yield VideoFrame(frame.image)
        raise UserError("the camera fell off")


def test_error_midway_keeps_what_was_written(
    module: ModuleType, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_source", lambda _: Breaking("camera"))
    with pytest.raises(UserError, match="fell off"):
        module.demo(config(weights, f"output={tmp_path / 'out'}", "hold=2", "show=0.2"))
    results = check_run(tmp_path / "out")
    assert (results["frames"], results["stopped"]) == (5, "the camera fell off")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["max_frames=0"], "max_frames"),
        (["gate=dense", "budget=0.5"], "leave budget out"),
        (["budget=2.5"], "budget of 2.5"),
        (["source=synthetic", "output={tmp}/file/out"], "cannot write to output="),
        (["weights={tmp}/none.safetensors"], "no weights"),
        (["device=abacus"], "device=abacus"),
        (["source={tmp}"], "no pictures"),
    ],
)
def test_error_lines(module: ModuleType, weights: str, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    filled = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(UserError, match=message):
        module.demo(config(weights, f"output={tmp_path / 'out'}", *filled))
    assert not (tmp_path / "out").exists()


def test_build_rule(module: ModuleType) -> None:
    build = importlib.import_module("common").build_rule
    assert build(config().gate) == Rows() == Rows(Focus(2.0, 0.4, 0.0, 100.0, 4))
    chosen = config("gate/policy=topk", "gate.policy.k=7", "gate.renew_every=8", "gate.gate=embedding").gate
    assert build(chosen) == Rows(TopK(7, 0.5, 4.0), "embedding", 8)
    chosen = config("gate=paper", "gate/policy=threshold", "gate.policy.threshold=2", "gate.pool=2").gate
    assert build(chosen) == Paper(Threshold(2, 0.5, 0.0, 0.5, 4.0), pool=2)
    assert build(config("gate/policy=random").gate) == Rows(RandomK(fraction=0.25))
    assert build(config("gate=dense").gate) is None
    with pytest.raises(UserError, match="unknown rule 'cols'; known: rows, paper or dense"):
        build(OmegaConf.create({"rule": "cols"}))
    with pytest.raises(UserError, match="unknown policy 'best'"):
        build(OmegaConf.create({"rule": "rows", "policy": {"name": "best"}}))
    with pytest.raises(UserError, match="policy topk: .*cap"):
        build(OmegaConf.create({"rule": "rows", "policy": {"name": "topk", "k": 3, "cap": 1}}))
