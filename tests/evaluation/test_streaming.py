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
from eventful_det.data.video_writer import VideoWriter
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import coco_results
from eventful_det.evaluation.runs import Method, VideoRun
from eventful_det.evaluation.store import ResultStore
from eventful_det.evaluation.streaming import run_videos
from eventful_det.evaluation.summary import rows_of
from eventful_det.evaluation.sweep import run_method, run_methods
from eventful_det.gating.paper import Paper
from eventful_det.gating.policy import RandomK, Threshold, TopFraction
from eventful_det.gating.rows import Rows
from eventful_det.models.detector import Detector, StepResult

SIZES = [(128, 96, 5), (96, 128, 2), (160, 96, 7), (128, 96, 3)]  # width, height, frames
METHODS = [
    Method("dense"),
    Method("threshold", 1, Rows(Threshold(1.0, cap=0.5, age_power=0.5))),
    Method("renewed", 2, Rows(TopFraction(0.25), renew_every=3)),
    Method("random", 0.25, Rows(RandomK(fraction=0.25))),
    Method("paper", 0.25, Paper(TopFraction(0.25))),
    Method("held", 2, Rows(TopFraction(0.5)), hold=2),
    Method("small", 0.5, scale=0.5),
]
SQUARE = Method("square", None, Rows(TopFraction(0.5)), square=True)


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
        stream = tiny_detector.with_rule(method.rule).stream(
            [cv2.imread(str(data.image_path(frame)))[..., ::-1].copy() for frame in video.frames],
            short_side=round(method.scale * 96),
            long_side=round(method.scale * 192),
            hold=method.hold,
        )
        found = list(stream)
        detections = {f.image_id: r.detections for f, r in zip(video.frames, found, strict=True)}
        costs = [dataclasses.replace(result.cost, seconds={}) for result in found]
        run = runs[video.id]
        assert (run["results"], run["costs"]) == (coco_results(detections, [1, 2, 3]), costs)
        assert run["state"] == stream.state_bytes
    assert runs[3]["costs"][3].flush, "the cut was seen"


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

    def slow(self: Detector, frames: Any, *rest: Any) -> list[StepResult]:
        steps.append(len(frames))
        time.sleep(0.02)
        return plain(self, frames, *rest)

    monkeypatch.setattr(Detector, "step", slow)
    runs = list(run_videos(tiny_detector, data, Method("held", 2, hold=2), streams=4, scene_cuts=False))
    latencies = [latency for run in runs for latency in run.latencies]
    assert steps == [4, 3, 2, 1], "frames 0, 2, 4 and 6 of those that are as long"
    assert len(latencies) == 17 and sum(latency > 0 for latency in latencies) == sum(steps)
    assert len({latency for latency in latencies if latency}) == len(steps) and min(filter(None, latencies)) > 0.02
    whole = sum({latency for latency in latencies if latency})
    assert sum(run.seconds for run in runs) == pytest.approx(whole)


def test_video_files_are_run_like_their_frames(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    video = data.videos[0]
    with VideoWriter(tmp_path / "clip.mp4", quality=10) as writer:
        for frame in video.frames:
            writer.write(cv2.imread(str(data.image_path(frame)))[..., ::-1].copy())
    clip = dataclasses.replace(video, file_name="clip.mp4")
    CocoVideo(data.categories, [clip], tmp_path).save(tmp_path / "clip.json")
    expected = [r.detections for r in tiny_detector.with_rule(METHODS[1].rule).stream(tmp_path / "clip.mp4")]
    run = run_method(tiny_detector, load_coco_video(tmp_path / "clip.json"), METHODS[1], streams=2, workers=2)
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
        run_method(tiny_detector, broken(data, tmp_path, *(f.image_id for f in data.frames)), Method("dense"))


def test_what_was_skipped_is_run_when_it_can_be_read(tiny_detector: Detector, data: CocoVideo, tmp_path: Path) -> None:
    part = broken(data, tmp_path, 23)
    store = ResultStore(tmp_path / "store", {}, part)
    seen: list[str] = []
    run_method(tiny_detector, part, METHODS[1], store=store)
    run_method(tiny_detector, part, METHODS[1], store=store)
    cv2.imwrite(str(tmp_path / "2_2.png"), cv2.imread(str(data.image_root / "2_2.png")))
    mended = run_method(tiny_detector, part, METHODS[1], store=store, on_frame=lambda m: seen.append(m.name))
    assert mended.results == run_method(tiny_detector, data, METHODS[1]).results
    assert not mended.skipped and len(seen) == 17
