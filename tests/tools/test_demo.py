"""tools/demo.py: complete, consistent files whatever ends the run, and its error lines."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import cv2
import demo
import demo_files
import demo_run
import numpy as np
import pytest
import torch
from running import options_of, run
from servers import Server, why_not
from videos import Image, damage, encode, encode_change, encode_sound, rotate, truncate

from eventful_det.data.layouts.exports import EXPORTS
from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video import VideoFrame, VideoSource, open_source
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, Focus, LargestError, RandomOrder, Selector

FILES = {"annotated.mp4", "detections.jsonl", "cost.csv", "cost.png", "results.json"}


@pytest.fixture
def weights(tiny_detector: Detector, tmp_path: Path) -> str:
    save_detector(tiny_detector, tmp_path / "tiny.safetensors", torch.float32)
    return f"weights={tmp_path / 'tiny.safetensors'}"


@pytest.fixture(autouse=True)
def simple_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the complete run draws its costs: that takes longer than all else in a run of a few frames."""
    if request.node.name != "test_complete_run_and_failed_start":
        monkeypatch.setattr(demo_files, "plot_cost", lambda *given: Path(given[-1]).write_bytes(b"a plot"))


def config(*options: str) -> demo.Options:
    return options_of("demo", "device=cpu", *options)


def check_run(directory: Path) -> dict[str, Any]:
    """All files hold the same frames; returns the results."""
    assert {path.name for path in directory.iterdir()} == FILES
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    lines = [json.loads(line) for line in (directory / "detections.jsonl").read_text().splitlines()]
    with (directory / "cost.csv").open() as table:
        rows = list(csv.DictReader(table))
    with open_source(directory / "annotated.mp4") as video:
        shown = sum(1 for _ in video)
    assert len(lines) == len(rows) == shown == results["frames"]
    assert [line["frame_index"] for line in lines] == list(range(shown))
    return results


def test_complete_run_and_failed_start(weights: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("min_score=0.2", "shadow_every=2", "budget=50%", "max_age=20", "bucket=2")
    command = ("tools/demo.py", "device=cpu", weights, f"output={output}")
    stdout = run(*command, "source=synthetic:1", "max_frames=4", *options).stdout
    assert str(output / "results.json") in stdout and "4 frames" in stdout
    results = check_run(output)
    assert results["stopped"] is None and results["skipped"] == 0 and results["flushes"] == 1
    assert results["dropped"] == results["reconnects"] == 0 and results["dense_latency_ms"] > 0
    assert 0 < results["frames_per_second"] < results["detector_frames_per_second"] * 1.1
    assert 0 < results["share_of_dense"]["backbone"] < results["share_of_dense"]["total"] < 1
    assert results["gmacs_per_frame"]["total"] < results["dense_gmacs_per_frame"]["total"]
    assert results["state_bytes"] > 0 and results["peak_memory_mb"] > 10
    assert results["drift"]["frames"] == 2 and results["drift"]["dense_ms"] > 0
    assert "agreement with dense on 2 frames" in stdout
    assert 0 <= results["drift"]["agreement_f1"] <= 1 and results["drift"]["times_faster"] > 0
    lines = [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]
    shown = [[d["name"] for d in line["detections"]] for line in lines]
    assert all(d["score"] >= 0.2 for line in lines for d in line["detections"])
    assert results["found"] == {
        name: {"frames": sum(name in one for one in shown), "most": max(one.count(name) for one in shown)}
        for name in set(itertools.chain(*shown))
    }
    line = lines[1]
    assert line["size"] == {"height": 256, "width": 384} and line["timestamp"] == 0.04
    assert line["detections"] and set(line["detections"][0]) == {"box", "score", "label", "name", "track_id"}
    assert all(0 <= x <= 384 and 0 <= y <= 256 for d in line["detections"] for x, y in (d["box"][:2], d["box"][2:]))
    assert set(line["cost"]) == {"macs", "dense", "ms", "recomputed", "tokens", "flush"}
    assert line["cost"]["macs"]["total"] == sum(v for k, v in line["cost"]["macs"].items() if k != "total")

    before = {path.name: path.read_bytes() for path in output.iterdir()}
    failed = run(*command, "source=missing.mp4", check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("error: no such file or folder: 'missing.mp4'")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_single_picture_gives_a_picture(weights: str, tmp_path: Path, images: list[Image]) -> None:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), images[0])
    for source, made in (("a.png", "annotated.jpg"), ("*.png", "annotated.mp4")):
        run("tools/demo.py", "device=cpu", weights, f"source={tmp_path / source}", f"output={tmp_path / 'out'}")
        assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"annotated.mp4"} | {made}
        assert made.endswith("mp4") or cv2.imread(str(tmp_path / "out" / made)).shape[1] >= 320


def test_formats_of_other_programs(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    options = ("source=synthetic:1", f"output={output}")
    demo.run(config(weights, "max_frames=3", "format=[mot,cvat,yolo,label_studio,coco]", *options))
    exports = {name for name, _ in EXPORTS.values()}
    assert {path.name for path in output.iterdir()} == FILES | exports
    results = json.loads((output / "results.json").read_text())
    assert {Path(name).name for name in results["files"]} == FILES - {"results.json"} | exports
    assert len(list((output / "detections.yolo" / "labels").iterdir())) == 3

    demo.run(config(weights, "max_frames=2", "format=yolo", *options))
    # No file is of another run than the others.
    assert {path.name for path in output.iterdir()} == FILES | {"detections.yolo"}
    assert len(list((output / "detections.yolo" / "labels").iterdir())) == 2

    def fill_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(EXPORTS, "mot", (EXPORTS["mot"][0], fill_disk))
    before = {path for path in output.rglob("*")}
    with pytest.raises(UserError, match="cannot write .*detections.mot: No space left"):
        demo.run(config(weights, "max_frames=1", "format=[yolo,mot]", *options))
    assert {path for path in output.rglob("*")} == before  # all of the run before, nothing of this one


@pytest.mark.parametrize(
    "options, message",
    [
        (["format=voc"], "format must be"),
        (["format=[mot,voc]"], "format must be"),
        (["weights=vivit_tiny_synthetic", "format=mot", "hold=2"], "hold, format: for detectors"),
        (["weights=vivit_tiny_synthetic", "rescore=false"], "rescore: for detectors"),
        (["weights=vivit_tiny_synthetic", "live=true"], "live: for detectors"),
    ],
)
def test_formats_that_there_are_not(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        demo.run(config("source=synthetic:1", f"output={tmp_path}", *options))


class Clip(VideoSource):
    """A few frames, and then something happens."""

    def __init__(self, frames: int, then: Callable[[], None]) -> None:
        super().__init__("clip")
        self.length, self.then = frames, then

    def _read(self) -> Iterator[VideoFrame]:
        for frame in render_video(SceneOptions(width=64, height=48, frames=self.length)):
            yield VideoFrame(frame.image)
        self.then()
        for frame in render_video(SceneOptions(width=64, height=48, frames=100)):
            yield VideoFrame(frame.image)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_ctrl_c(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    clip = Clip(frames, partial(os.kill, os.getpid(), signal.SIGINT))
    monkeypatch.setattr(demo_run, "open_source", lambda *_, **__: clip)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config(weights, f"output={tmp_path / 'out'}"))
    results = check_run(tmp_path / "out")
    assert (results["frames"], results["stopped"]) == (frames, "interrupted")


def test_terminated_run(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(3, partial(os.kill, os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(demo_run, "open_source", lambda *_, **__: clip)
    ended = run("tools/demo.py", "device=cpu", weights, f"output={tmp_path / 'out'}", check=False)
    assert (ended.returncode, ended.stderr) == (143, "stopped\n")
    results = check_run(tmp_path / "out")
    assert (results["frames"], results["stopped"]) == (3, "interrupted")


def test_ctrl_c_while_files_are_finished(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = demo_files.plot_cost

    def plot_slowly(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        plot(*given)

    monkeypatch.setattr(demo_files, "plot_cost", plot_slowly)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config(weights, "source=synthetic", "max_frames=3", f"output={tmp_path / 'out'}"))
    assert check_run(tmp_path / "out")["frames"] == 3


def test_few_frames_are_in_flight(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    class Watched(Clip):
        def _read(self) -> Iterator[VideoFrame]:
            for frame in super()._read():
                alive.append(weakref.ref(frame.image))
                assert sum(image() is not None for image in alive) <= 12
                yield frame

    clip = Watched(20, lambda: None)
    clip.ahead = 2
    monkeypatch.setattr(demo_run, "open_source", lambda *_, **__: clip)
    demo.run(config(weights, f"output={tmp_path / 'out'}", "max_frames=30"))
    assert check_run(tmp_path / "out")["frames"] == 30 and len(alive) <= 35


def test_error_midway_keeps_what_was_written(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall() -> None:
        raise UserError("the camera fell off")

    monkeypatch.setattr(demo_run, "open_source", lambda *_, **__: Clip(5, fall))
    with pytest.raises(UserError, match="fell off"):
        demo.run(config(weights, f"output={tmp_path / 'out'}", "hold=2", "min_score=0.2"))
    results = check_run(tmp_path / "out")
    assert (results["frames"], results["stopped"]) == (5, "the camera fell off")


@contextmanager
def small_disk(free: int) -> Iterator[None]:
    """No file may get longer than so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits for files")
@pytest.mark.parametrize("free", [0, 1_000, 30_000])
def test_full_disk_leaves_an_earlier_run_alone(weights: str, tmp_path: Path, free: int) -> None:
    options = (weights, f"output={tmp_path / 'out'}", "width=320")
    demo.run(config(*options, "source=synthetic", "max_frames=2"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with small_disk(free), pytest.raises(UserError, match="cannot write .*File too large") as caught:
        demo.run(config(*options, "source=synthetic:1", "max_frames=60"))
    assert re.search(r"(annotated|detections|cost|results)[.\w]*: File too large$", str(caught.value))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    demo.run(config(*options, "source=synthetic:1", "max_frames=3"))
    assert check_run(tmp_path / "out")["frames"] == 3


@pytest.fixture(scope="module")
def images() -> list[Image]:
    options = SceneOptions(width=160, height=96, frames=12, cut_fraction=0)
    return [frame.image for frame in render_video(options, seed=1)]


def grey(images: list[Image]) -> list[Image]:
    return [np.ascontiguousarray(image[:75, :51]) for image in images]


@pytest.mark.parametrize(
    ("name", "make", "frames", "skipped"),
    [
        ("truncated.mp4", lambda p, i: truncate(encode(p, i, movflags="faststart"), 0.75), range(6, 12), True),
        ("truncated.ts", lambda p, i: truncate(encode(p, i, "mpeg2video"), 0.75), range(6, 12), False),
        ("damaged.mp4", lambda p, i: damage(encode(p, i, movflags="faststart")), range(6, 12), True),
        ("resized.ts", encode_change, range(11, 13), False),
        ("variable.mp4", lambda p, i: encode(p, i, times=[0, 1, 2, 9, 10, 30, 31, 32, 33, 40, 41, 42]), [12], False),
        ("upright.mp4", lambda p, i: rotate(encode(p, i), 90), [12], False),
        ("deep.mkv", lambda p, i: encode(p, i, "ffv1", "yuv444p10le"), [12], False),
        ("grey_odd.mkv", lambda p, i: encode(p, grey(i), "ffv1", "gray"), [12], False),
        ("alpha.mov", lambda p, i: encode(p, i, "png", "rgba"), [12], False),
        ("one.mp4", lambda p, i: encode(p, i[:1]), [1], False),
    ],
)
def test_difficult_videos(
    weights: str,
    tmp_path: Path,
    images: list[Image],
    name: str,
    make: Callable[[Path, list[Image]], Path],
    frames: Sequence[int],
    skipped: bool,
) -> None:
    path = make(tmp_path / name, images)
    demo.run(config(weights, f"source={path}", f"output={tmp_path / 'out'}", "width=320"))
    results = check_run(tmp_path / "out")
    assert results["frames"] in frames and results["stopped"] is None and (results["skipped"] > 0) == skipped
    if name == "variable.mp4":
        shown = [frame.timestamp for frame in open_source(tmp_path / "out" / "annotated.mp4")]
        assert shown[5:] == pytest.approx([1.2, 1.24, 1.28, 1.32, 1.6, 1.64, 1.68], abs=1e-3)
    sizes = [json.loads(line)["size"] for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    first = {"upright.mp4": (160, 96), "grey_odd.mkv": (75, 51)}.get(name, (96, 160))
    assert tuple(sizes[0].values()) == first
    assert tuple(sizes[-1].values()) == ((64, 96) if name == "resized.ts" else first)


def test_videos_without_a_picture(weights: str, tmp_path: Path, images: list[Image]) -> None:
    empty = truncate(encode(tmp_path / "empty.mp4", images, movflags="faststart"), 0.1)
    sound = encode_sound(tmp_path / "sound.mp4")
    for path, message in ((empty, "holds no frame|cannot open"), (sound, "holds no video")):
        with pytest.raises(UserError, match=message):
            demo.run(config(weights, f"source={path}", f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_several_sources(weights: str, tmp_path: Path, images: list[Image]) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b b.mp4", "a.mkv"):
        encode(tmp_path / "clips" / name, images[:3])
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"nothing")
    for source in (f"{tmp_path}/clips", f"{tmp_path}/clips/*.m*"):
        with pytest.raises(UserError, match="1 of 4 sources failed: .*broken.mp4"):
            demo.run(config(weights, f"source={source}", f"output={tmp_path / 'out'}", "width=320"))
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "a-2", "b_b", "results.json"}
        runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
        for name in ("a", "a-2", "b_b"):
            assert check_run(tmp_path / "out" / name) == runs[name] and runs[name]["frames"] == 3
        shutil.rmtree(tmp_path / "out")
    two = f"source=[{tmp_path}/clips/a.mp4,synthetic:2]"
    demo.run(config(weights, two, f"output={tmp_path / 'out'}", "max_frames=2", "width=320"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "synthetic_2", "results.json"}


def test_classes(weights: str, tmp_path: Path) -> None:
    options = (weights, "source=synthetic", "max_frames=2", f"output={tmp_path / 'out'}", "width=320")
    demo.run(config(*options, "classes=[star,circle]"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert {found["name"] for line in lines for found in line["detections"]} <= {"star", "circle"}
    demo.run(config(*options, "classes=square"))
    with pytest.raises(UserError, match="classes: no class hare; the weights know circle, square, star"):
        demo.run(config(*options, "classes=[hare,star]"))


@pytest.mark.slow
@pytest.mark.skipif(why_not("http") is not None, reason=str(why_not("http")))
def test_camera_that_restarts(weights: str, tmp_path: Path) -> None:
    server, output = Server("http"), tmp_path / "out"

    def frames() -> int:
        lines = output / "detections.part.jsonl"
        return lines.read_text().count("\n") if lines.exists() else 0

    def direct() -> None:
        while frames() < 5:
            time.sleep(0.02)
        server.kill()
        server.start()
        seen = frames()
        while frames() < seen + 5:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    director = threading.Thread(target=direct)
    director.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.run(config(weights, f"source={server.url}", f"output={output}"))
    finally:
        director.join()
        server.kill()
    results = check_run(output)
    assert results["reconnects"] == 1 and results["flushes"] >= 2 and results["dropped"] > 0
    lines = [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]
    assert all(0 <= line["frame_age"] < 2 for line in lines)
    assert lines[-1]["dropped"] <= results["dropped"], "more may be dropped behind the last line"
    with open_source(output / "annotated.mp4") as video:
        shown = [frame.timestamp for frame in video]
    assert shown == pytest.approx([line["timestamp"] for line in lines], abs=0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "background-reader" and thread.is_alive()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["max_frames=0"], "max_frames"),
        (["gate=dense", "budget=0.5"], "budget: gate=dense recomputes everything"),
        (["budget=2.5"], "budget of 2.5"),
        (["budget=40GFLOPs"], "budget='40GFLOPs' cannot be understood"),
        (["budget=50ms", "gate=paper"], "rows rule"),
        (["max_age=-1"], "max_age must be"),
        (["shadow_every=-1"], "shadow_every must be"),
        (["source=synthetic", "output={tmp}/file/out"], "cannot write"),
        (["weights={tmp}/none.safetensors"], "no weights"),
        (["device=abacus"], "device=abacus"),
        (["source={tmp}"], "no pictures"),
        (["source=[]"], "source: give at least one"),
        (["classes=[]"], "classes: give at least one"),
    ],
)
def test_error_lines(weights: str, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    filled = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(UserError, match=message):
        demo.run(config(weights, f"output={tmp_path / 'out'}", *filled))
    assert not (tmp_path / "out").exists()


def test_build_gate() -> None:
    build = common.build_gate
    assert build(config().gate) == (Rows(), DEFAULT)
    assert build(config("gate/policy=frugal").gate) == (Rows(), Selector(Focus(2.0), 0.4))
    chosen = config("gate/policy=topk", "gate.policy.k=7", "gate.renew_every=8", "gate.gate=embedding").gate
    assert build(chosen) == (Rows("embedding", 8), Selector(LargestError(None, 0.5, 4.0), 7))
    chosen = config("gate=paper", "gate/policy=threshold", "gate.policy.threshold=2", "gate.pool=2").gate
    assert build(chosen) == (Paper(pool=2), Selector(LargestError(2, 0.5, 4.0), 0.5))
    assert build(config("gate/policy=random").gate) == (Rows(), Selector(RandomOrder(), 0.25))
    assert build(config("gate=dense").gate) == (Dense(), DEFAULT)
    with pytest.raises(UserError, match="unknown rule 'row'; did you mean rows"):
        build({"rule": "row"})
    with pytest.raises(UserError, match="unknown policy 'best'"):
        build({"rule": "rows", "policy": {"name": "best"}})
    with pytest.raises(UserError, match="gate.policy: unknown option 'age_pover'; did you mean age_power"):
        build({"rule": "rows", "policy": {"name": "topk", "k": 3, "age_pover": 1}})
