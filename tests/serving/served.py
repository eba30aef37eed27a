"""Running the web application in a test. Importing this skips the test where its libraries are missing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.runtime.pool import StreamPool

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'eventful_det[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("httpx2", reason="httpx2, which FastAPI's TestClient needs, is not installed")

from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession

from eventful_det.serving.app import create_app
from eventful_det.serving.limits import build_server
from eventful_det.serving.runner import PoolRunner
from eventful_det.serving.sources import SourceOpener


@dataclass
class Server:
    """A running application."""

    runner: PoolRunner
    opener: SourceOpener
    client: TestClient

    def state(self) -> dict[str, Any]:
        """What /api/state says."""
        found: dict[str, Any] = self.client.get("/api/state").json()
        return found

    def wait(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        """The state, once a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition(state := self.state()):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state

    def page(self) -> WebSocketTestSession:
        """The connection of a page."""
        return self.client.websocket_connect("ws://localhost/api/live")

    def watch(self, source: str) -> str:
        """Add a stream and wait for its first frame."""
        answer = self.client.post("/api/streams", json={"source": source})
        assert answer.status_code == 201, answer.text
        name: str = answer.json()["name"]
        self.wait(lambda s: any(one["name"] == name and one["frames"] for one in s["streams"]))
        return name


@contextmanager
def serving(
    detector: Detector,
    *,
    rule: AnyRule = DEFAULT_RULE,
    token: str | None = None,
    max_streams: int = 4,
    track: bool = False,
    live: bool = False,
    root_path: str = "",
    **options: Any,
) -> Iterator[Server]:
    """The application while it runs."""
    pool = StreamPool(detector, rule=rule, timing=True, live=live)
    runner, opener = PoolRunner(pool, max_streams=max_streams, track=track), SourceOpener(**options)
    app = create_app(runner, opener, token=token, hosts=("watch.example",), root_path=root_path)
    with TestClient(app, base_url="http://localhost") as client:
        yield Server(runner, opener, client)


@contextmanager
def listening(runner: PoolRunner, opener: SourceOpener, **options: Any) -> Iterator[int]:
    """The port of the application behind a real server."""
    server = build_server(create_app(runner, opener, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
