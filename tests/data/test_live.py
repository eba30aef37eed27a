"""Live sources against real servers on this machine: never late, never hanging, and back when the server is."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from servers import FPS, HEIGHT, WIDTH, Server, age_of, jpeg_camera, take_picture, why_not

from eventful_det.data.background import BackgroundReader
from eventful_det.data.video import VideoFrame, open_source
from eventful_det.data.video.decoder import Decoder
from eventful_det.data.video.live import CapturedFrame, LiveClock, LiveSource
from eventful_det.errors import UserError
from eventful_det.secrets import mask_secrets


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    server = Server(request.param)
    yield server
    server.kill()


def read_slowly(frames: Iterator[VideoFrame], count: int) -> list[VideoFrame]:
    """Frames, read more slowly than they come; checks that each is of the present."""
    seen = []
    for frame in itertools.islice(frames, count):
        assert frame.age is not None and -0.1 < age_of(frame.image) - frame.age < 0.6
        assert age_of(frame.image) < 1.0
        seen.append(frame)
        time.sleep(0.2)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("server", ["http", "ffmpeg", "rtsp", "gstreamer"], indirect=True)
def test_present_and_reconnection(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with open_source(server.url, reconnect=20, silence=2) as source:
        assert source.live and source.frames is None and source.fps == pytest.approx(FPS)
        frames = iter(source)
        next(frames)  # FFmpeg held it back while it looked at the stream
        time.sleep(0.3)
        before = read_slowly(frames, 6)
        assert source.dropped >= 6 * 0.2 * FPS / 2
        server.kill()
        last = next(frames)
        server.start()
        back = next(frames)
        while not back.resumed:
            last, back = back, next(frames)
        time.sleep(0.3)
        after = read_slowly(frames, 4)
    assert source.reconnects == 1 and not any(frame.resumed for frame in before + after)
    stamps = [frame.timestamp for frame in (*before, last, back, *after)]
    assert stamps == sorted(stamps)  # type: ignore[type-var]
    assert back.timestamp - last.timestamp > 0.2  # type: ignore[operator]
    assert "calling again for 20 s" in caplog.messages[0] and "is back after" in caplog.messages[-1]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["http"], indirect=True)
def test_silence_is_not_waited_out(server: Server) -> None:
    with open_source(server.url, reconnect=0.5, silence=1) as source:
        frames = iter(source)
        next(frames)
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(UserError, match="broke off: timed out; it did not come back within 0.5 s"):
            list(frames)
        assert 0.9 < time.monotonic() - began < 6
    server.signal(signal.SIGCONT)
    with open_source(server.url, silence=30) as source:
        frames = iter(source)
        next(frames)
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 3  # closing does not wait either, and the thread ends when it can
    server.signal(signal.SIGCONT)
    deadline = time.monotonic() + 5
    while any(thread.name == "background-reader" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def serve_once(*answers: bytes) -> Iterator[int]:
    """A port that answers a connection with each of these and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def broadcast(path: Path, frames: int) -> bytes:
    """Some frames of a camera as MPEG-TS."""
    return encode(path, frames, "mpegts").read_bytes()


def encode(path: Path, frames: int, container: str, **options: str) -> Path:
    with av.open(str(path), "w", format=container, options=options) as output:
        stream: Any = output.add_stream("libx264", rate=FPS, options={"g": "5", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            image = np.frombuffer(take_picture(i / 1e3), np.uint8).reshape(HEIGHT, WIDTH)
            frame = av.VideoFrame.from_ndarray(image, format="gray")
            frame.pts = i
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def number_of(frame: VideoFrame) -> int:
    """Which of `encode`'s frames it is."""
    bits = frame.image[HEIGHT // 2, 8::16, 0] > 127
    return sum(1 << i for i, bit in enumerate(bits.tolist()) if bit)


def test_stream_that_ends_is_over(tmp_path: Path) -> None:
    data = broadcast(tmp_path / "a", 40)
    with serve_once(data, data) as port, open_source(f"tcp://127.0.0.1:{port}", reconnect=1, silence=1) as source:
        frames = list(source)
    assert source.live and source.reconnects == 1
    assert sum(frame.resumed for frame in frames) == 1 and number_of(frames[-1]) == 39
    with serve_once(data) as port, open_source(f"tcp://127.0.0.1:{port}", reconnect=0) as source:
        assert number_of(list(source)[-1]) == 39


def test_nothing_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for scheme, reason in (("http", "timed out"), ("rtsp", "")):
            url = f"{scheme}://admin:secret@127.0.0.1:{mute.getsockname()[1]}/camera"
            with pytest.raises(UserError, match=rf"cannot open .*://admin:\*\*\*@127.* as a video: {reason}"):
                open_source(url, silence=0.5)
    assert mask_secrets("rtsp://host:554/a:b@c") == "rtsp://host:554/a:b@c"
    assert mask_secrets("C:b@c.mp4") == "C:b@c.mp4"
    with pytest.raises(UserError, match=r"cannot open rtsp://\[user:\*\*\*@camera/stream as a video"):
        open_source("rtsp://[user:secret@camera/stream", silence=0.5)


def test_a_stream_that_cannot_be_decoded_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(str(encode(tmp_path / "clip.ts", 5, "mpegts")), silence=0.0)
    monkeypatch.setattr(decoder, "_decode", lambda *_: [])
    with pytest.raises(UserError, match="sends nothing that can be decoded"):
        list(decoder.read_live(lambda *_: None))
    decoder.close()


class Files(http.server.SimpleHTTPRequestHandler):
    """Hands out a piece of a file and hangs up, as overloaded servers do."""

    piece: int
    ranges: list[str]

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data, asked = path.read_bytes(), self.headers["Range"] or "bytes=0-"
        self.ranges.append(asked)
        begin = int(asked[6:].partition("-")[0])
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : begin + self.piece])
        return None


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    Files.ranges, Files.piece = [], 1_000_000
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", Files.ranges
        httpd.shutdown()


def test_file_over_http_is_read_without_loss(tmp_path: Path, files: tuple[str, list[str]]) -> None:
    url, ranges = files
    Files.piece = 2_000
    encode(tmp_path / "a.mp4", 100, "mp4", movflags="faststart")
    with open_source(f"{url}/a.mp4", ahead=2) as source:
        assert not source.live and [number_of(frame) for frame in source] == list(range(100))
    assert len(ranges) >= 3
    with pytest.raises(UserError, match="Not Found"):
        open_source(f"{url}/b.mp4")


def test_segments_are_read_in_order(tmp_path: Path, files: tuple[str, list[str]]) -> None:
    encode(tmp_path / "live.m3u8", 60, "hls", hls_time="1", hls_flags="omit_endlist")
    with open_source(f"{files[0]}/live.m3u8", silence=1) as source:
        seen = [number_of(frame) for frame in itertools.islice(source, 20)]
    assert not source.live and seen == list(range(seen[0], seen[0] + 20))


class Plug:
    """Stands in for OpenCV's webcams: one that sees 5 pictures and is unplugged, then another."""

    opened = 0

    def __init__(self, index: int) -> None:
        self.left = 5
        Plug.opened += 1

    def isOpened(self) -> bool:
        return Plug.opened in (1, 4)

    def get(self, _: int) -> float:
        return 30.0

    def set(self, *_: int) -> bool:
        return True

    def read(self) -> tuple[bool, Any]:
        time.sleep(0.02)
        self.left -= 1
        return self.left >= 0, np.full((4, 6, 3), (0, 0, 50 * Plug.opened), np.uint8)

    def release(self) -> None: ...


def test_webcam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Plug)
    with open_source("0", reconnect=3) as source:
        assert source.live and (source.name, source.fps) == ("webcam 0", 30.0)
        frames = []
        for frame in itertools.islice(source, 8):
            assert frame.age is not None and frame.age < 0.5
            frames.append(frame)
        assert [f.resumed for f in frames] == [False] * 5 + [True] + [False] * 2
    assert tuple(frames[0].image[0, 0]) == (50, 0, 0) and tuple(frames[7].image[0, 0]) == (200, 0, 0)
    assert source.reconnects == 1


class Line:
    """A connection that delivers numbered shots at once, or breaks."""

    fps = None

    def __init__(self, shots: int, error: str | None = None) -> None:
        self.shots_left, self.error, self.closed = shots, error, False

    def read_live(self, _: Any) -> Iterator[CapturedFrame | None]:
        for i in range(self.shots_left):
            yield None if i % 2 else CapturedFrame(time.monotonic(), partial(np.full, (1, 1, 3), i, np.uint8))
        if self.error is not None:
            raise UserError(self.error)

    def close(self) -> None:
        self.closed = True


def test_calls_are_spaced_out_and_connections_closed(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[Line] = []
    calls: list[float] = []

    def connect() -> Line:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise UserError("nobody answers")
        lines.append(Line(0, "says nothing"))
        return lines[-1]

    first = Line(7, "broke off")
    source = LiveSource("camera", first, connect, reconnect=3)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="says nothing; .* within 3 s"):
        list(source)
    assert source.dropped >= 3 and first.closed and lines and all(line.closed for line in lines)
    gaps = np.diff(calls)
    assert len(calls) <= 5 and np.all(gaps[1:-1] > 1.5 * gaps[:-2])
    told = [message.split("; calling")[0] for message in caplog.messages]
    assert told == ["broke off", "nobody answers", "says nothing"], "each reason once"


def test_reasons_that_differ_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    source = LiveSource("camera", Line(0, "broke off"), lambda: Line(0, ""))
    with caplog.at_level(logging.WARNING):
        for port in range(100):
            source._log_once(f"refused from port {port}")
    assert len(caplog.messages) == 20
    source.close()


def simulate(decode: float, jumps: dict[int, float], seconds: float = 60, rate: float = 25) -> tuple[list[float], int]:
    """Ages of the frames of a camera, a key frame among 25, read by a decoder of some speed.

    Its stamps say 25 frames/s, however many come. Before some packets the stream pauses, or (negative) its stamps jump
    back.
    """
    time_now, taken, stamp, ages, decoded = 0.0, 0.0, 0.0, [], 0
    clock = LiveClock(lambda: time_now)
    for i in range(int(seconds * rate)):
        taken += 1 / rate + max(0.0, jumps.get(i, 0.0))
        stamp += 0.04 + min(0.0, jumps.get(i, 0.0))
        asked, time_now = time_now, max(time_now + 1e-4, taken)
        captured = clock.admit(stamp, i % 25 == 0, asked)
        if captured is not None:
            time_now += decode
            decoded += 1
            ages.append(time_now - taken)
            assert captured - taken < 0.05 or jumps
    return ages, decoded


def test_clock_keeps_a_slow_decoder_in_the_present() -> None:
    ages, decoded = simulate(0.01, {})
    assert max(ages) < 0.05 and decoded == 1500
    ages, decoded = simulate(0.06, {})  # half as fast again would do
    assert max(ages) < 1.2 and decoded > 600
    for jump in (100.0, -100.0, -3.0, 3.0):
        ages, decoded = simulate(0.01, {500: jump})
        assert max(ages) < 1.2 and decoded > 1500 - 4 * 25


@pytest.mark.parametrize("rate", [1, 5, 10, 15, 24.9, 30, 60])
def test_clock_does_not_believe_made_up_stamps(rate: float) -> None:
    ages, decoded = simulate(0.01, {}, rate=rate)
    assert max(ages) < 0.05 and decoded == int(60 * rate)


def test_reader_without_loss() -> None:
    pulled: list[int] = []
    finished = threading.Event()

    def count() -> Iterator[int]:
        for i in range(100):
            pulled.append(i)
            yield i
        raise UserError("broke off")

    reader = BackgroundReader(count(), 3, finish=finished.set)
    time.sleep(0.1)
    assert len(pulled) == 4  # three wait, one more is in the thread's hands
    assert list(itertools.islice(reader, 100)) == list(range(100)) and reader.dropped == 0
    with pytest.raises(UserError, match="broke off"):
        next(reader)
    assert finished.is_set()
    reader = BackgroundReader(iter(range(100)), 3)
    next(reader)
    reader.close()
    assert not reader._thread.is_alive() and next(reader, None) is None


def test_reader_of_the_newest() -> None:
    go = threading.Event()

    def count() -> Iterator[int]:
        yield from range(100)
        go.set()
        raise UserError("broke off")

    newest = BackgroundReader(count(), newest=True)
    go.wait(5)
    assert next(newest) == 99 and newest.dropped == 99
    with pytest.raises(UserError, match="broke off"):
        next(newest)


def test_a_reader_that_nobody_has_any_more_ends() -> None:
    finished, taken = threading.Event(), []

    def camera() -> Iterator[int]:
        for i in itertools.count():
            time.sleep(0.01)
            taken.append(i)
            yield i

    for newest in (False, True):
        reader = BackgroundReader(camera(), newest=newest, finish=finished.set)
        next(reader)
        del reader
        assert finished.wait(2)
        finished.clear()


def leftovers() -> tuple[int, int]:
    """Threads of ours, and open descriptors."""
    threads = sum(thread.name == "background-reader" for thread in threading.enumerate())
    return threads, len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, leftovers()
        time.sleep(0.05)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_abandoned_sources_leave_nothing() -> None:
    """Neither a thread nor a descriptor, whether the source or its frames are forgotten first."""
    with jpeg_camera(rate=50, count=500) as (url, _):
        before = leftovers()
        for _ in range(2):
            open_source(url)
            next(iter(open_source(url)))
        source = open_source(url)
        for _frame in source:
            break
        until(lambda: leftovers()[0] == before[0])  # who stops reading ends the thread, the source being there or not
        source.close()
        del source
        until(lambda: leftovers() <= before)


def test_a_lost_source_that_nobody_reads_is_not_called_again() -> None:
    before = leftovers()[0]

    def abandon() -> None:
        source = LiveSource("camera", Line(1, "broke off"), lambda: Line(0, "says nothing"), reconnect=60)
        frames = iter(source)
        next(frames)
        until(lambda: source.lost)

    abandon()
    until(lambda: leftovers()[0] == before, 3)


def test_a_source_has_one_reader() -> None:
    source = open_source([np.zeros((4, 6, 3), np.uint8)] * 4)
    frames = iter(source)
    next(frames)
    with pytest.raises(UserError, match="arrays is being read already; open it once for each stream"):
        iter(source)
    del frames
    assert len(list(source)) == 4


def test_cameras_whose_stamps_are_made_up() -> None:
    """FFmpeg gives JPEGs over HTTP 25 stamps a second, however many come."""
    with jpeg_camera(rate=10, count=40) as (url, sent), open_source(url, reconnect=0, silence=2) as source:
        seen = []
        with contextlib.suppress(UserError):  # "broke off"
            seen.extend((frame.timestamp, frame.age, age_of(frame.image)) for frame in source)
    stamps, ages, true_ages = np.array(seen, float).T
    assert len(sent) == 40 and len(seen) >= 37 and np.diff(stamps).max() < 0.35
    assert ages.max() < 0.3 and np.median(true_ages) < 0.3
