"""Running the web application in a test. Importing this skips the test where its libraries are missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule
from eventful_det.models.detector import Detector
from eventful_det.runtime.pool import StreamPool

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'eventful_det[serve]')")
pytest.importorskip("httpx2", reason="httpx2, which FastAPI's TestClient needs, is not installed")

from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession

from eventful_det.serving.app import create_app
from eventful_det.serving.engine import Engine
from eventful_det.serving.intake import Intake


@dataclass
class Server:
    """A running application."""

    engine: Engine
    intake: Intake
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
    **options: Any,
) -> Iterator[Server]:
    """The application while it runs."""
    engine, intake = (
        Engine(StreamPool(detector, rule=rule, timing=True), max_streams=max_streams, track=track),
        Intake(**options),
    )
    app = create_app(engine, intake, token=token, hosts=("watch.example",))
    with TestClient(app, base_url="http://localhost") as client:
        yield Server(engine, intake, client)
