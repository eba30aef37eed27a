"""The tools with an RF-DETR: through the protocol, they know nothing of it."""

from __future__ import annotations

import argparse
import csv
import json
import socket
from pathlib import Path
from typing import Any

import actions
import benchmark
import demo
import eval_net
import pytest
import torch
from running import make_tree, options_of

from eventful_det.detectors.rf_detr.sizes import random_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ["--width", "96", "--height", "64", "--val-videos", "1", "--val-frames", "3"]
    return make_tree(tmp_path_factory.mktemp("vid") / "tree", *sizes, "--train-videos", "1", "--train-frames", "1")


@pytest.fixture(scope="module")
def weights(tree: Path) -> Path:
    """A folder of a small random model that has the classes of the data."""
    data = json.loads((tree / "annotations" / "imagenet_vid_val.json").read_text())
    names = dict(enumerate(entry["name"] for entry in data["categories"]))
    vit = {"hidden_size": 24, "num_attention_heads": 2, "image_size": 64}
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 4, "num_queries": 9}
    model = random_model(
        "rf-detr-nano", config={"d_model": 32, "id2label": names, "num_labels": len(names), **heads}, backbone=vit
    )
    model.save_pretrained(tree / "rf_detr")
    return tree / "rf_detr"


def test_detect(weights: Path, tmp_path: Path) -> None:
    options = [f"weights={weights}", "source=synthetic:1", "max_frames=4", "budget=0.25", f"output={tmp_path}"]
    demo.run(options_of("demo", "device=cpu", "classes=[disc,star]", *options))
    assert (tmp_path / "annotated.mp4").stat().st_size > 0
    with (tmp_path / "cost.csv").open() as file:
        total = [float(row["gmacs_total"]) for row in csv.DictReader(file)]
    assert len(total) == 4 and max(total[1:]) < total[0]


def test_a_sweep(tree: Path, weights: Path, tmp_path: Path) -> None:
    holds = [f"eval.curves.{name}.vary.hold=[2]" for name in ("held_boxes", "moved_boxes", "default_moved")]
    few = ["eval.fractions=[0.25]", "eval.caps=[0.25]", *holds, "scene_cuts=false"]
    options = [f"data.root={tree}", f"weights={weights}", f"output={tmp_path}"]
    eval_net.run(options_of("eval_net", "device=cpu", "eval=rf_detr", *few, *options))
    results = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    dense, rows, held, moved, both = (
        results[name] for name in ("dense", "rows 0.25", "held boxes 2", "moved boxes 2", "default moved 2")
    )
    assert rows["relative_total"] < 1 and rows["state_bytes"] > dense["state_bytes"]
    assert held["relative_total"] == moved["relative_total"] == pytest.approx(2 / 3)
    assert both["relative_total"] < moved["relative_total"]


def test_a_file_of_the_package_rfdetr_is_no_recogniser(tmp_path: Path) -> None:
    path = tmp_path / "rf-detr-nano.pth"
    torch.save({"model": {}, "args": argparse.Namespace()}, path)
    assert not actions.recognises(None, str(path))


def test_many_streams(weights: Path, tmp_path: Path) -> None:
    options = ["streams=[2]", f"weights={weights}", "repetitions=2", "warm_up=1", f"output={tmp_path}"]
    benchmark.run(options_of("benchmark", "device=cpu", *options))
    rows = json.loads((tmp_path / "results.json").read_text())["streams"]
    assert {row["method"] for row in rows} >= {"dense", "pool"} and all(row["streams"] == 2 for row in rows)


def test_a_live_page(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pytest.importorskip("serve", reason="fastapi or uvicorn is not installed")
    client_of = pytest.importorskip("fastapi.testclient", reason="httpx2 is not installed").TestClient
    titles = []

    class Asked:
        """In place of a server that runs until Ctrl-C."""

        def __init__(self, app: Any) -> None:
            self.app = app

        def run(self, sockets: list[socket.socket]) -> None:
            with sockets[0], client_of(self.app, base_url="http://localhost") as client:
                titles.extend(one["title"] for one in client.get("/api/state").json()["streams"])

    monkeypatch.setattr(serve, "build_server", Asked)
    options = [f"weights={weights}", "source=synthetic:1", "port=0", "budget=25%", "device=cpu"]
    serve.run_server(options_of("serve", *options))
    assert titles == ["synthetic:1"]
