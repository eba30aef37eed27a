"""tools/eval_net.py end to end on a data set made on the spot, and its error lines."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from running import ROOT, make_tree, run

from eventful_det.data.coco_video import load_coco_video
from eventful_det.data.video_writer import VideoWriter
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import evaluate
from eventful_det.models.checkpoints import save_detector
from eventful_det.models.detector import Detector


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two validation videos of four frames."""
    sizes = ["--width", "128", "--height", "96", "--val-videos", "2", "--val-frames", "4"]
    return make_tree(tmp_path_factory.mktemp("vid") / "tree", *sizes, "--train-videos", "1", "--train-frames", "1")


@pytest.fixture
def options(tree: Path, tiny_detector: Detector, tmp_path: Path) -> list[str]:
    """Weights that know the classes of the data set, and where to write."""
    names = tuple(entry["name"] for entry in annotations(tree)["categories"])
    config = tiny_detector.config.from_dict({**json.loads(tiny_detector.config.to_json()), "classes": names})
    save_detector(Detector(config), tmp_path / "tiny.safetensors")
    return [f"data.root={tree}", f"weights={tmp_path / 'tiny.safetensors'}", f"output={tmp_path / 'run'}", "device=cpu"]


def annotations(tree: Path) -> dict[str, Any]:
    return json.loads((tree / "annotations/imagenet_vid_val.json").read_text())


def test_single(tree: Path, options: list[str], tmp_path: Path) -> None:
    done = run("tools/eval_net.py", *options, "gate/policy=fraction", "gate.policy.fraction=0.5")
    assert "AP50" in done.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    (row,) = results["rows"]
    assert (row["frames"], row["videos"]) == (8, 2) and row["flushes"] >= 2
    assert row["gmacs_total"] == results["efficiency"]["gmacs"]["total"] < results["efficiency"]["gmacs_dense"]["total"]
    assert set(results["ap50_by_class"]) == {entry["name"] for entry in annotations(tree)["categories"]}
    assert [video["frames"] for video in results["videos"]] == [4, 4]
    written = json.loads((tmp_path / "run/coco_results.json").read_text())
    scores = evaluate(load_coco_video(tree / "annotations/imagenet_vid_val.json"), written)
    assert scores.ap50 == row["ap50"], "the file is what was scored"


@pytest.mark.slow
def test_two_processes_agree_with_one(options: list[str], tmp_path: Path) -> None:
    run("tools/eval_net.py", *options, "max_frames=2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(*launcher, "tools/eval_net.py", *options, "max_frames=2", f"output={tmp_path / 'two'}")
    one, both = (json.loads((tmp_path / name / "coco_results.json").read_text()) for name in ("run", "two"))
    assert one == both
    assert len(list((tmp_path / "two/videos").rglob("*.json"))) == 2


def test_sweep(options: list[str], tmp_path: Path) -> None:
    fewer = ["eval.fractions=[0.5,0.125]", "eval.thresholds=[3]", "eval.curves.held_boxes.vary.hold=[2]"]
    extra = ["~eval.curves.paper", "+eval.curves.patient={gate:{rule:rows,renew_every:2},vary:{hold:[2]}}"]
    run("tools/eval_net.py", "eval=sweep", *options, *fewer, *extra, "max_videos=1", "max_frames=3")
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    names = [row["method"] for row in rows]
    assert names[:5] == ["dense", "rows 0.5", "rows 0.125", "rows threshold 3", "rows focus 0.4"]
    assert names[5:] == ["random 0.5", "random 0.125", "held boxes 2", "resolution 0.75", "resolution 0.5", "patient 2"]
    cost = {row["method"]: row["gmacs_backbone"] for row in rows}
    assert cost["rows 0.125"] < cost["rows 0.5"] < cost["dense"] and cost["held boxes 2"] < cost["dense"]
    assert all(row["frames"] == 3 and row["relative_total"] for row in rows)
    assert json.loads((tmp_path / "run/sweep.json").read_text()) == rows
    with (tmp_path / "run/sweep.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == names
    assert len((tmp_path / "run/sweep.md").read_text().splitlines()) == 2 + len(rows)
    assert cv2.imread(str(tmp_path / "run/sweep.png")) is not None


def test_unlabelled_clips_are_judged_by_agreement_with_dense(options: list[str], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 25.0) as writer:
        for i in range(4):
            writer.write(np.full((96, 128, 3), 40 * i, np.uint8))
    make = [
        sys.executable,
        "datasets/prepare_clips.py",
        str(tmp_path / "clip.mp4"),
        "--output",
        str(tmp_path / "clips"),
    ]
    assert "1 videos, 4 frames" in subprocess.run(make, check=True, capture_output=True, text=True).stdout
    left_out = ("rows_threshold", "rows_focus", "paper", "random", "held_boxes", "resolution")
    curves = [f"~eval.curves.{name}" for name in left_out]
    where = ["data=clips", f"data.root={tmp_path / 'clips'}", "common_classes=true", "max_frames=3"]
    (tmp_path / "labels.json").write_text('{"disc": "car", "square": "dog"}')
    run("tools/eval_net.py", *options[1:], *where, *curves, "eval=sweep", f"labels={tmp_path / 'labels.json'}")
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [0] * 5 and all(row["ap50"] is None for row in rows)
    assert "| - | - |" in (tmp_path / "run/sweep.md").read_text()


def test_errors_are_one_line(options: list[str], tree: Path, tmp_path: Path) -> None:
    done = run("tools/eval_net.py", *options, "weights=nowhere.safetensors", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: no weights 'nowhere.safetensors'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.val=nowhere.json"], "cannot read the data set nowhere.json"),
        (["data.val={tmp}/renamed.json"], "known to the data set only: zebra; known to the weights only"),
        (["data.val={tmp}/unlabelled.json"], "no labelled frame"),
        (["data.val={tmp}/no_images.json"], "cannot read the image"),
        (["eval=sweep", "+eval.curves.a={vary:{fraction:[1]}}"], "the curve has no gate"),
        (["eval=sweep", "+eval.curves.a={very:{hold:[1]}}"], "expected gate and vary"),
        (["max_frames=0"], "the number of frames must be at least 1"),
    ],
)
def test_errors(
    change: list[str], message: str, options: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import eval_net

    data = annotations(tree)
    broken = {
        "renamed": data | {"categories": [{"id": 1, "name": "zebra"}, *data["categories"][1:]]},
        "unlabelled": data | {"images": [image | {"labelled": False} for image in data["images"]]},
        "no_images": data | {"info": {"image_root": "nowhere"}},
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data | {"info": {"image_root": str(tree)}} | content))
    overrides = [*options, *(text.replace("{tmp}", str(tmp_path)) for text in change)]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("eval_net", overrides)
    with pytest.raises(UserError, match=message):
        eval_net.run(config)
