"""cameras.yaml at work: events, health, metrics, reload."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.runtime.pool import StreamPool

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'eventful_det[serve]')")
pytest.importorskip("httpx2", reason="httpx2, which FastAPI's TestClient needs, is not installed")

from brokers import wait
from fastapi.testclient import TestClient

from eventful_det.cameras.service import CameraService
from eventful_det.serving.app import create_app
from eventful_det.serving.runner import PoolRunner
from eventful_det.serving.sources import SourceOpener

GATE = "  gate: {source: FILM, score: 0.01, gone: 0.3%s}\n"
TOKEN = "a token of some length"


@dataclass
class Site:
    """A running server with cameras."""

    path: Path
    service: CameraService
    runner: PoolRunner
    client: TestClient
    film: Path

    def write(self, text: str) -> None:
        self.path.write_text(text.replace("FILM", str(self.film)))

    def events(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.path.parent / "cameras" / "events").glob("*.jsonl")):
            found += [json.loads(line) for line in path.read_bytes().splitlines()]
        return found

    def frames(self, camera: str) -> int:
        return self.runner.pool.metrics().streams[camera].frames


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, in which an untrained detector finds something."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (25, 96, 144, 3), np.uint8)
    with VideoWriter(path, fps=25) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@contextmanager
def running(detector: Detector, tmp_path: Path, film: Path, text: str, token: str | None = None) -> Iterator[Site]:
    path = tmp_path / "cameras.yaml"
    path.write_text(text.replace("FILM", str(film)))
    runner = PoolRunner(StreamPool(detector, timing=True))
    service = CameraService(path, runner, detector.names)
    app = create_app(runner, SourceOpener(), cameras=service, token=token)
    with TestClient(app, base_url="http://localhost") as client:
        yield Site(path, service, runner, client, film)


def test_cameras_of_a_file_tell_what_happens(tiny_detector: Detector, tmp_path: Path, film: Path) -> None:
    zones = ", zones: {all: {polygon: [[0, 0], [1, 0], [1, 1], [0, 1]]}}"
    with running(tiny_detector, tmp_path, film, "cameras:\n" + GATE % zones, TOKEN) as site:
        wait(lambda: any(event["kind"] == "enter" for event in site.events()))
        healthy = {"status": "ok", "cameras": 1, "online": 1, "sinks": {}}
        wait(lambda: site.client.get("/health").json() == healthy)
        assert site.client.get("/api/state").status_code == 401, "all else needs the token"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        shown = site.client.get("/api/streams/gate/detections", headers=headers).json()["detections"]
        assert all(one["zones"] == ["all"] for one in shown)
        text = site.client.get("/metrics", headers=headers).text
        assert 'eventful_camera_online{camera="gate"} 1' in text
        assert f'eventful_events_total{{camera="gate",kind="online"}} {site.service.counts["gate", "online"]}' in text
        assert "eventful_lost_events_total 0" in text
    events = site.events()
    enter = next(event for event in events if event["kind"] == "enter")
    assert enter["camera"] == "gate" and enter["class"] in tiny_detector.names and len(enter["box"]) == 4
    clips = tmp_path / "cameras" / "clips"
    assert (clips / enter["snapshot"]).read_bytes().startswith(b"\xff\xd8") and (clips / enter["clip"]).stat().st_size
    inside = {event["object"] for event in events if event["kind"] == "enter"}
    assert inside == {event["object"] for event in events if event["kind"] == "leave"}, "at the end all have left"
    assert len({event["id"] for event in events}) == len(events)


def test_a_file_that_changes_is_read_again_and_other_cameras_go_on(
    tiny_detector: Detector, tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yard = "  yard: {source: FILM, record: false}\n"
    with running(tiny_detector, tmp_path, film, "cameras:\n" + GATE % "" + yard) as site:
        wait(lambda: site.frames("gate") > 5 and site.frames("yard") > 5)
        soft = ", masks: [[[0, 0], [1, 0], [1, 1], [0, 1]]], priority: 2"
        site.write("cameras:\n" + GATE % soft + yard.replace("record: false", "hold: 2"))
        wait(lambda: site.service.site.cameras["gate"].priority == 2)
        flushes = site.runner.pool.metrics().streams["gate"].flushes
        before = site.frames("gate")
        wait(lambda: site.frames("gate") > before + 5)
        about = site.runner.pool.metrics().streams
        assert about["gate"].frames > 10 and about["gate"].flushes <= flushes + 1, "its state stayed"
        assert about["yard"].frames < about["gate"].frames, "a stream with another rhythm began anew"
        assert not len(site.runner.newest("gate").result.detections), "all of it is masked"  # type: ignore[union-attr]
        site.write("cameras:\n  gate: {source: FILM, score: much}\n")
        wait(lambda: "cameras.yaml:2: cameras.gate.score must be a number" in caplog.text)
        assert set(site.service.site.cameras) == {"gate", "yard"}, "a bad file changes nothing"
        wait(lambda: site.service.health()["cameras"] == {"gate": "online", "yard": "online"})
        site.write("cameras:\n" + GATE % soft + "  shed: {source: FILM}\n")
        site.service.ask_to_reload()
        wait(lambda: "shed" in site.runner.pool.names and "yard" not in site.runner.pool.names)
        wait(lambda: site.frames("shed"))
    offline = [event["camera"] for event in site.events() if event["kind"] == "offline"]
    assert {"gate", "yard"} <= set(offline)


def test_a_camera_that_is_not_there_is_waited_for(
    tiny_detector: Detector, tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "cameras:\n  gate: {source: 'rtsp://u:hidden@127.0.0.1:9/x'}\n  yard: {source: FILM, fps: 10}\n"
    with running(tiny_detector, tmp_path, film, text) as site:
        wait(lambda: site.frames("yard") > 3)
        began, before = time.monotonic(), site.frames("yard")
        wait(lambda: site.frames("yard") > before + 10)
        assert time.monotonic() - began > 0.8, "10 frames a second, not 25"
        wait(lambda: site.service.health()["cameras"] == {"gate": "offline", "yard": "online"})
        assert site.client.get("/health").json()["online"] == 1
        wait(lambda: "Connection refused; calling again" in caplog.text)
    assert "hidden" not in caplog.text and "hidden" not in json.dumps(site.events())


def test_what_cannot_be_had_is_told_at_the_start(tiny_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "cameras.yaml"
    path.write_text("cameras: {gate: {source: 0, classes: [carr]}}")
    with pytest.raises(UserError, match="unknown class 'carr'"):
        CameraService(path, PoolRunner(StreamPool(tiny_detector)), tiny_detector.names)
    path.write_text("cameras: {}\nfolder: /proc/none")
    with pytest.raises(UserError, match="cannot write /proc/none"):
        CameraService(path, PoolRunner(StreamPool(tiny_detector)), tiny_detector.names)


def test_two_servers_do_not_share_a_folder(tiny_detector: Detector, tmp_path: Path, film: Path) -> None:
    other = (
        "import sys; from pathlib import Path; from eventful_det.outputs import owned\n"
        "with owned(Path(sys.argv[1])): pass"
    )
    with running(tiny_detector, tmp_path, film, "cameras: {}\n"):
        ended = subprocess.run([sys.executable, "-c", other, tmp_path / "cameras"], capture_output=True, text=True)
        assert ended.returncode and "is in use by process" in ended.stderr
    assert subprocess.run([sys.executable, "-c", other, tmp_path / "cameras"], check=True)


def test_a_file_beside_the_cameras_is_a_source(tiny_detector: Detector, tmp_path: Path, film: Path) -> None:
    shutil.copy(film, tmp_path / "beside.mp4")
    with running(tiny_detector, tmp_path, film, "cameras: {gate: {source: beside.mp4}}\n") as site:
        wait(lambda: site.frames("gate"))
        site.runner.max_streams = 1
        site.write("cameras:\n  gate: {source: beside.mp4}\n  yard: {source: FILM}\n")
        wait(lambda: "yard" in site.runner.pool.names)  # others may not take the room of a camera
