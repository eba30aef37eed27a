"""serving/limits.py: connections that are too slow or too large are cut off, on a real server."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from served import PoolRunner, Server, SourceOpener, StreamPool, listening

from eventful_det.data.video.decoder import MAX_PIXELS
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.serving import limits, sources

HOST = b"Host: localhost\r\n"
HEAD = b"GET /api/state HTTP/1.1\r\n" + HOST


@pytest.fixture
def opener() -> SourceOpener:
    return SourceOpener(max_bytes=100_000)


@pytest.fixture
def port(tiny_detector: Detector, opener: SourceOpener, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that is in a hurry."""
    for name, seconds in (("_HEAD", 0.4), ("_SILENCE", 0.4)):
        monkeypatch.setattr(limits, name, seconds)
    with listening(PoolRunner(StreamPool(tiny_detector)), opener) as found:
        yield found


def drip(port: int, start: bytes, more: bytes, seconds: float = 5.0) -> tuple[bytes, float]:
    """Send something, and further pieces slowly; what came back until the server hung up, and when it did."""
    began, answer = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(start)
        client.settimeout(0.05)
        while time.monotonic() - began < seconds:
            try:
                if not (piece := client.recv(65536)):
                    break
                answer += piece
            except TimeoutError:
                client.sendall(more)
            except OSError:
                break
    return answer, time.monotonic() - began


@pytest.mark.parametrize("start", [b"", HEAD, HEAD + b"\r\n"])
def test_heads_that_drip_are_cut_off(port: int, start: bytes) -> None:
    """The first one, one of which nothing comes, and the second one on a connection."""
    answer, seconds = drip(port, start, b"X: 1\r\n" if start else b"")
    assert 0.3 < seconds < 3 and answer.count(b"HTTP/1.1 ") == start.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ["/api/streams", "/api/uploads?name=a.mp4"])
@pytest.mark.parametrize("more", [b"", b" "])
def test_bodies_that_stall_or_drip_are_cut_off(port: int, opener: SourceOpener, path: str, more: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n".encode()
    answer, seconds = drip(port, head + HOST + b"\r\n{", more)
    assert answer.startswith(b"HTTP/1.1 408") and b"too slowly" in answer and seconds < 3
    assert not list(opener.directory.iterdir())


@pytest.mark.parametrize("path", ["/api/streams", "/api/budget", "/api/uploads"])
@pytest.mark.parametrize("announced", [True, False])
def test_bodies_that_are_too_large_are_cut_off(port: int, opener: SourceOpener, path: str, announced: bool) -> None:
    """After a little more than the limit, however much was to come."""
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50_000_000:
            sent += 65536
            yield b" " * 65536

    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    method = "PUT" if path.endswith("budget") else "POST"
    headers: dict[str, Any] = {"Content-Length": "50000000"} if announced else {}
    headers |= {"Content-Type": "application/json", "Host": "localhost"}
    try:
        client.request(method, path, pieces(), headers, encode_chunked=not announced)
    except OSError:
        pass  # it hung up while we sent
    else:
        pytest.fail("all was taken")
    assert sent < 10_000_000 and not list(opener.directory.iterdir())


def test_small_bodies_say_what_is_wrong(server: Server) -> None:
    answer = server.client.post("/api/streams", content=b" " * 70_000, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "64 KiB" in answer.json()["error"]
    for name in ("nan", "-1", "2", "inf", "x"):
        assert server.client.get(f"/api/streams/a/frame.jpg?show={name}").status_code == 422
    for budget in ("nan%", "inf GMACs", "1e999ms", ""):
        answer = server.client.put("/api/budget", json={"budget": budget})
        assert answer.status_code == 400, budget
    for path, name in (("streams", "source"), ("budget", "budget")):
        text = json.dumps({name: "\ud800"}).encode()  # what no answer could hold
        answer = server.client.request("PUT" if name == "budget" else "POST", f"/api/{path}", content=text)
        assert answer.status_code == 422 and answer.json()["error"]


def growing(path: Path, *sizes: tuple[int, int]) -> Path:
    """An AVI of JPEGs of these sizes, whose header knows the first one alone."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=25)
        (stream.width, stream.height), stream.pix_fmt = sizes[0], "yuvj420p"
        for i, (width, height) in enumerate(sizes):
            packet = av.Packet(cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))[1].tobytes())
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, 25), stream
            container.mux(packet)
    return path


def test_frames_that_outgrow_their_file_are_not_decoded(tmp_path: Path) -> None:
    with sources._open_file(growing(tmp_path / "a.avi", (64, 48), (640, 480), (64, 48)), "a", 100 * 100) as source:
        assert [frame.image.shape for frame in source] == [(48, 64, 3)] * 2 and source.skipped == 1


def test_files_share_the_memory(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(sources, "_GRANT", 64 * 64)
    data = growing(tmp_path / "a.avi", (320, 240), (64, 48)).read_bytes()

    def upload() -> Any:
        return server.client.post("/api/uploads?name=a.avi", content=data)

    first, second = upload(), upload()
    assert first.status_code == 201 and second.status_code == 400 and "too large" in second.json()["error"]
    assert len(list(server.opener.directory.iterdir())) == 1
    server.client.delete("/api/streams/a.avi")
    assert upload().status_code == 201
    assert MAX_PIXELS <= 8192 * 8192


def test_a_full_disk_is_told(server: Server, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    data = clip.read_bytes()
    monkeypatch.setattr(Path, "open", full)
    answer = server.client.post("/api/uploads?name=a.mp4", content=data)
    assert answer.status_code == 400 and "a.mp4 cannot be stored: No space left" in answer.json()["error"]
