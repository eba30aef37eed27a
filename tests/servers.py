"""Cameras for tests: local servers whose pictures show when they were taken.

Run as a program, ``python servers.py KIND PORT`` serves until it is killed. Only the standard library is imported at
the top, as GStreamer's bindings may live in another Python than ours.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

BITS, CELL, HEIGHT, FPS = 20, 16, 64, 25
WIDTH = BITS * CELL


def take_picture(at: float) -> bytes:
    """A grey picture, `HEIGHT * WIDTH` bytes, whose stripes spell a time on the monotonic clock in milliseconds."""
    bits = int(at * 1e3) % 2**BITS
    return b"".join((b"\xe0" if bits >> i & 1 else b"\x20") * CELL for i in range(BITS)) * HEIGHT


def age_of(image: Any) -> float:
    """Seconds since the picture `(h, w, 3)` was taken."""
    bits = image[HEIGHT // 2, CELL // 2 :: CELL, 0] > 127
    taken = sum(1 << i for i, bit in enumerate(bits.tolist()) if bit)
    return (int(time.monotonic() * 1e3) - taken) % 2**BITS / 1e3


def pictures() -> Iterator[bytes]:
    """Pictures as they are taken."""
    began = time.monotonic()
    for i in itertools.count():
        time.sleep(max(0.0, began + i / FPS - time.monotonic()))
        yield take_picture(began + i / FPS)


def serve_http(port: int) -> None:
    """MPEG-TS over HTTP, by Python and PyAV; every connection is a broadcast of its own."""
    import av
    import numpy as np

    class Camera(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.end_headers()
            with contextlib.suppress(OSError), av.open(self.wfile, "w", format="mpegts") as container:
                options = {"preset": "ultrafast", "tune": "zerolatency", "g": str(FPS)}
                stream: Any = container.add_stream("libx264", rate=FPS, options=options)
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                for i, picture in enumerate(pictures()):
                    image = np.frombuffer(picture, np.uint8).reshape(HEIGHT, WIDTH)
                    frame = av.VideoFrame.from_ndarray(image, format="gray")
                    frame.pts = i
                    container.mux(stream.encode(frame))

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Camera).serve_forever()


def serve_ffmpeg(port: int) -> None:
    """The same by FFmpeg's program; it serves one connection and ends with it."""
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-video_size", f"{WIDTH}x{HEIGHT}", "-framerate", str(FPS), "-i", "-"]
    code = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-pix_fmt", "yuv420p", "-g", str(FPS)]
    serve = ["-flush_packets", "1", "-f", "mpegts", "-listen", "1", f"http://127.0.0.1:{port}/"]
    command = ["ffmpeg", "-loglevel", "error", "-probesize", "32", *raw, *code, *serve]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        for picture in pictures():
            process.stdin.write(picture)
            process.stdin.flush()


def serve_rtsp(port: int) -> None:
    """H.264 over RTSP, by the `rtsp` package."""
    import numpy as np
    import rtsp

    began = time.monotonic()
    with rtsp.Source(f"rtsp://127.0.0.1:{port}/camera", fps=FPS) as source:
        for i in itertools.count():  # it takes picture i at its time from a list, which has to be longer by then
            time.sleep(max(0.0, began + (i - 5) / FPS - time.monotonic()))
            image = np.frombuffer(take_picture(began + i / FPS), np.uint8).reshape(HEIGHT, WIDTH, 1)
            source.put(image.repeat(3, axis=2))


def serve_gstreamer(port: int) -> None:
    """The same by GStreamer."""
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    caps = f"video/x-raw,format=GRAY8,width={WIDTH},height={HEIGHT},framerate={FPS}/1"
    code = f"videoconvert ! video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={FPS}"
    source = f"appsrc name=camera is-live=true do-timestamp=true format=time caps={caps}"

    def start(_: Any, media: Any) -> None:
        taken = pictures()
        camera = media.get_element().get_by_name("camera")
        camera.connect("need-data", lambda *_: camera.emit("push-buffer", Gst.Buffer.new_wrapped(next(taken))))

    factory = GstRtspServer.RTSPMediaFactory(launch=f"( {source} ! {code} ! rtph264pay name=pay0 )")
    factory.connect("media-configure", start)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=str(port))
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)
    GLib.MainLoop().run()


@contextlib.contextmanager
def jpeg_camera(rate: float, count: int) -> Iterator[tuple[str, list[float]]]:
    """An address with JPEGs over HTTP, which have no time stamps; and when each was sent to whoever connected."""
    import cv2
    import numpy as np

    sent: list[float] = []

    class Camera(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            began = time.monotonic()
            with contextlib.suppress(OSError):
                for i in range(count):
                    time.sleep(max(0.0, began + i / rate - time.monotonic()))
                    image = np.frombuffer(take_picture(time.monotonic()), np.uint8).reshape(HEIGHT, WIDTH)
                    data = cv2.imencode(".jpg", image)[1].tobytes()
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")
                    sent.append(time.monotonic())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/stream.mjpg", sent
        server.shutdown()


class Server:
    """A server in a process of its own, which can be killed, halted and started again on the same port."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"{'http' if kind in ('http', 'ffmpeg') else 'rtsp'}://127.0.0.1:{self.port}/camera"
        self.start()

    def start(self) -> None:
        """Start, and wait until it listens."""
        python = _SYSTEM_PYTHON if self.kind == "gstreamer" else sys.executable
        self._process = subprocess.Popen([python, __file__, self.kind, str(self.port)], start_new_session=True)
        deadline = time.monotonic() + 20
        while not self._listens():
            assert time.monotonic() < deadline and self._process.poll() is None, f"no {self.kind} server"
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its children."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it without a word to its clients."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def _listens(self) -> bool:
        """Found out without a connection, of which some servers have only one."""
        with open("/proc/net/tcp") as table:
            return any(line.split()[1].endswith(f":{self.port:04X}") and line.split()[3] == "0A" for line in table)


_SYSTEM_PYTHON = "/usr/bin/python3"


def why_not(kind: str) -> str | None:
    """The reason for which a server cannot run here, if any."""
    if not os.path.exists("/proc/net/tcp"):
        return "needs Linux's /proc"
    if kind == "ffmpeg" and shutil.which("ffmpeg") is None:
        return "the ffmpeg program is not installed"
    if kind == "rtsp" and find_spec("rtsp") is None:
        return "the rtsp package is not installed"
    if kind == "gstreamer":
        check = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst; Gst.init(None); "
        check += "assert Gst.ElementFactory.find('x264enc') and Gst.ElementFactory.find('rtph264pay')"
        found = shutil.which(_SYSTEM_PYTHON) and subprocess.run([_SYSTEM_PYTHON, "-c", check], capture_output=True)
        return None if found and found.returncode == 0 else "GStreamer with its RTSP server and x264 is not installed"
    return None


def _end_with_parent(parent: int) -> None:
    """A test that is killed takes its servers with it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    globals()[f"serve_{sys.argv[1]}"](int(sys.argv[2]))
