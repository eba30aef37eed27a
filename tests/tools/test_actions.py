"""The tools on recognisers: clips are made, a recogniser is trained on them, evaluated, converted, run and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import actions
import convert_weights
import count_flops
import cv2
import demo
import demo_run
import eval_net
import numpy as np
import pytest
import torch
import train_net
from common import Data
from eval_actions import groups_of
from running import ROOT, options_of, run

from eventful_det.engine.folder import Manifest, Model, write_manifest
from eventful_det.errors import UserError
from eventful_det.recognition.accuracy import Scored, accuracy
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.recognition.data.segments import Segment, Segments
from eventful_det.recognition.recogniser import Recogniser

SIZES = ["dim=24", "heads=2", "mlp=32", "temporal_heads=2", "temporal_mlp=32", "depth=1", "temporal_depth=1"]
SIZES += ["size=[32,32]", "position_grid=[2,2]", "frames=8", "stride=1"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips, 13 to train on and 13 to look at: of the first class with both cameras."""
    root = tmp_path_factory.mktemp("actions")
    size = ["--width", "32", "--height", "32", "--frames", "8", "--train-clips", "13", "--val-clips", "13"]
    run(str(ROOT / "datasets/make_synthetic_actions.py"), "--output", str(root), *size)
    return root


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a short training."""
    output = tmp_path_factory.mktemp("run")
    options = [f"data.root={clips}", f"data.train={clips / 'train'}", f"output={output}", "train.steps=2"]
    options += ["device=cpu", "train.batch=2", "train.workers=0", *(f"model.{size}" for size in SIZES)]
    train_net.run(options_of("train_net", "experiment=actions", *options))
    return results_in(output)


def results_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_training_ends_with_weights_and_their_accuracy(trained: dict[str, Any]) -> None:
    recogniser = load_recogniser(trained["weights"])
    assert trained["steps"] == 2 and recogniser.config.dim == 24
    (row,) = trained["validation"]
    assert 0 <= row["action top-1"] <= row["action top-5"] <= 100 and row["share of dense"] == 1


@pytest.mark.parametrize("source", ["rendered", "folders"])
def test_second_stage_changes_the_temporal_model_alone(
    source: str, clips: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    options = [f"start={trained['weights']}", f"data.root={clips}", f"data.train={clips / 'train'}", "evaluate=false"]
    options += ["recognition.stage=temporal", f"output={tmp_path / 'run'}", "train.steps=2", "device=cpu"]
    if source == "rendered":
        options += ["data.train=synthetic", "recognition.clips=3"]
    train_net.run(options_of("train_net", "data=actions", *options, "train.workers=0"))
    assert len(list((tmp_path / "run" / "features").iterdir())) == (3 if source == "rendered" else 13)
    before, after = (load_recogniser(w).state_dict() for w in (trained["weights"], tmp_path / "run/model.safetensors"))
    changed = {name.split(".")[0] for name, value in after.items() if not value.equal(before[name])}
    assert changed == {"temporal_model", "classifier"}


def test_sweep_of_shared_and_separate_views(clips: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    options = ["eval=sweep", "views=both", "temporal_views=2", "max_videos=3", f"weights={trained['weights']}"]
    eval_net.run(options_of("eval_net", "data=actions", f"data.root={clips}", f"output={tmp_path}", *options))
    rows = {(row["way"], row["views"]): row for row in results_in(tmp_path)["rows"]}
    dense = rows["dense", "shared"]["GMACs"]
    assert dense < rows["dense", "separate"]["GMACs"]
    assert all(rows[way, "shared"]["GMACs"] < dense for way in ("rows 1/4", "held 1/4"))
    assert (tmp_path / "accuracy.csv").is_file() and "| rows 1/4 |" in (tmp_path / "accuracy.md").read_text()


def test_cameras_are_told_apart(clips: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    options = [f"data.root={clips}", f"output={tmp_path}", f"weights={trained['weights']}"]
    eval_net.run(options_of("eval_net", "data=actions", *options))
    (row,) = results_in(tmp_path)["rows"]
    assert {"action top-1, still", "action top-1, pan"} <= row.keys()


def test_unseen_participants_and_rare_classes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "unseen.csv").write_text("participant_id\nP02\n")
    (tmp_path / "tail.csv").write_text("noun\n1\n")
    labels = {"a": ("P01", 0), "b": ("P02", 1), "c": ("P02", 0)}
    items = [Segment(name, Path(), labels={"noun": noun}, participant=of) for name, (of, noun) in labels.items()]
    data = Data(root="", val="", unseen=str(tmp_path / "unseen.csv"), tail_nouns=str(tmp_path / "tail.csv"))
    scored = [Scored(item, {"noun": torch.tensor([float(item.name == "a"), 0.5])}) for item in items]  # "c" is wrong
    groups = groups_of(data, Segments(tuple(items), {}))
    found = {name: accuracy(scored, among)["noun"] for name, among in groups.items()}
    assert {name: of.count for name, of in found.items()} == {"P01": 1, "P02": 2, "unseen": 2, "tail": 1}
    assert {name: of.top1 for name, of in found.items()} == {"P01": 100, "P02": 50, "unseen": 50, "tail": 100}


def test_demo_of_actions(clips: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    source = next(clips.rglob("*.mp4"))
    options = [f"source={source}", f"weights={trained['weights']}", "budget=0.5", f"output={tmp_path}", "device=cpu"]
    demo.run(options_of("demo", *options))
    lines = [json.loads(line) for line in (tmp_path / "actions.jsonl").read_text().splitlines()]
    assert [line["frame_index"] for line in lines] == [1, 3, 5, 7]
    assert all(len(line["classes"]["action"]) == 5 for line in lines)
    assert results_in(tmp_path)["frames"] == 4 and (tmp_path / "annotated.mp4").stat().st_size > 0


def test_demo_takes_a_precision() -> None:
    recogniser = demo_run.build(options_of("demo", "task=recognition", "precision=bfloat16", "device=cpu"), [])
    assert isinstance(recogniser, Recogniser) and recogniser.spec.dtype == torch.bfloat16


def test_demo_says_that_a_video_is_too_short_for_a_step(trained: dict[str, Any], tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    cv2.imwrite(str(picture), np.zeros((32, 32, 3), np.uint8))
    options = [f"source={picture}", f"weights={trained['weights']}", f"output={tmp_path / 'out'}", "device=cpu"]
    with pytest.raises(UserError, match="too short"):
        demo.run(options_of("demo", *options))


def test_options_for_detectors_are_refused(tmp_path: Path) -> None:
    for more, message in (
        (["rescore=true", "max_frames=4"], "rescore, max_frames: for detectors"),
        (["streams=2"], "streams: for detectors"),
        (["eval=main"], "eval=sweep as it is"),
        (["eval=sweep", "eval.caps=[0.1]"], "eval=sweep as it is"),
        (["eval.scale=0.5"], "the option hold alone"),
    ):
        with pytest.raises(UserError, match=message):
            eval_net.run(options_of("eval_net", "data=actions", f"output={tmp_path}", *more))


def test_the_folder_of_an_engine_is_known_as_a_recogniser(tmp_path: Path) -> None:
    for model in get_args(Model):
        write_manifest(tmp_path, Manifest("openvino", model, (32, 32), (), "float32", {}))
        assert actions.recognises(None, str(tmp_path)) == (model == "recogniser")


@pytest.mark.parametrize("names", ["official", "tadaconv"])
def test_conversion_there_and_back(names: str, trained: dict[str, Any], tmp_path: Path) -> None:
    for source, output in ((trained["weights"], tmp_path / "a.pth"), (tmp_path / "a.pth", tmp_path / "b.safetensors")):
        options = [f"input={source}", f"output={output}", f"names={names}", f"results={tmp_path}"]
        convert_weights.run(options_of("convert_weights", *options, *(["dtype=float32"] * (output.suffix != ".pth"))))
    first, last = (load_recogniser(path).state_dict() for path in (trained["weights"], tmp_path / "b.safetensors"))
    assert first.keys() == last.keys() and all(value.equal(last[name]) for name, value in first.items())
    assert results_in(tmp_path)["format"] == names


def test_counts_are_those_of_the_paper(tmp_path: Path) -> None:
    count_flops.run(options_of("count_flops", "task=recognition", f"output={tmp_path}"))
    clips = {(row["model"], row["k"]): row["clip"] for row in results_in(tmp_path)["rows"]}
    assert clips["vivit_b_epic", None] == pytest.approx(7122.02, abs=0.01)
    assert clips["vivit_b_epic", 50] == pytest.approx(1358.40, abs=0.01)
    table = tmp_path / "table.csv"  # of clips of 2 and 4 seconds at 30 frames/s
    table.write_text("start_timestamp,stop_timestamp\n00:00:01,00:00:03\n00:01:00.5,00:01:04.5\n")
    options = ["model=vivit_b_epic", "k=50", f"durations={table}", f"output={tmp_path}"]
    count_flops.run(options_of("count_flops", *options))
    dense, gated = results_in(tmp_path)["rows"]
    assert (dense["clips"], dense["clip"], gated["clip"]) == (2, clips["vivit_b_epic", None], clips["vivit_b_epic", 50])
    assert dense["shared views"] < dense["clip"] and gated["shared views"] < gated["clip"]
    with pytest.raises(UserError, match="whole number of 1 to 401"):
        count_flops.run(options_of("count_flops", "model=vivit_b_epic", "k=500", f"output={tmp_path}"))
