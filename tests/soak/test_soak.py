"""Six cameras for a while, and all that goes wrong in a year: nothing grows, no event is lost, all clips play.

The long version, with its figures:

    EVENTFUL_SOAK=1800 python -m pytest -n 0 -s tests/soak
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from brokers import KEEP, Broker, Subscriber, wait
from running import ENVIRONMENT, ROOT
from servers import Server, why_not

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video.writer import VideoWriter

pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'eventful_det[cameras]')")

SECONDS = float(os.environ.get("EVENTFUL_SOAK", "20"))
LONG = 600.0  # seconds from which on memory is judged
SLOPE = 1.0  # megabytes in 10 minutes that memory may grow
DISK = 6  # megabytes of the disk for clips
SIZES = ((192, 128, 25), (128, 192, 10), (256, 144, 15), (160, 160, 5), (320, 180, 12))  # width, height, rate
SECRET = "a secret of a few words"


def draw(path: Path, index: int, width: int, height: int, rate: int) -> Path:
    """Eight seconds of a scene."""
    options = SceneOptions(width=width, height=height, frames=8 * rate, cut_fraction=0)
    with VideoWriter(path, fps=rate) as writer:
        for frame in render_video(options, index=index):
            writer.write(frame.image)
    return path


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of a few megabytes in place of a folder, where we may have one; whether it is there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def receiver() -> Iterator[tuple[str, Counter[str]]]:
    """A web server that fails now and then, and how often it took each event."""
    took: Counter[str] = Counter()
    numbers = itertools.count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fails = next(numbers) % 50 == 0
            self.send_response(503 if fails else 204)
            self.end_headers()
            if not fails:
                took[json.loads(body)["id"]] += 1

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", took
        server.shutdown()
        thread.join()


class Collector(threading.Thread):
    """Copies the ids of the journal, and where each event ends in it, before its oldest files go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.ids, self.ends, self.kinds = folder, list[str](), list[int](), Counter[str]()
        self._stopped, self._at = threading.Event(), 0

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            self.read()

    def read(self) -> None:
        for path in sorted(self.folder.glob("[0-9]*.jsonl")):
            start = int(path.stem)
            data = path.read_bytes()
            for line in data[max(0, self._at - start) :].splitlines(keepends=True):
                if line.endswith(b"\n"):
                    event = json.loads(line)
                    self.ids.append(event["id"])
                    self.kinds[event["kind"]] += 1
                    self._at = max(self._at, start) + len(line)
                    self.ends.append(self._at)

    def close(self) -> None:
        self._stopped.set()
        self.join()
        self.read()

    def delivered(self, sink: str) -> set[str]:
        """Events that a sink has told of, as it believes; the others would come after the next start."""
        offset = int((self.folder / f"{sink}.offset").read_text())
        return {name for name, end in zip(self.ids, self.ends, strict=True) if end <= offset}


def view(port: int, stop: threading.Event, seen: list[int]) -> None:
    """A page that watches, and reads slowly."""
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}/api/live", max_size=None) as socket_:
        while not stop.is_set():
            state = json.loads(socket_.recv())
            for _ in range(state["frames"]):
                socket_.recv()
                seen[0] += 1
            time.sleep(0.1)
            socket_.send("drawn")


def measure(pid: int) -> tuple[float, int, int]:
    """Megabytes, threads and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    threads, files = (len(os.listdir(f"/proc/{pid}/{kind}")) for kind in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threads, files


def yaml_of(films: list[Path], camera: str, broker: int, hook: str, disk: Path, turn: int) -> str:
    """The file, which changes a little with every turn."""
    lines = ["cameras:"]
    for i, film in enumerate(films):
        mask = f"[[[0, 0], [0.{2 + turn % 3}, 0], [0.3, 1], [0, 1]]]" if i < 3 else "[]"
        lines.append(f"  cam{i}: {{source: {film}, fps: {2 + i}, masks: {mask}, gone: 1, stay: 2, score: 0.3,")
        lines.append("    zones: {left: {polygon: [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}},")
        lines.append("    lines: {middle: {start: [0.5, 0], end: [0.5, 1]}}}")
    lines.append(f"  dying: {{source: '{camera}', fps: 5, priority: {1 + turn % 2}}}")
    lines += [f"folder: {disk}", "journal: 2", "clips: {before: 1, after: 2, megabytes: 1000}"]
    lines += [f"mqtt: {{host: 127.0.0.1, port: {broker}}}", f"webhook: {{url: '{hook}', secret: {SECRET}}}"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(why_not("http") is not None, reason="needs Linux's /proc")
def test_soak(tmp_path: Path) -> None:
    films = [draw(tmp_path / f"film{i}.mp4", i, *size) for i, size in enumerate(SIZES)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    broker, camera = Broker(tmp_path, KEEP.format(folder=tmp_path)), Server("http")
    broker.start()
    subscriber = Subscriber(broker.port, "eventful/+/event")
    path, disk = tmp_path / "cameras.yaml", tmp_path / "disk"
    with small_disk(disk) as mounted, receiver() as (hook, took), contextlib.ExitStack() as stack:
        stack.callback(broker.kill)
        stack.callback(camera.kill)
        path.write_text(yaml_of(films, camera.url, broker.port, hook, disk, 0))
        options = ["weights=vitdet_tiny_synthetic", "device=cpu", "short_side=96", f"port={port}", "log=json"]
        log = stack.enter_context((tmp_path / "log").open("w"))
        process = subprocess.Popen(
            [sys.executable, "tools/serve.py", str(path), *options], cwd=ROOT, env=ENVIRONMENT, stderr=log
        )
        stack.callback(process.kill)

        def health() -> dict[str, Any]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
                    return dict(json.load(answer))
            except OSError:
                return {}

        wait(lambda: health().get("online") == 6, 600)
        collector, stop, seen = Collector(disk / "events"), threading.Event(), [0]
        collector.start()
        viewer = threading.Thread(target=view, args=(port, stop, seen))
        viewer.start()
        began, samples = time.monotonic(), []
        period = min(60.0, SECONDS / 4)
        for turn in itertools.count(1):
            left = began + SECONDS - time.monotonic()
            if left <= 0:
                break
            path.write_text(yaml_of(films, camera.url, broker.port, hook, disk, turn))
            process.send_signal(signal.SIGHUP)
            ailing = (broker, camera)[turn % 2]
            ailing.kill()
            time.sleep(min(10.0, period / 3))
            ailing.start()
            time.sleep(max(0.0, min(left, 2 * period / 3)))
            samples.append((time.monotonic() - began, *measure(process.pid)))
            assert process.poll() is None and health()["status"] == "ok"
        wait(lambda: health()["online"] == 6 and all(health()["sinks"].values()), 120)
        stop.set()
        viewer.join()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        collector.close()
        text = (tmp_path / "log").read_text()
        clips = sorted(disk.glob("clips/*/*.mp4"))
        frames = [play(clip) for clip in clips]
        full = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) / 1e6
        sent, told = set(collector.ids), {sink: collector.delivered(sink) for sink in ("webhook", "mqtt")}
        time.sleep(2)  # the broker hands on what it has
        heard = Counter(json.loads(payload)["id"] for _, payload, _ in subscriber.messages)
        subscriber.close()
    times, memory, threads, files = np.array(samples).T
    late = times > SECONDS / 3
    slope = float(np.polyfit(times[late], memory[late], 1)[0] * 600) if late.sum() > 1 else 0.0
    lost = len(told["webhook"] - set(took)), len(told["mqtt"] - set(heard))
    print(
        f"\n{SECONDS:g} s, {len(sent)} events {dict(collector.kinds)}; webhook and mqtt: lost {lost}, doubled "
        f"{(doubled(took), doubled(heard))}, left over {tuple(len(sent - one) for one in told.values())}\n"
        f"{len(clips)} clips of {sum(frames)} frames on {full:.1f} of {DISK} MB; {seen[0]} frames viewed; "
        f"memory {memory[late].min():.0f} to {memory.max():.0f} MB, slope {slope:+.2f} MB per 10 minutes; "
        f"threads {threads.min():.0f} to {threads.max():.0f}; files {files.min():.0f} to {files.max():.0f}"
    )
    assert len(collector.ids) == len(sent) > SECONDS / 3 and {"enter", "leave", "count", "offline"} <= set(
        collector.kinds
    )
    assert told["webhook"] <= set(took) <= sent, "no event is lost"
    assert told["mqtt"] <= set(heard) <= sent or SECONDS < LONG, "nor on its way through the broker"
    assert doubled(took) <= 2 and doubled(heard) <= len(samples) * 2
    assert clips and all(frames), "all clips play"
    assert not mounted or SECONDS < LONG or full > 0.7 * DISK, "the disk was full"
    assert seen[0] > SECONDS
    assert "Traceback" not in text and '"level": "error"' not in text, text[-3000:]
    for values in (threads, files):  # each decoder has some, and one or two are just being opened
        halves = np.array_split(values, 2)
        assert abs(np.median(halves[1]) - np.median(halves[0])) <= 8, "threads and files stay"
    assert slope < SLOPE or SECONDS < LONG, "memory stays"


def play(clip: Path) -> int:
    """How many frames of a clip can be decoded."""
    with av.open(str(clip)) as container:
        return sum(1 for _ in container.decode(video=0))


def doubled(ids: Counter[str]) -> int:
    """Events that came more than once."""
    return sum(count > 1 for count in ids.values())
