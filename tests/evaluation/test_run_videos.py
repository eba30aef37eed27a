"""Several videos at a time give what each gives alone, to the last digit; times are those of the steps they share."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import cv2
import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.results import StepResult
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import coco_results
from eventful_det.evaluation.sweep import run_methods, run_videos
from eventful_det.evaluation.sweep.runs import Method, VideoRun
from eventful_det.evaluation.sweep.store import ResultStore
from eventful_det.evaluation.sweep.summary import rows_of
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import Gmacs, LargestError, RandomOrder, Selector, TopFraction
from eventful_det.runtime.rescoring import Rescorer

SIZES = [(128, 96, 5), (96, 128, 2), (160, 96, 7), (128, 96, 3)]  # width, height, frames
METHODS = [
    Method("dense"),
    Method("default", 0.25, Rows(), budget=0.25),
    Method("renewed", 2, Rows(renew_every=3), Selector(LargestError(1.0, age_power=0.5), 0.5)),
    Method("random", 0.25, Rows(), Selector(RandomOrder(), 0.25)),
    Method("paper", 0.25, Paper(), TopFraction(0.25)),
    Method("held", 2, Rows(), TopFraction(0.5), hold=2),
    Method("small", 0.5, scale=0.5),
]
SQUARE = Method("square", None, Rows(), TopFraction(0.5), square=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoVideo:
    """Four videos of different lengths and sizes; in the third another scene begins midway."""
    root, videos = tmp_path_factory.mktemp("mixed"), []
    for v, (width, height, count) in enumerate(SIZES):
        scenes = [render_video(SceneOptions(width=width, height=height, frames=count), 3, v + 9 * k) for k in range(2)]
        images = [frame.image for frame in itertools.chain(*scenes)]
        images = images[:count] if v != 2 else images[: count // 2] + images[count : count + count - count // 2]
        frames = []
        for i, image in enumerate(images):
            cv2.imwrite(str(root / f"{v}_{i}.png"), image[..., ::-1])
            box = Annotation(2, (10.0 + 4 * i, 20.0, 50.0 + 4 * i, 60.0), track_id=0)
            frames.append(Frame(10 * v + i + 1, f"{v}_{i}.png", width, height, i, [box]))
        videos.append(Video(v + 1, f"video {v}", frames))
    data = CocoVideo([(1, "circle"), (2, "square"), (3, "star")], videos, root)
    data.renumber()
    return data


def facts(run: VideoRun) -> dict[str, Any]:
    """What of a run must not depend on the machine, nor on what else it did."""
    costs = [dataclasses.replace(cost, seconds={}) for cost in run.costs]
    return {"frames": run.video.frames, "results": run.results, "costs": costs, "state": run.state_bytes}


@pytest.mark.parametrize("method", [*METHODS, SQUARE], ids=lambda method: method.name)
def test_streams_side_by_side_equal_streams_alone(tiny_detector: Detector, data: CocoVideo, method: Method) -> None:
    alone = {run.video.id: facts(run) for run in run_videos(tiny_detector, data, method)}
    together = list(run_videos(tiny_detector, data, method, streams=3, workers=2))
    assert {run.video.id: facts(run) for run in together} == alone
    assert sum(len(run["results"]) for run in alone.values()) > 50, "the case is not trivial"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_equals_the_stream_of_the_library(tiny_detector: Detector, data: CocoVideo, method: Method) -> None:
    runs = {run.video.id: facts(run) for run in run_videos(tiny_detector, data, method, streams=3)}
    for video in data.videos:
        stream = tiny_detector.stream(
            [cv2.imread(str(data.image_path(frame)))[..., ::-1].copy() for frame in video.frames],
            short_side=round(method.scale * 96),
            long_side=round(method.scale * 192),
            hold=method.hold,
            rule=method.rule,
            budget=method.budget,
        )
        found = list(stream)
        detections = {f.image_id: r.detections for f, r in zip(video.frames, found, strict=True)}
        costs = [dataclasses.replace(result.cost, seconds={}) for result in found]
        run = runs[video.id]
        assert (run["results"], run["costs"]) == (coco_results(detections, [1, 2, 3]), costs)
        assert run["state"] == stream.state_bytes
    assert runs[3]["costs"][3].flush, "the cut was seen"


def test_videos_do_not_share_a_budget_of_a_step(tiny_detector: Detector, data: CocoVideo) -> None:
    method = Method("gmacs", 0.03, Rows(), Gmacs(0.03))
    costs = [cost for run in run_videos(tiny_detector, data, method) for cost in run.costs]
    assert all(cost.flush or cost.total <= 0.03e9 for cost in costs)
    with pytest.raises(UserError, match="streams=1"):
        next(run_videos(tiny_detector, data, method, streams=2))


@pytest.mark.parametrize(("hold", "budget"), [(1, 0.25), (2, 0.25), (None, 0.05)])
def test_rescored_runs_equal_what_a_stream_would_have_shown(
    tiny_detector: Detector, data: CocoVideo, hold: int | None, budget: float
) -> None:
    (run,) = run_methods(tiny_detector, data, [Method("default", budget, Rows(), budget, hold=hold)])
    after = run.rescored()
    for old, new, video in zip(run.videos, after.videos, data.videos, strict=True):
        images = [cv2.imread(str(data.image_path(frame)))[..., ::-1].copy() for frame in video.frames]
        shown = map(Rescorer(), tiny_detector.stream(images, budget=budget, hold=hold))
        for frame, result in zip(video.frames, shown, strict=True):
            scores = sorted((e["score"] for e in new.results if e["image_id"] == frame.image_id), reverse=True)
            assert scores == pytest.approx(result.detections.scores.tolist(), abs=1e-3)
        assert [entry["bbox"] for entry in new.results] == [entry["bbox"] for entry in old.results]
    assert after.results != run.results


def test_boxes_of_a_square_lie_in_the_frame(tiny_detector: Detector, data: CocoVideo) -> None:
    sizes = {frame.image_id: (frame.width, frame.height) for frame in data.frames}
    for run in run_videos(tiny_detector, data, Method("square", square=True)):
        size = sizes[run.video.frames[0].image_id]
        long = round(96 / min(size) * max(size))
        assert {cost.tokens for cost in run.costs} == {(-(-long // 32) * 2) ** 2}, "tokens of 16 pixels, in pairs"
        for entry in run.results:
            (x, y, w, h), (width, height) = entry["bbox"], sizes[entry["image_id"]]
            assert x >= 0 and y >= 0 and x + w <= width + 0.01 and y + h <= height + 0.01 and w > 0 and h > 0


def test_frames_of_a_step_share_its_time(
    tiny_detector: Detector, data: CocoVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = Detector.step, []

    def slow(self: Detector, frames: Any, *rest: Any, **options: Any) -> list[StepResult]:
        steps.append(len(frames))
        time.sleep(0.1)
        return plain(self, frames, *rest, **options)

    monkeypatch.setattr(Detector, "step", slow)
    runs = list(run_videos(tiny_detector, data, Method("held", 2, hold=2), streams=4, scene_cuts=False))
    latencies = [latency for run in runs for latency in run.latencies]
    moved = sum(latency for latency in latencies if latency < 0.1)
    assert steps == [4, 3, 2, 1], "frames 0, 2, 4 and 6 of those that are as long"
    assert len(latencies) == 17 and sum(latency > 0.1 for latency in latencies) == sum(steps)
    shared = {latency for latency in latencies if latency > 0.1}
    assert len(shared) == len(steps) and min(latencies) > 0, "boxes that move take time as well"
    assert sum(run.seconds for run in runs) == pytest.approx(sum(shared) + moved)


def test_video_files_are_run_like_their_frames(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    video = data.videos[0]
    with VideoWriter(tmp_path / "clip.mp4", quality=10) as writer:
        for frame in video.frames:
            writer.write(cv2.imread(str(data.image_path(frame)))[..., ::-1].copy())
    clip = dataclasses.replace(video, file_name="clip.mp4")
    CocoVideo(data.categories, [clip], tmp_path).save(tmp_path / "clip.json")
    expected = [r.detections for r in tiny_detector.stream(tmp_path / "clip.mp4", budget=0.25, hold=1)]
    (run,) = run_methods(tiny_detector, load_coco_video(tmp_path / "clip.json"), METHODS[1:2], streams=2, workers=2)
    found = {f.image_id: d for f, d in zip(video.frames, expected, strict=True)}
    assert run.results == coco_results(found, [1, 2, 3]) and run.results


def broken(data: CocoVideo, root: Path, *images: int) -> CocoVideo:
    """A copy in which the pictures of some frames lie elsewhere."""
    videos = [
        dataclasses.replace(
            video,
            frames=[
                dataclasses.replace(f, file_name=str(root / f.file_name)) if f.image_id in images else f
                for f in video.frames
            ],
        )
        for video in data.videos
    ]
    return CocoVideo(data.categories, videos, data.image_root)


def test_frames_that_cannot_be_read_are_skipped_and_counted(
    tiny_detector: Detector, data: CocoVideo, tmp_path: Path
) -> None:
    """The first frame of a video, one midway, and a video in whole."""
    gone = {1, 23, 11, 12}
    methods = [Method("dense"), METHODS[1], Method("held", 2, hold=2)]
    runs = run_methods(tiny_detector, broken(data, tmp_path, *gone), methods, streams=2, scene_cuts=False)
    kept = [dataclasses.replace(v, frames=[f for f in v.frames if f.image_id not in gone]) for v in data.videos]
    whole = CocoVideo(data.categories, kept, data.image_root)
    expected = run_methods(tiny_detector, whole, methods, streams=2, scene_cuts=False)
    for run, other in zip(runs, expected, strict=True):
        assert set(run.skipped) == gone and "No such file" in run.skipped[23] and not other.skipped
        assert run.results == other.results and run.scores() == other.scores()
    row, other = rows_of(runs)[1], rows_of(expected)[1]
    assert (row.skipped, row.frames, row.images) == (4, 13, 13) and (row.ap50, row.flicker) == (
        other.ap50,
        other.flicker,
    )
    with pytest.raises(UserError, match="no frame can be read; the first: .*0_0.png"):
        run_methods(tiny_detector, broken(data, tmp_path, *(f.image_id for f in data.frames)), METHODS[:1])


def test_what_was_skipped_is_run_when_it_can_be_read(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    part = broken(data, tmp_path, 23)
    store = ResultStore(tmp_path / "store", {}, part)
    seen: list[str] = []
    method = METHODS[1:2]
    run_methods(tiny_detector, part, method, store=store)
    run_methods(tiny_detector, part, method, store=store)
    cv2.imwrite(str(tmp_path / "2_2.png"), cv2.imread(str(data.image_root / "2_2.png")))
    (mended,) = run_methods(tiny_detector, part, method, store=store, on_frame=lambda m: seen.append(m.name))
    assert mended.results == run_methods(tiny_detector, data, method)[0].results
    assert not mended.skipped and len(seen) == 17
