"""tools/eval_net.py end to end on a data set made on the spot, and its error lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import eval_net
import numpy as np
import pytest
from omegaconf import OmegaConf
from running import ROOT, make_tree, options_of, run

from eventful_det.data.coco_video import load_coco_video
from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import evaluate

OTHERS = set(OmegaConf.load(ROOT / "configs/eval/sweep.yaml").curves) - {"dense", "moved_boxes"}
CURVES = [
    *(f"~eval.curves.{name}" for name in sorted(OTHERS)),
    "eval.curves.moved_boxes.vary.hold=[2]",
]  # dense and held


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


@pytest.fixture
def evaluate_with(options: list[str]) -> Callable[..., None]:
    """Evaluate in this process, with further options."""

    def evaluate_with(*more: str) -> None:
        eval_net.run(options_of("eval_net", *options, *more))

    return evaluate_with


def results_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())


def test_rescored_scores_are_scored_without_running_anything_again(
    evaluate_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_with("gate=dense")
    plain = json.loads((tmp_path / "run/coco_results.json").read_text())
    monkeypatch.setattr(Detector, "step", None)
    evaluate_with("gate=dense", "rescore=true")
    steady = json.loads((tmp_path / "run/coco_results.json").read_text())
    assert results_of(tmp_path / "run")["rescore"] is True
    assert [entry["bbox"] for entry in steady] == [entry["bbox"] for entry in plain]
    assert [entry["score"] for entry in steady] != [entry["score"] for entry in plain]


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
def test_two_processes_agree_with_one(options: list[str], evaluate_with: Callable[..., None], tmp_path: Path) -> None:
    evaluate_with("max_frames=2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(*launcher, "tools/eval_net.py", *options, "max_frames=2", f"output={tmp_path / 'two'}")
    one, both = (json.loads((tmp_path / name / "coco_results.json").read_text()) for name in ("run", "two"))
    assert one == both
    assert len(list((tmp_path / "two/videos").rglob("*.json"))) == 2


def test_sweep(evaluate_with: Callable[..., None], tmp_path: Path) -> None:
    fewer = ["eval.fractions=[0.5,0.125]", "eval.thresholds=[3]", "eval.curves.moved_boxes.vary.hold=[2]"]
    extra = ["~eval.curves.paper", "+eval.curves.patient={move:kalman,gate:{rule:rows,renew_every:2},vary:{hold:[2]}}"]
    evaluate_with("eval=sweep", *fewer, *extra, "max_videos=1", "max_frames=3")
    rows = results_of(tmp_path / "run")["rows"]
    names = [row["method"] for row in rows]
    focus = ["rows focus 0.35", "rows focus 0.25"]
    assert names[:6] == ["dense", "rows 0.5", "rows 0.125", "rows threshold 3", *focus]
    others = ["random 0.5", "random 0.125", "moved boxes 2", "resolution 0.75", "resolution 0.5"]
    assert names[6:] == [*others, "dense square", "patient 2"]
    cost = {row["method"]: row["gmacs_backbone"] for row in rows}
    assert cost["dense"] < cost["dense square"], "padding is not free"
    assert cost["rows 0.125"] < cost["rows 0.5"] < cost["dense"] and cost["moved boxes 2"] < cost["dense"]
    assert all(row["frames"] == 3 and row["relative_total"] for row in rows)
    assert json.loads((tmp_path / "run/sweep.json").read_text()) == rows
    with (tmp_path / "run/sweep.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == names
    assert len((tmp_path / "run/sweep.md").read_text().splitlines()) == 2 + len(rows)
    assert cv2.imread(str(tmp_path / "run/sweep.png")) is not None
    assert (tmp_path / "run/sweep.pdf").read_bytes().startswith(b"%PDF")


def test_unlabelled_clips_are_judged_by_agreement_with_dense(
    evaluate_with: Callable[..., None], tmp_path: Path
) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 25.0) as writer:
        for i in range(4):
            writer.write(np.full((96, 128, 3), 40 * i, np.uint8))
    made = run("datasets/prepare_clips.py", str(tmp_path / "clip.mp4"), "--output", str(tmp_path / "clips"))
    assert "1 videos, 4 frames" in made.stdout
    unused = ("dense_square", "rows_threshold", "rows_focus", "paper", "random", "moved_boxes", "resolution")
    curves = [f"~eval.curves.{name}" for name in unused]
    where = ["data=clips", f"data.root={tmp_path / 'clips'}", "common_classes=true", "max_frames=3"]
    (tmp_path / "labels.json").write_text('{"disc": "car", "square": "dog"}')
    evaluate_with(*where, *curves, "experiment=sweep_clips", f"labels={tmp_path / 'labels.json'}")
    rows = results_of(tmp_path / "run")["rows"]
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
        (["eval=sweep", "+eval.curves.a={very:{hold:[1]}}"], "eval.curves.a: unknown option 'very'; did you mean vary"),
        (["max_frames=0"], "max_frames must be a whole number of at least 1"),
        (["streams=0"], "streams must be a whole number of at least 1"),
        (["eval=sweep", "eval.only=nothing"], "there is no curve nothing; there are dense, rows"),
        (["data.val={tmp}/no_videos.json"], r"no_videos\.json holds no video with frames"),
        (["data.val={tmp}/no_videos.json", "eval=sweep"], r"no_videos\.json holds no video with frames"),
        (["data.val={tmp}/cut.json"], r"cut\.json is not valid JSON"),
        (["data.val={tmp}/empty.json"], r"empty\.json is not valid JSON"),
        (
            ["data.val={tmp}/foreign.json"],
            r"foreign\.json: annotations\[\d+\] \(id \d+\) has category_id 31; expected the id of a listed category",
        ),
        (["data.val={tmp}/youtube.json"], r"youtube\.json: images is missing"),
        (["temporal_views=2"], "temporal_views: for recognisers"),
        (["eval.fps=[10]", "eval.only=dense"], "eval.only, eval.fps: for curves"),
        (["eval=sweep", "eval.hold=4", "gate=paper"], "eval.hold, gate: each curve has its own"),
        (["eval=latency", "streams=2", "eval.only=dense"], "eval.only, streams: not for latencies"),
        (["eval=sweep", "eval.small_cnn=none.onnx"], "none.onnx"),
    ],
)
def test_errors(
    change: list[str], message: str, evaluate_with: Callable[..., None], tree: Path, tmp_path: Path
) -> None:
    data = annotations(tree)
    broken: dict[str, Any] = {
        "renamed": {"categories": [{"id": 1, "name": "zebra"}, *data["categories"][1:]]},
        "unlabelled": {"images": [image | {"labelled": False} for image in data["images"]]},
        "no_images": {"info": {"image_root": "nowhere"}},
        "no_videos": {"videos": [], "images": [], "annotations": []},
        "foreign": {"annotations": [data["annotations"][0] | {"category_id": 31}]},
        "youtube": {"images": None},
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data | {"info": {"image_root": str(tree)}} | content))
    (tmp_path / "cut.json").write_text(json.dumps(data)[:1000])
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match=message):
        evaluate_with(*(text.replace("{tmp}", str(tmp_path)) for text in change))
    assert not (tmp_path / "run/results.json").exists()


def test_streams_change_no_result(evaluate_with: Callable[..., None], tmp_path: Path) -> None:
    evaluate_with()
    evaluate_with("streams=2", "workers=2", f"output={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / name / "coco_results.json").read_text()) for name in ("run", "two"))
    assert one and one == two
    rows = [results_of(tmp_path / name)["rows"][0] for name in ("run", "two")]
    timed = ("ms_", "fps", "peak_", "relative_time")
    assert [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows[:1]] == [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in rows[1:]
    ]


def test_policies(evaluate_with: Callable[..., None], tmp_path: Path) -> None:
    """The sweep of docs/policies.md."""
    evaluate_with(
        "eval=policies", "eval.caps=[0.4]", "eval.curves.moved_boxes.vary.hold=[2,4]", "max_videos=1", "max_frames=4"
    )
    gmacs = {row["method"]: row["gmacs_total"] for row in results_of(tmp_path / "run")["rows"]}
    focus = ["focus 0.5", "focus 0.35", "focus 0.25", "focus held 2", "focus held 3"]
    frugal = ["frugal 2", "frugal 1", "frugal 0", "frugal held 2"]
    others = ["threshold 0.4", "threshold saliency 0.4", "paper 0.4", "random 0.4", "moved boxes 2", "moved boxes 4"]
    assert list(gmacs) == ["dense", *focus, *frugal, *others]
    assert gmacs["focus held 2"] < min(gmacs["focus 0.35"], gmacs["moved boxes 2"]), "both save"
    assert max(gmacs["focus 0.35"], gmacs["moved boxes 2"]) < gmacs["dense"]


def test_jobs_of_a_cluster_share_out_a_sweep(evaluate_with: Callable[..., None], tmp_path: Path) -> None:
    small = ["eval=sweep", "max_frames=2", *CURVES]
    evaluate_with(*small, "eval.only=moved_boxes")
    assert len(list((tmp_path / "run/videos").rglob("*.json"))) == 2 and not (tmp_path / "run/results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/videos").rglob("*.json")}
    evaluate_with(*small)
    assert [row["method"] for row in results_of(tmp_path / "run")["rows"]] == ["dense", "moved boxes 2"]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "nothing was run twice"


def test_what_was_skipped_stands_beside_the_result(
    evaluate_with: Callable[..., None], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations(tree)
    whole = (tree / data["images"][1]["file_name"]).read_bytes()
    (tmp_path / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    data["images"][1]["file_name"] = str(tmp_path / "cut.JPEG")
    data["images"][2]["file_name"] = "gone.JPEG"
    data["info"]["image_root"] = str(tree)
    (tmp_path / "some.json").write_text(json.dumps(data))
    evaluate_with(f"data.val={tmp_path / 'some.json'}", "eval=sweep", *CURVES)
    results = results_of(tmp_path / "run")
    assert [(row["frames"], row["images"], row["skipped"]) for row in results["rows"]] == [(6, 6, 2)] * 2
    assert results["skipped"]["frames"] == 2 and "cut.JPEG: it is cut short" in results["skipped"]["reasons"][0]
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 frames could not be read; they are in no number. The first: cannot read the image" in printed
    assert "2 frames could not be read" in (tmp_path / "run/sweep.md").read_text()


def test_warnings(
    evaluate_with: Callable[..., None], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations(tree) | {"info": {"image_root": str(tree)}, "annotations": []}
    stills = {key: data[key] for key in ("info", "categories", "images", "annotations")}
    for name, content in (("stills", stills), ("no_boxes", data)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        evaluate_with(f"data.val={tmp_path / f'{name}.json'}", "gate=dense", "max_frames=1", "max_videos=2")
        printed = " ".join(capsys.readouterr().out.split())
        assert "every video of" in printed and "import_annotations.py" in printed and "has not one box" in printed
        assert results_of(tmp_path / "run")["rows"][0]["ap50"] is None


def test_a_folder_of_weights_has_the_hash_of_its_files(tmp_path: Path) -> None:
    """An engine, for example: results of another one are not those of this."""
    (tmp_path / "engine.json").write_text("{}")
    before = eval_net.weights_hash(str(tmp_path))
    (tmp_path / "graph.xml").write_text("<net/>")
    assert eval_net.weights_hash(str(tmp_path)) != before
