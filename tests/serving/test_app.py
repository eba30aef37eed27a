"""The web application as programs see it: streams, budget, pictures, metrics, errors."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from served import Server, serving
from servers import jpeg_camera

from eventful_det.data.video import VideoFrame, VideoSource
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.serving.sources import OpenedSource
from eventful_det.serving.views import HISTORY


def parse(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """A frame as the page reads it."""
    (length,) = struct.unpack(">I", data[:4])
    return json.loads(data[4 : 4 + length]), cv2.imdecode(np.frombuffer(data[4 + length :], np.uint8), cv2.IMREAD_COLOR)


def turn(page: Any) -> tuple[list[str], list[tuple[dict[str, Any], np.ndarray]]]:
    """The names of all streams and the frames that a page gets next."""
    state = json.loads(page.receive_text())
    return [one["name"] for one in state["streams"]], [parse(page.receive_bytes()) for _ in range(state["frames"])]


def test_a_stream_from_joining_to_leaving(server: Server) -> None:
    assert server.state()["streams"] == []
    name = server.watch("clip.mp4")
    (stream,) = server.wait(lambda s: s["streams"][0]["frames"] > 14)["streams"]  # more than the clip has: it loops
    assert (name, stream["title"], stream["status"], stream["error"]) == ("clip.mp4", "clip.mp4", "running", None)
    record = server.client.get(f"/api/streams/{name}/detections").json()
    assert record["size"] == {"height": 96, "width": 144} and record["cost"]["tokens"] == 60
    answer = server.client.get(f"/api/streams/{name}/frame.jpg?show=0")
    assert answer.headers["content-type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR).shape == (96, 144, 3)
    again = server.watch("clip.mp4")
    assert again == "clip.mp4-2"
    assert server.client.delete(f"/api/streams/{name}").status_code == 204
    assert [one["name"] for one in server.state()["streams"]] == [again]
    for method, path in (("DELETE", name), ("GET", f"{name}/frame.jpg"), ("GET", "never/detections")):
        answer = server.client.request(method, f"/api/streams/{path}")
        assert answer.status_code == 404 and "no stream" in answer.json()["error"]


def test_a_dense_detector_stays_dense(tiny_detector: Detector) -> None:
    with serving(tiny_detector, rule=Dense()) as server:
        for budget in ("25%", "auto", "40 GMACs"):
            answer = server.client.put("/api/budget", json={"budget": budget})
            assert answer.status_code == 400 and "gate=dense" in answer.json()["error"]
        assert server.runner.pool.rule == Dense()


def test_a_frame_that_cannot_be_shown_stops_nobody_else(server: Server) -> None:
    broken = server.watch("clip.mp4")

    def fail(_: object) -> Any:
        raise ValueError("no such box")

    with server.runner.lock:
        server.runner.views[broken].followers = (fail,)
    server.wait(lambda s: any("no such box" in (one["error"] or "") for one in s["streams"]))
    server.watch("clip.mp4")


def test_the_budget_acts_on_the_next_frames(server: Server) -> None:
    name = server.watch("clip.mp4")

    def recomputed(budget: str) -> list[int]:
        answer = server.client.put("/api/budget", json={"budget": budget})
        assert answer.status_code == 200 and answer.json()["budget"] == budget
        since = server.state()["streams"][0]["frames"] + 1
        server.wait(lambda s: s["streams"][0]["frames"] > since + 14)
        with server.runner.lock:
            marks = list(server.runner.views[name].history)
        return [mark.cost.recomputed for mark in marks if mark.number > since and not mark.cost.flush]

    tenth = recomputed("10%")
    assert max(tenth) <= 21 and sum(tenth) <= 6 * len(tenth) + 2 * 21, "key frames, of a third of the 60 tokens each"
    assert max(recomputed("100%")) > 21
    three = recomputed("3 tokens")
    assert sum(three) <= 3 * len(three) + 2 * 21, "on average; what two key frames cost may be owed"
    assert max(recomputed("auto")) > 3
    for wrong in ("much", "250%", "-1"):
        answer = server.client.put("/api/budget", json={"budget": wrong})
        assert answer.status_code == 400 and "budget" in answer.json()["error"]
    assert server.state()["budget"] == "auto"


def test_live_frames_do_not_wait_for_the_detector(tiny_detector: Detector, tmp_path: Path, clip: Path) -> None:
    step = tiny_detector.step

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return step(*args, **options)

    tiny_detector.step = slow  # type: ignore[method-assign]
    with serving(tiny_detector, live=True, media=clip.parent) as server:
        name = server.watch(clip.name)
        server.wait(lambda s: s["streams"][0]["frames"] >= 30)
        with server.runner.lock:
            marks = list(server.runner.views[name].history)
        detected = sum(mark.cost.total > 0 for mark in marks)
        assert 1 <= detected < len(marks) / 2, "the others got moved boxes"
        (stream,) = server.state()["streams"]
        assert 0 <= stream["age_p95"] < 0.5
        assert f'eventful_frame_age_tail_seconds{{stream="{name}"}}' in server.client.get("/metrics").text


def test_metrics_count_what_was_done(server: Server) -> None:
    name = server.watch("clip.mp4")
    server.wait(lambda s: s["streams"][0]["frames"] >= 5)
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    values = {}
    for line in lines:
        key, value = line.rsplit(" ", 1)
        assert re.fullmatch(r'[a-z_]+(\{stream="[A-Za-z0-9._-]+"\})?', key)
        values[key] = float(value)
    assert values["eventful_streams"] == 1 and values[f'eventful_up{{stream="{name}"}}'] == 1
    assert values[f'eventful_frames_total{{stream="{name}"}}'] >= 5
    assert values[f'eventful_flushes_total{{stream="{name}"}}'] >= 1
    dense = values[f'eventful_dense_macs_total{{stream="{name}"}}']
    assert 0 < values[f'eventful_macs_total{{stream="{name}"}}'] <= 1.1 * dense


def test_pages_get_the_newest_frame_when_they_are_ready(server: Server) -> None:
    name = server.watch("clip.mp4")
    with server.page() as page:
        names, frames = turn(page)
        assert names == [name]
        for about, picture in frames:
            assert about["stream"] == name and picture.shape == (96, 144, 3)
            assert (about["work"]["rows"], about["work"]["cols"]) == (6, 10)
        # The page is slow: detection goes on, it gets one more turn, nothing piles up, and then it gets the present.
        frames += turn(page)[1]
        later = server.wait(lambda s: s["streams"][0]["frames"] >= frames[-1][0]["number"] + 6)["streams"][0]["frames"]
        page.send_text("drawn")
        ((present, _),) = turn(page)[1]
        assert present["number"] >= later
        marks = [mark[0] for about in (*(about for about, _ in frames), present) for mark in about["marks"]]
        assert marks == list(range(1, present["number"] + 1)) and len(marks) <= HISTORY


def test_binary_messages_are_declined(server: Server) -> None:
    with server.page() as page:
        page.receive_text()
        page.send_bytes(b"drawn")
        assert page.receive() == {"type": "websocket.close", "code": 1003, "reason": "text only"}


def test_passwords_are_shown_to_nobody(server: Server) -> None:
    with jpeg_camera(rate=20, count=200) as (url, _):
        name = server.watch(url.replace("//", "//admin:S3%23cret@") + "?pwd=S3cret")
        shown = [server.client.get(path).text for path in ("/api/state", f"/api/streams/{name}/detections", "/metrics")]
        with server.page() as page:
            shown.append(page.receive_text())
    for source in (
        "rtsp://admin:S3#cret@127.0.0.1:9/s",
        "gopher://admin:S3cret@cam",
        "http:/admin:S3cret@cam?pwd=S3cret",
    ):
        answer = server.client.post("/api/streams", json={"source": source})
        assert answer.status_code == 400
        shown.append(answer.text)
    assert "admin:***@127.0.0.1" in shown[0] and not any("cret" in text for text in shown), shown


def test_a_page_sees_streams_come_and_go(server: Server) -> None:
    with server.page() as page:
        assert json.loads(page.receive_text())["streams"] == []
        name = server.watch("clip.mp4")
        while turn(page) == ([], []):
            page.send_text("drawn")
        server.client.delete(f"/api/streams/{name}")
        page.send_text("drawn")
        while turn(page)[0] == [name]:
            page.send_text("drawn")


class Breaking(VideoSource):
    """Delivers a few frames and then ends or fails."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__("breaking", 25.0)
        self.error = error

    def _read(self) -> Iterator[VideoFrame]:
        yield VideoFrame(np.zeros((96, 144, 3), np.uint8))
        if self.error is not None:
            raise self.error


def test_a_stream_that_fails_says_why_and_disturbs_nobody(server: Server) -> None:
    good = server.watch("clip.mp4")
    server.runner.add(OpenedSource(Breaking(UserError("the camera fell off")), "a"))
    server.runner.add(OpenedSource(Breaking(None), "b"))
    state = server.wait(lambda s: [one["status"] for one in s["streams"]] == ["running", "failed", "ended"])
    assert state["streams"][1]["error"] == "the camera fell off"
    frames = state["streams"][0]["frames"]
    server.wait(lambda s: s["streams"][0]["frames"] > frames)
    assert server.client.delete("/api/streams/a").status_code == 204
    assert [one["name"] for one in server.state()["streams"]] == [good, "b"]


class Unplugged(VideoSource):
    """A camera that shows a frame and is gone."""

    live = True
    lost = False

    def _read(self) -> Iterator[VideoFrame]:
        yield VideoFrame(np.zeros((96, 144, 3), np.uint8))
        self.lost = True
        self.back.wait(10)

    def __init__(self) -> None:
        super().__init__("unplugged")
        self.back = threading.Event()

    def close(self) -> None:
        self.back.set()


def test_a_camera_that_is_lost_is_told_from_one_that_runs(server: Server) -> None:
    server.runner.add(OpenedSource(Unplugged(), "door"))
    server.wait(lambda s: s["streams"][0]["status"] == "lost" and s["streams"][0]["frames"] == 1)
    assert 'eventful_up{stream="door"} 0' in server.client.get("/metrics").text
    server.client.delete("/api/streams/door")


def test_an_upload_that_breaks_off_leaves_nothing(server: Server) -> None:
    """The person closed the page: no error is raised, or a server would log a traceback."""
    messages = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/api/uploads"}
    scope |= {"query_string": b"name=a.mp4", "headers": [(b"host", b"localhost")], "server": ("localhost", 80)}
    asyncio.run(server.client.app(scope, receive, send))  # type: ignore[arg-type]
    assert not messages and not list(server.opener.directory.iterdir())


def test_a_detector_that_fails_is_reported(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.watch("clip.mp4")
    with monkeypatch.context() as patched:
        patched.setattr(server.runner.pool, "step", lambda: 1 / 0)
        state = server.wait(lambda s: s["streams"][0]["status"] == "failed")
    assert "ZeroDivisionError" in state["streams"][0]["error"]
    assert server.watch("clip.mp4") == "clip.mp4-2"  # the server goes on


def test_errors_are_json(server: Server) -> None:
    for body in (b"{", b"{}", b'{"source": 7}', b'{"source": "' + b"x" * 3000 + b'"}'):
        answer = server.client.post("/api/streams", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and answer.json()["error"]
    assert server.client.get("/nothing").json() == {"error": "Not Found"}
    assert server.client.get("/docs").status_code == 404  # its scripts would come from elsewhere


def test_there_is_an_upper_limit_of_streams(tiny_detector: Detector, clip: Path) -> None:
    with serving(tiny_detector, max_streams=1, media=clip.parent) as server:
        server.watch("clip.mp4")
        for answer in (
            server.client.post("/api/streams", json={"source": "clip.mp4"}),
            server.client.post("/api/uploads?name=clip.mp4", content=clip.read_bytes()),
        ):
            assert answer.status_code == 400 and "1 streams already" in answer.json()["error"]
        assert not list(server.opener.directory.iterdir())


def test_nothing_is_left_behind(tiny_detector: Detector, clip: Path) -> None:
    with serving(tiny_detector) as server:
        answer = server.client.post("/api/uploads?name=clip.mp4", content=clip.read_bytes())
        assert answer.status_code == 201
        server.wait(lambda s: s["streams"][0]["frames"] > 0)
        directory = server.opener.directory
        assert directory.is_dir()
    assert not directory.exists()
    deadline = time.monotonic() + 10
    while any(thread.name == "detector" or thread.name == "background-reader" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.02)


def test_objects_have_ids_if_asked_for() -> None:
    pytest.importorskip("trackers", reason="trackers is not installed")
    with serving(load_detector("vitdet_tiny_synthetic"), track=True) as server:
        name = server.watch("synthetic:1")
        server.wait(lambda s: s["streams"][0]["frames"] >= 3)
        record = server.client.get(f"/api/streams/{name}/detections").json()
        assert any("track_id" in found for found in record["detections"])
