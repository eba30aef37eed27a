"""tools/benchmark.py engine=[...]: every method against the fastest dense one of its precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from benchmark_cases import Case
from benchmark_engines import cnn_steps, compare, markdown
from running import options_of
from videos import encode

from eventful_det.benchmark.timing import Call, Timed
from eventful_det.engine.backends import Graph
from eventful_det.engine.export import write_onnx
from eventful_det.errors import UserError
from eventful_det.options import from_values

SMALL = "{dim: 48, depth: 4, heads: 3, global_blocks: [1,3], channels: 16, box_fc: [64], proposals: 20}"
CASE = f"{{model: vitdet_tiny, size: [64,96], fraction: 0.25, buckets: [0.25], config: {SMALL}}}"


def timed(*milliseconds: float, gmacs: float = 1.0) -> Timed[tuple[float, int]]:
    calls = [Call(1e-3 * value, (gmacs, 5_000_000)) for value in milliseconds]
    return Timed(calls[0], calls)


def test_ratios_are_to_the_fastest_dense_of_the_precision() -> None:
    methods = {
        "torch dense": timed(100, 110, 120, gmacs=4),
        "openvino dense": timed(50, 60, 40, gmacs=4),
        "openvino gated": timed(10, 10, 10),
        "torch rows float32": timed(30, 20, 40),
        "a cnn openvino": timed(25, 25, 25, gmacs=0),
    }
    slow, fast, gated, rows, cnn = compare(methods, "float32")
    assert slow["against"] == gated["against"] == "openvino dense"
    assert slow["faster"] == pytest.approx(50 / 100) and fast["faster"] == 1
    assert gated["faster"] == pytest.approx(5) and gated["time_share"] == pytest.approx(0.2)
    assert gated["faster_than_rows"] == pytest.approx(3) and rows["faster_than_rows"] == 1
    assert gated["macs_share"] == 0.25 and gated["p95_over_p50"] == 1 and cnn["macs_share"] is None
    (low,) = compare({"openvino dense": methods["openvino dense"]}, "bfloat16")
    assert low["precision"] == "bfloat16" and low["faster"] == 1 and low["faster_than_rows"] is None
    text = markdown({"command": "c", "machine": "m", "repetitions": 3}, [{"name": "x", "rows": [slow, fast, cnn]}])
    assert "| float32 | openvino dense * | 4.00 | 100 | 50.0 |" in text and "| a cnn openvino | - | - | 25.0 |" in text


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "engine=[torch]",
        "precision=[float32,bfloat16]",
        "repetitions=2",
        "warm_up=1",
        "threads=1",
        "profile=true",
    )
    saved = tmp_path / "performance.json"
    benchmark.run(options_of("benchmark", *options, f"cases=[{CASE}]", f"output={tmp_path / 'out'}", f"save={saved}"))
    assert "torch gated" in capsys.readouterr().out
    (case,) = json.loads(saved.read_text())["cases"]
    rows = {(row["precision"], row["method"]): row for row in case["rows"]}
    assert set(rows) == {
        *((precision, f"torch {how}") for precision in ("float32", "bfloat16") for how in ("dense", "gated")),
        *((precision, "torch rows float32") for precision in ("float32", "bfloat16")),
    }
    assert all(row["against"] == "torch dense" for row in case["rows"])
    assert 0 < rows["float32", "torch gated"]["macs_share"] < 0.95 < rows["float32", "torch dense"]["macs_share"]
    for row in case["rows"]:
        parts = row.get("parts_ms")
        assert (parts is None) == (row["method"] == "torch rows float32")
        assert parts is None or {"backbone", "rpn", "roi"} <= set(parts) and all(ms >= 0 for ms in parts.values())
    assert "torch gated, median ms of its parts: backbone" in (tmp_path / "out/benchmark.md").read_text()
    assert torch.get_num_threads() == 1


def test_with_hold_streams_are_timed_some_frames_at_a_time(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 96, 3), np.uint8)
    film = encode(tmp_path / "film.mp4", list(frames))
    case = CASE.replace("fraction: 0.25", "changes: clip")
    options = ("engine=[torch]", "repetitions=2", "warm_up=1", "threads=1", "hold=2", f"clip={film}")
    benchmark.run(options_of("benchmark", *options, f"cases=[{case}]", f"output={tmp_path / 'out'}"))
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["torch dense", "torch dense, hold 2", "torch gated", "torch gated, hold 2"]
    assert rows["torch dense, hold 2"]["gmacs"] == pytest.approx(rows["torch dense"]["gmacs"] / 2)
    assert rows["torch dense"]["against"] == "torch dense"


def test_a_network_of_the_users_runs_in_the_engines_that_know_the_precision(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    network = Graph("my.net", torch.nn.Conv2d(3, 2, 3), (torch.zeros(1, 3, 8, 8),), ((),))
    write_onnx(network, tmp_path / "my.net.onnx")
    options = options_of("benchmark", "engine=[openvino,onnxruntime]", "threads=1")
    for precision, names in (("float32", {"onnxruntime", "openvino"}), ("bfloat16", {"openvino"}), ("int8", set())):
        steps = cnn_steps(tmp_path / "my.net.onnx", options, precision)
        assert set(steps) == {f"my.net {name}" for name in names}
        assert all(step(torch.zeros(0)) == (0.0, 0) for step in steps.values())
    write_onnx(dataclasses.replace(network, free=((0,),)), tmp_path / "any.onnx")
    with pytest.raises(UserError, match="give a network of a fixed size"):
        cnn_steps(tmp_path / "any.onnx", options, "float32")


def test_steps_of_a_recogniser(tmp_path: Path) -> None:
    options = ("repetitions=1", "warm_up=1", "threads=1", "recogniser=vivit_tiny", "k=5")
    benchmark.run(options_of("benchmark", *options, f"output={tmp_path / 'out'}"))
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    assert [row["method"] for row in found["rows"]] == ["torch dense", "torch rows", "torch paper"]
    assert found["k"] == 5 and found["rows"][1]["macs_share"] < 0.3


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no case of a whole detector"):
        benchmark.run(options_of("benchmark", "engine=[torch]", "only=backbone 672"))
    with pytest.raises(UserError, match="engine"):
        options_of("benchmark", "engine=[fast]")
    for options, message in (
        (["engine=[torch]", "precision=[float32,int8]"], "precision=int8: none of these engines"),
        (["engine=[onnxruntime]", "precision=[bfloat16]"], "precision=bfloat16: none of these engines"),
        (["recogniser=vivit_tiny", "engine=[openvino]", "precision=[int8]"], "int8 is for detectors"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.run(options_of("benchmark", *options))


def test_a_bucket_of_two_windows_is_a_number_and_no_share() -> None:
    case = from_values(Case, {"model": "vitdet_tiny", "size": [64, 64], "fraction": 0.5, "buckets": [2, 0.25]}, "case")
    assert [type(bucket) for bucket in case.buckets] == [int, float]
    options = options_of("export", "weights=vitdet_tiny_vid", "buckets=[2,0.25]")
    assert [type(bucket) for bucket in options.buckets] == [int, float]
