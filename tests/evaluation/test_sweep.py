"""Sweeps: costs and precisions of methods whose result is known."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.evaluation.sweep import first, report, run_methods
from eventful_det.evaluation.sweep.runs import Method, MethodRun
from eventful_det.evaluation.sweep.store import ResultStore
from eventful_det.evaluation.sweep.summary import Row, evaluate_detector, row_of, rows_of
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import RandomOrder, Selector, TopFraction
from eventful_det.outputs import as_json


def run_method(detector: Detector, data: CocoVideo, method: Method, store: ResultStore | None = None) -> MethodRun:
    return run_methods(detector, data, [method], store=store)[0]


TOKENS, PATCH = 8 * 8, 3 * 16 * 16  # of a frame of 128 x 128 pixels: whole windows of 4 x 4 tokens


@pytest.fixture
def detector(tiny_detector: Detector) -> Detector:
    tiny_detector.config = dataclasses.replace(tiny_detector.config, short_side=128)
    return tiny_detector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoVideo:
    """Two videos of four frames: a bright square moves over noise."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    videos = []
    for v in range(2):
        background = rng.integers(0, 120, (128, 128, 3), dtype=np.uint8)
        frames = []
        for i in range(4):
            x = 10 + 12 * i + 20 * v
            image = background.copy()
            image[30:60, x : x + 30] = 255
            name = f"{v}_{i}.png"
            cv2.imwrite(str(root / name), image)
            square = Annotation(2, (float(x), 30.0, x + 30.0, 60.0), track_id=0)
            frames.append(Frame(10 * v + i + 1, name, 128, 128, i, [square]))
        videos.append(Video(v + 1, f"video {v}", frames))
    return CocoVideo([(1, "circle"), (2, "square"), (3, "star")], videos, root)


def steady(row: Row) -> dict[str, object]:
    """What of a row must not depend on the machine."""
    return {
        key: value for key, value in vars(row).items() if not key.startswith(("ms_", "fps", "relative_time", "peak_"))
    }


def test_everything_selected_equals_dense(detector: Detector, data: CocoVideo) -> None:
    methods = [
        Method("dense"),
        Method("rows", 1.0, Rows(), TopFraction(1.0)),
        Method("paper", 1.0, Paper(), TopFraction(1.0)),
    ]
    dense, rows, paper = rows_of(run_methods(detector, data, methods, scene_cuts=False))
    assert dense.ap50 > 0, "the case is not trivial"
    for row in (rows, paper):
        assert (row.ap, row.ap50, row.ap75) == pytest.approx((dense.ap, dense.ap50, dense.ap75), abs=0.02)
        assert row.recomputed == 1 and row.flushes == 2 and row.state_bytes > 0
    gates = 0.75 * TOKENS * PATCH / 1e9  # on three frames of four; the first is a flush
    assert rows.gmacs_backbone == pytest.approx(dense.gmacs_backbone + gates, rel=1e-9)
    assert rows.gmacs_backbone_steady == pytest.approx(dense.gmacs_backbone + TOKENS * PATCH / 1e9, rel=1e-9)
    assert (dense.relative_backbone, dense.relative_total, dense.relative_time) == (1, 1, 1)
    assert (dense.videos, dense.frames, dense.images) == (2, 8, 8) and dense.state_bytes < rows.state_bytes


def test_a_budget_saves(detector: Detector, data: CocoVideo) -> None:
    methods = [Method("dense"), *(Method("rows", f, Rows(), TopFraction(f)) for f in (0.5, 0.25))]
    dense, half, quarter = rows_of(run_methods(detector, data, methods, scene_cuts=False))
    assert half.recomputed == pytest.approx((1 + 3 * 0.5) / 4) and quarter.recomputed == pytest.approx(
        (1 + 3 * 0.25) / 4
    )
    assert quarter.gmacs_backbone < half.gmacs_backbone < dense.gmacs_backbone
    assert half.gmacs_total == pytest.approx(half.gmacs_backbone + half.gmacs_heads)
    assert half.relative_backbone == pytest.approx(half.gmacs_backbone / dense.gmacs_backbone)
    assert half.ms_mean > 0 and half.ms_flush > 0 and half.relative_time > 0


def test_holding_every_second_frame_halves_the_cost(detector: Detector, data: CocoVideo) -> None:
    methods = [Method("dense"), Method("held", 2, hold=2)]
    runs = run_methods(detector, data, methods, scene_cuts=False)
    dense, held = rows_of(runs)
    assert held.gmacs_total == dense.gmacs_total / 2 and held.relative_total == 0.5
    assert dense.p95_to_median == 1 and held.p95_to_median == pytest.approx(2)
    boxes = {image: [r["bbox"] for r in runs[1].results if r["image_id"] == image] for image in range(1, 5)}
    assert boxes[1] != boxes[2] and boxes[2] != boxes[3], "boxes move between key frames"


def test_a_lower_resolution_costs_less_and_boxes_are_in_source_pixels(detector: Detector, data: CocoVideo) -> None:
    runs = run_methods(detector, data, [Method("dense"), Method("resolution", 1 / 3, scale=1 / 3)])
    dense, low = rows_of(runs)
    assert low.relative_backbone < 0.5 and low.relative_backbone == low.gmacs_backbone / dense.gmacs_backbone
    assert max(entry["bbox"][0] + entry["bbox"][2] for entry in runs[1].results) > 64


def test_runs_repeat(detector: Detector, data: CocoVideo) -> None:
    methods = [
        Method("dense"),
        Method("random", 0.5, Rows(), Selector(RandomOrder(), 0.5)),
        Method("paper", 0.5, Paper()),
    ]
    one, two = (rows_of(run_methods(detector, data, methods)) for _ in range(2))
    assert [str(steady(row)) for row in one] == [str(steady(row)) for row in two]
    alone = run_method(detector, data, methods[1])
    assert row_of(alone).ap == one[1].ap, "methods do not disturb each other"


def test_limits_and_unlabelled_frames(detector: Detector, data: CocoVideo) -> None:
    few = copy.deepcopy(first(data, videos=1, frames=3))
    few.videos[0].frames[1] = Frame(99, few.videos[0].frames[1].file_name, 128, 128, 1, labelled=False)
    seen: list[str] = []
    result = evaluate_detector(detector, few, on_frame=lambda method: seen.append(method.name))
    assert (result["frames"], result["images"], result["videos"]) == (3, 2, 1)
    assert seen == ["dense"] * 3
    assert set(result["ap50_by_class"]) == {"circle", "square", "star"}
    for frame in few.frames:
        frame.labelled = False
    with pytest.raises(UserError, match="no labelled frame"):
        evaluate_detector(detector, few)


def test_scores_by_video(detector: Detector, data: CocoVideo) -> None:
    run = run_method(detector, data, Method("dense"))
    assert [run.scores(video).images for video in run.videos] == [4, 4]
    assert len(run.results) == sum(run.scores(video).detections for video in run.videos)


def test_a_missing_image_is_named(detector: Detector, data: CocoVideo) -> None:
    gone = first(data, videos=1, frames=1)
    gone.videos[0].frames[0] = Frame(1, "gone.jpg", 128, 128)
    with pytest.raises(UserError, match=r"gone\.jpg"):
        evaluate_detector(detector, gone)


def test_report(detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    methods = [Method("dense"), Method("rows", 0.5, Rows(), TopFraction(0.5)), Method("moved_boxes", 2, hold=2)]
    rows = rows_of(run_methods(detector, first(data, 1), methods))
    report.write_csv(rows, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["dense", "rows 0.5", "moved boxes 2"]
    assert [float(line["gmacs_total"]) for line in lines] == [row.gmacs_total for row in rows]
    plain = json.loads(json.dumps(as_json(rows), allow_nan=False))
    undefined = [key for key, value in plain[0].items() if value is None]
    assert set(undefined) > {"ap50_slow"} and math.isnan(rows[0].ap50_slow)
    table = report.markdown(rows).splitlines()
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    report.plot(rows, tmp_path / "sweep.png", "a title")
    picture = cv2.imread(str(tmp_path / "sweep.png"))
    assert picture is not None and picture.shape[1] > 1000


def test_a_killed_sweep_goes_on_and_nothing_is_run_twice(detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    methods = [Method("dense"), Method("rows", 0.5, Rows(), TopFraction(0.5))]
    store = ResultStore(tmp_path, {"weights": "abc"}, data)
    uninterrupted = rows_of(run_methods(detector, data, methods))
    seen: list[str] = []

    def stop_midway(method: Method) -> None:
        seen.append(method.name)
        if len(seen) == 10:  # in the second video, after its first method has begun
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_methods(detector, data, methods, store=store, on_frame=stop_midway)
    again: list[str] = []
    resumed = rows_of(run_methods(detector, data, methods, store=store, on_frame=lambda m: again.append(m.name)))
    assert len(again) == 16 and [str(steady(row)) for row in resumed] == [str(steady(row)) for row in uninterrupted]
    images = [store.load(method, video) for method in methods for video in data.videos]
    assert all(images)
    finished = rows_of(run_methods(detector, data, methods, store=store))
    assert finished == resumed, "times too: nothing was run"


def test_what_was_kept_is_not_used_for_anything_else(detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    method, other = Method("rows", 0.5, Rows(), TopFraction(0.5)), Method("rows", 0.5, Rows(), TopFraction(0.25))
    store = ResultStore(tmp_path, {"weights": "abc"}, data)
    run_method(detector, data, method, store=store)
    video = data.videos[0]
    assert store.load(method, video) is not None
    assert store.load(other, video) is None
    assert ResultStore(tmp_path, {"weights": "other"}, data).load(method, video) is None
    assert store.load(method, first(data, frames=2).videos[0]) is None
    elsewhere = Path(shutil.copytree(data.image_root, tmp_path / "moved"))
    moved = CocoVideo(data.categories, data.videos, elsewhere)
    assert ResultStore(tmp_path, {"weights": "abc"}, moved).load(method, video) is None
    picture = data.image_path(video.frames[1])
    shutil.copy2(picture, tmp_path / "other")
    picture.rename(tmp_path / "kept")
    (tmp_path / "other").rename(picture)  # of the same name, size and time, as where a link leads elsewhere
    assert ResultStore(tmp_path, {"weights": "abc"}, data).load(method, video) is None
    picture.unlink()
    (tmp_path / "kept").rename(picture)
    assert ResultStore(tmp_path, {"weights": "abc"}, data).load(method, video) is not None
    os.utime(picture, (1, 1))
    assert ResultStore(tmp_path, {"weights": "abc"}, data).load(method, video) is None, "a picture has changed"
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:-20])
    assert store.load(method, video) is None, "a truncated file is run again"


def test_times_of_different_processes_are_not_compared(detector: Detector, data: CocoVideo) -> None:
    runs = run_methods(detector, data, [Method("dense"), Method("held", 2, hold=2)])
    elsewhere = [dataclasses.replace(video, session="another") for video in runs[1].videos]
    _, held = rows_of([runs[0], dataclasses.replace(runs[1], videos=elsewhere)])
    assert math.isnan(held.relative_time)
