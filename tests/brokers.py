"""A real MQTT broker for tests, which can be killed and started again. Skips where there is no mosquitto."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mqtt = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
KEEP = "persistence true\nautosave_on_changes true\nautosave_interval 1\npersistence_location {folder}/\n"
MOSQUITTO = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


def wait(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What a condition gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


class Broker:
    """Mosquitto on a port of its own; as a rule without memory of what was retained."""

    def __init__(self, folder: Path, more: str = "persistence false\n") -> None:
        if MOSQUITTO is None:
            pytest.skip("there is no mosquitto here")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        # Started by root it would become the user mosquitto, who may not write here: then it keeps nothing.
        self._config.write_text(f"user root\nlistener {self.port} 127.0.0.1\nallow_anonymous true\n{more}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [str(MOSQUITTO), "-c", str(self._config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait(answers)

    def kill(self) -> None:
        """Kill it, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Subscriber:
    """Gets all that is published, in order; goes on when the broker is back."""

    def __init__(self, port: int, topic: str = "#") -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self._subscribed = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="test", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, 1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _, __, m: self.messages.append((m.topic, m.payload, bool(m.retain)))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(20)

    def events(self, camera: str) -> list[dict[str, Any]]:
        """Events of a camera as they came."""
        return [json.loads(payload) for topic, payload, _ in self.messages if topic == f"eventful/{camera}/event"]

    def newest(self, topic: str) -> str | None:
        """The newest payload of a topic."""
        return next((payload.decode() for name, payload, _ in reversed(self.messages) if name == topic), None)

    def wait_for_connection(self) -> None:
        """Wait until it is subscribed again."""
        self._subscribed.clear()
        assert self._subscribed.wait(20)

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()
