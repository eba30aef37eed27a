"""tools/benchmark.py end to end on networks that take no time, its arithmetic, and its error lines."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import benchmark_streams
import pytest
import torch
from benchmark import compare, markdown, table
from benchmark_cases import Options, cases_of
from benchmark_methods import Step, prepare
from running import options_of, run

from eventful_det.benchmark.timing import Call, Timed
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError

PEER = os.environ.get("EVENTFUL_PEER")  # a checkout of WISION-Lab/eventful-transformer
SMALL = "{dim: 48, depth: 4, heads: 3, global_blocks: [1,3], channels: 16, box_fc: [64], proposals: 20}"
DETECTOR = f"{{model: vitdet_tiny, size: [64,96], what: detector, fraction: 0.25, config: {SMALL}}}"
BACKBONE = f"{{model: vitdet_tiny, size: [96,64], what: backbone, k: 5, config: {SMALL}}}"


def settings(*overrides: str) -> Options:
    return options_of("benchmark", *overrides)


def find(case: dict[str, Any], method: str, part: str) -> dict[str, Any]:
    (row,) = (row for row in case["rows"] if (row["method"], row["part"]) == (method, part))
    return row


def test_end_to_end(tmp_path: Path) -> None:
    done = run(
        "tools/benchmark.py",
        f"cases=[{DETECTOR},{BACKBONE}]",
        *("repetitions=3", "warm_up=2", "threads=1", "device=cpu", "profile=true", f"output={tmp_path}"),
    )
    assert "per MAC" in done.stdout and "aten::addmm" in done.stdout and "results.json" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert "1 threads" in results["machine"] and "float32" in results["machine"]
    detector, backbone = results["cases"]
    assert (detector["k"], detector["tokens"], backbone["k"], backbone["tokens"]) == (6, 24, 5, 24)
    assert "exactly 6 tokens per frame in 4 moving blobs, seed 0" in detector["notes"][0]
    assert len(detector["rows"]) == 9 and len(backbone["rows"]) == 3
    dense, rows = (find(detector, method, "total") for method in ("dense", "rows"))
    assert dense["mac_ratio"] == dense["time_ratio"] == 1
    assert rows["mac_ratio"] == pytest.approx(dense["gmacs"] / rows["gmacs"]) and rows["mac_ratio"] > 1
    parts = [find(detector, "rows", part)["gmacs"] for part in ("backbone", "heads")]
    assert sum(parts) == pytest.approx(rows["gmacs"])
    assert 0 < find(detector, "rows", "backbone")["ms_p50"] < rows["ms_p50"] <= rows["ms_p95"]
    assert rows["state_bytes"] > dense["state_bytes"] and find(backbone, "dense", "backbone")["state_bytes"] == 0
    assert sum(dense["attention_kernels"].values()) == 4 and rows["ms_first"] > 0
    text = (tmp_path / "benchmark.md").read_text()
    assert text.count("| rows |") == 4 and backbone["name"] in text
    assert len(list(tmp_path.glob("profile-*.txt"))) == 6


def test_gated_methods_recompute_what_changes() -> None:
    (case,), _ = cases_of(settings(f"cases=[{BACKBONE}]"))
    setting = prepare(case, settings(), 4, torch.device("cpu"), None)
    dense, rows = setting.methods["dense"], setting.methods["rows"]
    steps = [rows.step(frame).macs["backbone"] for frame in setting.frames]
    assert steps[0] > 3 * steps[1] and steps[0] <= dense.step(setting.frames[0]).macs["backbone"]
    held = rows.state_bytes()
    rows.reset()
    assert held > 0 and rows.state_bytes() == 0
    assert rows.step(setting.frames[0]).macs["backbone"] == steps[0]


def test_a_clip(tmp_path: Path) -> None:
    clip = DETECTOR.replace("}}", "}, changes: clip}")
    (case,), left_out = cases_of(settings(f"cases=[{clip}]", "clip=synthetic:1"))
    setting = prepare(case, settings("clip=synthetic:1"), 3, torch.device("cpu"), None)
    assert left_out == [] and [frame.shape for frame in setting.frames] == [(3, 64, 96)] * 3
    assert "those of the clip synthetic:1" in setting.notes[0]
    with pytest.raises(UserError, match="has 150 frames; 151 are needed"):
        prepare(case, settings("clip=synthetic:1"), 151, torch.device("cpu"), None)


def test_still_frames() -> None:
    still = BACKBONE.replace("k: 5", "changes: still, methods: [dense, rows, rows_half]")
    (case,), _ = cases_of(settings(f"cases=[{still}]"))
    setting = prepare(case, settings(), 3, torch.device("cpu"), None)
    assert setting.k == 0 and all(torch.equal(frame, setting.frames[0]) for frame in setting.frames)
    for name in ("rows", "rows_half"):
        first, second = (setting.methods[name].step(frame).macs["backbone"] for frame in setting.frames[:2])
        assert first > 100 * second > 0
    assert setting.methods["rows_half"].state_bytes() < setting.methods["rows"].state_bytes()


def test_rf_detr_and_a_backbone_of_timm() -> None:
    pytest.importorskip("transformers")
    sizes = "{d_model: 32, decoder_ffn_dim: 48, decoder_self_attention_heads: 2, decoder_cross_attention_heads: 4"
    vit = "{hidden_size: 24, num_attention_heads: 2}"
    sizes += f", num_queries: 9, backbone_config: {vit}}}"
    detector = f"{{model: rf-detr-nano, size: [64,64], fraction: 0.25, config: {sizes}}}"
    backbone = "{model: 'timm:vit_tiny_patch16_224', size: [64,64], what: backbone, k: 4}"
    for case in cases_of(settings(f"cases=[{detector},{backbone}]"))[0]:
        setting = prepare(case, settings(), 2, torch.device("cpu"), None)
        assert list(setting.methods) == ["dense", "rows"] and setting.k == 4
        dense, rows = ([method.step(frame) for frame in setting.frames] for method in setting.methods.values())
        parts = ("backbone", "heads", "total") if case.what == "detector" else ("backbone",)
        assert tuple(rows[1].macs) == parts and rows[1].macs["backbone"] < 0.5 * dense[1].macs["backbone"]


def timed(totals: list[float], backbones: list[float], macs: int) -> Timed[Step]:
    step = [Step({"backbone": macs, "total": 2 * macs}, {"backbone": seconds}) for seconds in backbones]
    calls = [Call(seconds, result) for seconds, result in zip(totals, step, strict=True)]
    return Timed(Call(9.0, step[0]), calls)


def test_ratios_by_hand() -> None:
    dense, gated = timed([4, 8, 40], [2, 2, 2], 6 * 10**9), timed([1, 4, 4], [0.5, 1, 2], 10**9)
    backbone, total = compare(gated, dense, ("backbone", "total"))
    assert (total["gmacs"], total["mac_ratio"], total["time_ratio"], total["ms_p50"]) == (2, 6, 4, 4000)
    assert (total["time_ratio_p5"], total["time_ratio_p95"]) == pytest.approx((2.2, 9.4))
    assert total["time_ratio_per_mac_ratio"] == pytest.approx(4 / 6)
    (nothing,) = compare(timed([1, 4, 4], [0, 0, 0], 0), dense, ("backbone",))  # heads that saw no change
    assert nothing["gmacs"] == nothing["ms_p50"] == 0 and math.isnan(nothing["time_ratio"])
    assert (backbone["gmacs"], backbone["time_ratio"], backbone["ms_p95"]) == (1, 2, pytest.approx(1900))
    facts = {"method": "rows", "ms_first": 9000, "state_bytes": 2 * 10**6, "peak_bytes": 3 * 10**6}
    header, first, last = table([{**facts, **row} for row in (backbone, total)])
    assert dict(zip(header, last, strict=True)) == {
        "method": "rows",
        "part": "total",
        "GMACs": "2.00",
        "fewer": "6.00",
        "p50 ms": "4000.0",
        "p95 ms": "4000.0",
        "faster (p5-p95)": "4.00 (2.20-9.40)",
        "per MAC": "0.67",
        "first ms": "9000.0",
        "state MB": "2.0",
        "peak MB": "3",
    }
    assert first[-3:] == ["", "", ""]
    case = {"name": "a case", "notes": ["A note."], "rows": [{**facts, **total}]}
    text = markdown({"command": "benchmark.py", "machine": "a machine", "repetitions": 3}, [case])
    assert "## a case\n\nA note.\n\n| method |" in text


def test_the_cases_of_the_config() -> None:
    cases, left_out = cases_of(settings())
    sizes = {(case.model, case.what, case.size) for case in cases}
    assert ("vitdet_b_vid", "backbone", (672, 672)) in sizes and ("vitdet_tiny", "detector", (384, 640)) in sizes
    assert len(left_out) == 4, "one needs a peer, three a clip"
    everything, left_out = cases_of(settings("peer=somewhere", "clip=a.mp4"))
    assert left_out == [] and len(everything) == len(cases) + 4
    assert [case.size for case in cases_of(settings("only=672x672"))[0]] == [(672, 672)]
    assert {case.changes for case in everything if case.model != "shipped"} == {"synthetic", "still"}
    assert {case.changes for case in cases_of(settings("changes=clip", "clip=a.mp4"))[0]} == {"clip", "still"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("k: 5", "k: 25"), "asks for 25 tokens; frames have 1 to 24"),
        (("k: 5", "k: few"), "cases[0].k must be a whole number of at least 1"),
        (("k: 5", "k: 5, fraction: 0.5"), "exactly one of k (tokens) and fraction"),
        (("[96,64]", "[96,60]"), "multiples of 32 pixels"),
        (("[96,64]", "[96]"), "cases[0].size must be a list of 2: a whole number from 32"),
        (("[96,64]", "96"), "cases[0].size must be a list of 2"),
        (("what: backbone", "what: heads"), "cases[0].what must be 'backbone' or 'detector'"),
        (("k: 5", "k: 5, methods: [dense,fast]"), "unknown method 'fast'; known for a backbone: dense, rows, paper"),
        (("k: 5", "k: 5, methods: [rows]"), "methods need dense"),
        (("k: 5", "k: 5, changes: some"), "changes must be 'synthetic' or 'clip' or 'still'"),
        (("k: 5", "k: 5, changes: still"), "give neither k nor fraction"),
        (("k: 5", "tokens: 5"), "cases[0]: unknown option 'tokens'"),
        (("model: vitdet_tiny, ", ""), "cases[0]: give model as well"),
        (("model: vitdet_tiny", "model: nothing"), "no weights 'nothing'"),
        (("dim: 48", "sides: 48"), "unknown option"),
        (("k: 5", "k: 5, changes: clip"), "no case left of 1"),
    ],
)
def test_errors(change: tuple[str, str], message: str) -> None:
    entry = BACKBONE.replace(*change)
    if "nothing" in change[1]:
        entry = entry.replace(SMALL, "{}")
    with pytest.raises(UserError, match=re.escape(message)):
        (case,), _ = cases_of(settings(f"cases=[{entry}]"))
        prepare(case, settings(), 4, torch.device("cpu"), None)


def test_an_error_takes_one_line(tmp_path: Path) -> None:
    done = run("tools/benchmark.py", f"cases=[{BACKBONE}]", f"peer={tmp_path}", f"output={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "holds no eventful_transformer/backbones.py" in done.stderr
    assert not (tmp_path / "results.json").exists()


def test_streams(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_streams, "load_detector", lambda _: tiny_detector)
    options = ("streams=[1,3]", "budget=24", "hold=3", "repetitions=6", "warm_up=3", "device=cpu", f"output={tmp_path}")
    benchmark_streams.bench_streams(settings(*options), {"command": "a command"})
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["streams"], row["method"]): row for row in results["streams"]}
    methods = {"dense", "one by one", "pool", "dense, hold 3", "pool, hold 3"}
    assert set(rows) == {(n, method) for n in (1, 3) for method in methods}
    for count in (1, 3):  # two whole cycles of three turns
        assert rows[count, "dense, hold 3"]["share_of_dense"] == pytest.approx(
            rows[count, "dense"]["share_of_dense"] / 3
        )
        assert rows[count, "pool, hold 3"]["share_of_dense"] < rows[count, "pool"]["share_of_dense"]
        # No lower bound: to move boxes takes as long as so tiny a detector does.
        assert rows[count, "dense, hold 3"]["faster_than_dense"]["median"] < 10, "idle rounds are not all there is"
    assert results["command"] == "a command" and results["budget"] == "24"
    for (count, method), row in rows.items():
        assert row["frames_per_second"] > 0
        assert (row["share_of_dense"] >= 1) == (method == "dense")
        assert row["faster_than_dense"]["median"] > 0 and row["faster_than_one_by_one"]["median"] > 0
        assert row["p95_to_median"] >= 1
        if method == "pool":
            assert row["state_bytes"] == pytest.approx(count * rows[1, "pool"]["state_bytes"], rel=0.02)
    wrong = (
        ("streams=[0]", "whole number"),
        ("budget=fast", "cannot be understood"),
        ("hold=99", "hold must be at most"),
    )
    for bad, message in wrong:
        with pytest.raises(UserError, match=message):
            benchmark_streams.bench_streams(settings("streams=[1]", bad), {})


@pytest.mark.skipif(PEER is None, reason="EVENTFUL_PEER names no checkout of the official code")
def test_the_official_code(tmp_path: Path) -> None:
    options = ("repetitions=2", "warm_up=1", "device=cpu", f"output={tmp_path}", f"peer={PEER}")
    run("tools/benchmark.py", f"cases=[{BACKBONE}]", *options)
    (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert any("official code and ours differ by" in note for note in case["notes"])
    paper, peer = (find(case, method, "backbone") for method in ("paper", "peer"))
    assert peer["gmacs"] == paper["gmacs"] and peer["state_bytes"] > 0
    assert find(case, "peer_dense", "backbone")["attention_kernels"] == {}
