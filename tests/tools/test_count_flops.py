"""The counting tool reproduces the official figures, takes wishes, and says what is wrong with others in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from count_flops import collect
from running import options_of, run

from eventful_det.errors import UserError

Rows = list[dict[str, Any]]


def ask(*overrides: str) -> Rows:
    return collect(options_of("count_flops", *overrides))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The default table, as a user gets it."""
    output = tmp_path_factory.mktemp("default")
    done = run("tools/count_flops.py", f"output={output}")
    assert "467.44" in done.stdout and "results.json" in done.stdout
    rows: Rows = json.loads((output / "results.json").read_text())["rows"]
    return rows


def find(rows: Rows, **wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


OFFICIAL = [
    *((1024, None, k, gmacs) for k, gmacs in [(256, 51.74), (512, 86.39), (1024, 155.69), (2048, 294.29)]),
    *((672, None, k, gmacs) for k, gmacs in [(128, 19.28), (256, 32.93), (512, 60.25), (1024, 114.88)]),
    *((1024, ablation, 512, gmacs) for ablation, gmacs in [("tokenwise", 162.85), ("qk", 124.20)]),
]


def test_official_figures(rows: Rows) -> None:
    b = {"model": "vitdet_b_vid"}
    for side, gmacs in [(1024, 467.44), (672, 174.50)]:
        row = find(rows, **b, rule="dense", height=side, width=side, pool=None)
        assert row["k"] is None and round(row["official_gmacs"], 2) == gmacs
    for side, ablation, k, gmacs in OFFICIAL:
        row = find(rows, **b, rule="paper", height=side, width=side, ablation=ablation or "full", k=k, pool=None)
        assert round(row["official_gmacs"], 2) == gmacs
    pooled = {**b, "height": 1024, "width": 1024, "pool": 2}
    assert round(find(rows, **pooled, rule="dense")["official_gmacs"], 2) == 388.12
    row = find(rows, **pooled, rule="paper", k=512)
    assert row["official_gmacs"] == pytest.approx(66.8, abs=0.3)
    assert "193 cells (128 if compact, 424 if scattered" in row["assumed"]


def test_parts_add_up_and_sizes_are_those_of_the_plan(rows: Rows) -> None:
    for row in rows:
        assert row["total"] == pytest.approx(sum(row[part] for part in ("backbone", "pyramid", "rpn", "roi")))
        assert row["ablation"] == ("full" if row["rule"] == "paper" else None) or row["ablation"] in ("tokenwise", "qk")
    row = find(rows, model="vitdet_b_vid", height=576, width=1024, rule="dense")
    assert [round(row[part], 1) for part in ("backbone", "pyramid", "rpn", "roi")] == [238.0, 40.3, 58.1, 38.6]
    assert {(row["model"], row["rule"]) for row in rows if row["width"] != row["height"]} == {
        (model, rule) for model in ("vitdet_b_vid", "vitdet_tiny") for rule in ("dense", "paper", "rows")
    }


def test_a_wish() -> None:
    rows = ask("model=vitdet_tiny", "size=[320,512]", "rule=rows", "k=[80,160]")
    assert [(row["rule"], row["k"], row["tokens"]) for row in rows] == [("rows", 80, 640), ("rows", 160, 640)]
    assert [row["k"] for row in ask("size=[[320,512],[256,256]]", "rule=rows", "fraction=0.25")] == [160, 64]
    wide = ask("+model.window=0", "+model.global_blocks=[]", "rule=[dense,rows]", "k=60")
    assert [(row["model"], row["width"], row["tokens"]) for row in wide] == [("vitdet_tiny", 455, 480)] * 2


def test_rf_detr_by_part(tmp_path: Path) -> None:
    """What others count leaves out the products of attention: 14.5 GMACs, of which 12.5, 0.8 and 1.1."""
    pytest.importorskip("transformers")
    done = run("tools/count_flops.py", "model=rf-detr-nano", "fraction=0.25", f"output={tmp_path}")
    assert "14.46" in done.stdout and "| linear |" in (tmp_path / "count_flops.md").read_text()
    dense, rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    linear = {part: dense[part] - products for part, products in dense["attention"].items()}
    assert linear == pytest.approx({"backbone": 12.5, "projector": 0.83, "decoder": 1.15}, rel=0.01)
    assert dense["total"] == pytest.approx(15.91, abs=0.01) and rows["total"] < 0.4 * dense["total"]
    with pytest.raises(UserError, match="rule=paper does not know its windows"):
        ask("model=rf-detr-nano", "rule=paper")


def test_assumptions() -> None:
    rows = ["model=vitdet_b_vid", "size=[1024,1024]", "rule=rows", "k=512"]
    even, measured, bound = (ask(*rows, f"assume.padding={n}")[0]["backbone"] for n in ("1", "2.4", "null"))
    assert even < measured < bound
    paper = ["model=vitdet_b_vid", "size=[1024,1024]", "rule=paper", "k=512", "pool=2"]
    counts = [ask(*paper, f"assume.scatter={n}")[0]["official_gmacs"] for n in (0, 1)]
    assert [round(count, 1) for count in counts] == [64.4, 75.6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["k=641", "size=[320,512]"], "1 to 640 tokens"),
        (["k=many"], "whole number"),
        (["fraction=25"], "fraction must be a number above 0 and up to 1"),
        (["size=320"], "size must be a list of 2"),
        (["rule=fast"], "rule must be 'dense' or 'paper' or 'rows' or a list"),
        (["rule=rows", "pool=2"], "does not pool keys"),
        (["rule=paper", "pool=7"], "does not divide a grid of 16 x 30 tokens"),
        (["rule=paper", "ablation=all"], "ablation must be '"),
        (["assume.scatter=2"], "scatter"),
        (["assume.padding=0.5"], "padding"),
        (["+model.sides=7"], "model: unknown option 'sides'"),
    ],
)
def test_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ask(*overrides)


def test_an_error_takes_one_line(tmp_path: Path) -> None:
    done = run("tools/count_flops.py", f"output={tmp_path}", "+model.dim=190", check=False)
    assert (done.returncode, done.stderr) == (2, "error: model: dim (190) must be a multiple of heads (3)\n")
    assert not (tmp_path / "results.json").exists()
