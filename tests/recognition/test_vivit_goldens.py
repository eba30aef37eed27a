"""The recogniser against recordings of the official code, made by a second writing of its semantics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recording import make_recording, record_run, record_windows

from eventful_det.testing.check_goldens import main

SHARED = Path(__file__).parents[2] / ".." / "shared" / "goldens"


def check(tmp_path: Path, data: dict[str, Any]) -> int:
    torch.save(data, tmp_path / "recording.pt")
    return main([str(tmp_path / "recording.pt")])


@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_of_run_agrees(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_recording(seed)
    data["runs"] = [
        record_run(data, spatial_class="Block", policy=None),
        record_run(data, clips=[0, 1]),
        record_run(data, clips=[0, 1], batch_views=False),
        record_run(data, clips=[2], spatial_class="EventfulTokenwiseBlock"),
        record_run(data, clips=[1], spatial_class="EventfulMatmul1Block", policy={"name": "fraction", "value": 0.6}),
        record_run(data, spatial_views=1, temporal_views=3, options={"gate_before_ln": True}),
        record_run(data, spatial_class="EventfulTokenwiseBlock", options={"stgt": True}),
        record_run(data, spatial_views=1, temporal_views=1, policy={"name": "threshold", "value": 1.2}),
        record_run(data, spatial_views=1, temporal_views=1, policy={"name": "threshold", "value": 100.0}),
    ]
    data["temporal_runs"] = [
        record_windows(data, "Block", None),
        record_windows(data, "EventfulBlock", {"name": "topk", "value": 2}),
        record_windows(data, "EventfulTokenwiseBlock", {"name": "threshold", "value": 1.0}),
    ]
    assert check(tmp_path, data) == 0, capsys.readouterr().out
    assert "15 of 15 parts agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {
            "tubelet_shape": [1, 4, 4],
            "temporal": {"depth": 2, "heads": 4, "mlp_ratio": 1, "position_encoding_size": [9]},
        },
        {"tubelet_shape": [3, 2, 4], "normalize_mean": 0.45, "normalize_std": 0.225},
        {"spatial": {"depth": 1, "heads": 1, "mlp_ratio": 4, "position_encoding_size": [2, 3]}, "temporal_stride": 1},
    ],
)
def test_other_sizes_agree(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = make_recording(3, **changes)
    data["runs"] = [record_run(data), record_run(data, spatial_class="Block", policy=None)]
    assert check(tmp_path, data) == 0


@pytest.mark.parametrize("part", ["spatial", "tokens", "temporal", "logits", "output", "counts", "indices", "means"])
def test_a_difference_is_noticed(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_recording(0)
    run = record_run(data, spatial_class="EventfulTokenwiseBlock")
    data["runs"] = [run]
    if part == "counts":
        run["counts"][0][1]["bias_flops"] += 1
    elif part == "indices":
        chosen = run["indices"]["blocks.0.mlp_gate"][0][0]
        chosen[0, 0] = next(i for i in range(7) if i not in chosen[0])
    elif part == "means":
        data["preprocessing"][0]["means"] += 1e-3
    else:
        run[part] = run[part] * 1.001
    assert check(tmp_path, data) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data["runs"][0].pop("counts"), "run 1 is malformed"),
        (lambda data: data["runs"][0].update(spatial_class="Strange"), "unknown block class"),
        (lambda data: data["state_dict"].pop("classifier.bias"), "model is malformed"),
        (lambda data: data.update(format="eventful-vivit-golden/9"), "not of the format"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_recording(0)
    data["runs"] = [record_run(data)]
    damage(data)
    assert check(tmp_path, data) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "vivit_dev.pt").is_file(), reason="needs a recording of the official code")
def test_recording_of_the_official_code() -> None:
    assert main([str(SHARED / "vivit_dev.pt")]) == 0
