"""Where events go: a broker, a web address. Each has a thread of its own, which reads the journal at its own pace."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import sys
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

from eventful_det.cameras.config import Camera, Mqtt, Webhook
from eventful_det.cameras.journal import Bookmark, Journal
from eventful_det.files import JsonObject

_PAUSES = (1.0, 60.0)  # seconds between two attempts: at first, and at most
_PATIENCE = 10.0  # seconds for a web server to answer
_IDLE = 1.0  # seconds after which the journal is looked at again
_LOG = logging.getLogger(__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: urllib would ask there by GET, without the event."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere."""


_WEB = urllib.request.build_opener(_NoRedirect)


class Refused(Exception):
    """An event that will never be taken."""


class Sink(ABC):
    """Delivers the events of a journal, one after the other, each until it was taken.

    Attributes:
        name: of the sink.
        delivered, refused: events so far.
        error: why the last attempt failed; None = it did not.
    """

    name: str

    def __init__(self, journal: Journal) -> None:
        self._journal, self.bookmark = journal, Bookmark(journal, self.name)
        self.delivered = self.refused = 0
        self.error: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def close(self, seconds: float = 2.0) -> None:
        """Deliver what is left, if that takes no longer than so many seconds; the rest comes after the next start."""
        deadline = time.monotonic() + seconds
        while self.bookmark.behind and self.error is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._stopped.set()
        self._thread.join(seconds)  # one that waits for an answer tells the same event again another time

    def configure(self, cameras: Mapping[str, Camera]) -> None:
        """Take note of which cameras there are."""
        return

    @abstractmethod
    def _deliver(self, line: bytes) -> None:
        """Deliver an event, which is JSON.

        Raises:
            Refused: it will never be taken.
            OSError: it was not taken now.
        """

    def _run(self) -> None:
        pause = _PAUSES[0]
        while not self._stopped.is_set():
            try:
                entry = self.bookmark.next()
                if entry is None:
                    self._journal.wait(_IDLE)
                    continue
                try:
                    self._deliver(entry.line)
                except Refused as error:
                    self.refused += 1
                    _LOG.warning("%s: an event was refused: %s", self.name, error)
                else:
                    self.delivered += 1
                self.bookmark.advance(entry)
            except Exception as error:  # whatever is wrong there, it is tried again
                if self._stopped.is_set():
                    return
                if self.error != str(error):
                    _LOG.warning("%s: %s; trying again", self.name, error)
                self.error = str(error)
                self._stopped.wait(pause)
                pause = min(2 * pause, _PAUSES[1])
                continue
            if self.error is not None:
                _LOG.warning("%s: works again", self.name)
            self.error, pause = None, _PAUSES[0]


class WebhookSink(Sink):
    """Posts events as JSON.

    `X-Eventful-Signature` is `sha256=` and the HMAC of `X-Eventful-Timestamp`, a dot and the body.
    """

    name = "webhook"

    def __init__(self, journal: Journal, options: Webhook) -> None:
        super().__init__(journal)
        self._secret, parts = options.secret, urlsplit(options.url)
        login, _, host = parts.netloc.rpartition("@")
        self._url, self._headers = urlunsplit(parts._replace(netloc=host)), {"Content-Type": "application/json"}
        if login:
            self._headers["Authorization"] = f"Basic {base64.b64encode(unquote_to_bytes(login)).decode()}"

    def _deliver(self, line: bytes) -> None:
        stamp = str(int(time.time()))
        headers = self._headers | {
            "X-Eventful-Id": _read(line)["id"],
            "X-Eventful-Timestamp": stamp,
            "X-Eventful-Signature": sign(self._secret, stamp, line),
        }
        request = urllib.request.Request(self._url, line, headers)
        try:
            with _WEB.open(request, timeout=_PATIENCE):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            if 400 <= error.code < 500 and error.code not in (401, 403, 404, 408, 425, 429):
                raise Refused(f"status {error.code}") from error
            raise OSError(f"status {error.code}") from error


def _read(line: bytes) -> JsonObject:
    """An event of the journal.

    Raises:
        Refused: a crash or somebody else left something else there.
    """
    try:
        event: JsonObject = json.loads(line)
        return event | {"id": event["id"], "camera": event["camera"], "kind": event["kind"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("the journal holds something that is no event") from error


def sign(secret: str, stamp: str, body: bytes) -> str:
    """The signature of a body that is posted at a time."""
    return "sha256=" + hmac.new(secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()


class MqttSink(Sink):
    """Publishes events to a broker, QoS 1, and what Home Assistant needs to find the cameras.

    ==================================  ========================================  ========
    PREFIX/status                       online, offline (also by last will)       retained
    PREFIX/CAMERA/status                online, offline                           retained
    PREFIX/CAMERA/event                 an event as JSON
    PREFIX/CAMERA/count                 {"count": 2, "classes": {"car": 2}}       retained
    PREFIX/CAMERA/zones/ZONE/count      the same of a zone                        retained
    ==================================  ========================================  ========
    """

    name = "mqtt"

    def __init__(self, journal: Journal, options: Mqtt) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        super().__init__(journal)
        self._options = options
        self._lock = threading.Lock()
        self._standing: dict[str, str] = {}  # what is retained: newest payload by topic
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.max_inflight_messages_set(1)  # in order
        self._client.max_queued_messages_set(10_000)  # a broker that takes none must not fill the memory
        if options.user is not None:
            self._client.username_pw_set(options.user, options.password)
        if options.tls:
            self._client.tls_set()
        self._client.will_set(self._topic("status"), "offline", 1, retain=True)
        self._client.reconnect_delay_set(1, int(_PAUSES[1] / 2))
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._why = ""  # there is no connection

    def start(self) -> None:
        """Begin to deliver. A broker that is not there yet is called again."""
        self._client.connect_async(self._options.host, self._options.port, keepalive=20)
        self._client.loop_start()
        super().start()

    def close(self, seconds: float = 2.0) -> None:
        """Deliver what is left if there is time, and say goodbye."""
        super().close(seconds)
        if self._client.is_connected():
            self._client.publish(self._topic("status"), "offline", 1, retain=True).wait_for_publish(1.0)
        self._client.disconnect()
        self._client.loop_stop()

    def configure(self, cameras: Mapping[str, Camera]) -> None:
        """Announce the cameras; those that are gone are withdrawn."""
        told = self._announcements(cameras)
        with self._lock:
            old = {topic for topic in self._standing if topic.endswith("/config")}
            gone = dict.fromkeys(old - set(told), "")
            self._standing = {t: payload for t, payload in self._standing.items() if payload} | told | gone
        if self._client.is_connected():
            self._publish({**told, **gone})

    def _deliver(self, line: bytes) -> None:
        event = _read(line)
        camera = event["camera"]
        topics = {self._topic(camera, "event"): (line.decode(), False)}
        if event["kind"] in ("online", "offline"):
            topics[self._topic(camera, "status")] = event["kind"], True
        if event["kind"] == "count":
            place = ("zones", event["zone"]) if "zone" in event else ()
            payload = json.dumps({"count": event["count"], "classes": event["classes"]})
            topics[self._topic(camera, *place, "count")] = payload, True
        for topic, (payload, retain) in topics.items():
            if retain:
                with self._lock:
                    self._standing[topic] = payload
            self._publish_surely(topic, payload, retain)

    def _publish_surely(self, topic: str, payload: str, retain: bool) -> None:
        """Publish and wait until the broker has it. Where the connection breaks, paho sends it again on the next."""
        if not self._client.is_connected():
            raise OSError(f"there is no connection to {self._options.host}:{self._options.port}{self._why}")
        message = self._client.publish(topic, payload, 1, retain)
        while not message.is_published():
            if self._stopped.is_set():
                raise OSError("stopped before the broker answered")
            time.sleep(0.002 if self._client.is_connected() else 0.2)

    def _on_connect_fail(self, *_: Any) -> None:
        """Paho calls it while it handles the exception."""
        error = sys.exception()
        self._why = f": {getattr(error, 'strerror', None) or error}" if error else ""

    def _on_connect(self, _: Any, __: Any, ___: Any, reason: Any, *____: Any) -> None:
        """Say again what is retained: the broker may have forgotten it."""
        if reason.is_failure:
            self._why = f": {reason}"
            return
        with self._lock:
            standing = dict(self._standing)
        self._publish({self._topic("status"): "online", **standing})

    def _publish(self, payloads: Mapping[str, str]) -> None:
        for topic, payload in payloads.items():
            self._client.publish(topic, payload, 1, retain=True)

    def _topic(self, *parts: str) -> str:
        return "/".join((self._options.prefix, *parts))

    def _announcements(self, cameras: Mapping[str, Camera]) -> dict[str, str]:
        """Payloads of Home Assistant's discovery by topic."""
        found: dict[str, str] = {}
        if self._options.discovery is None:
            return found
        for name, camera in cameras.items():
            shared = {
                "device": {"identifiers": [f"{self._options.prefix}_{name}"], "name": name, "manufacturer": "eventful"},
                "availability": [{"topic": self._topic("status")}, {"topic": self._topic(name, "status")}],
                "availability_mode": "all",
                "qos": 1,
            }
            for place in (None, *camera.zones):
                parts = () if place is None else ("zones", place)
                topic = self._topic(name, *parts, "count")
                key = "_".join((self._options.prefix.replace("/", "_"), name, *parts))
                label = "objects" if place is None else place
                count = {"name": label, "state_topic": topic, "value_template": "{{ value_json.count }}"}
                count |= {"json_attributes_topic": topic, "state_class": "measurement"}
                occupied = {"name": f"{label} occupancy", "state_topic": topic, "device_class": "occupancy"}
                occupied |= {"value_template": "{{ 'ON' if value_json.count > 0 else 'OFF' }}"}
                for kind, entity in (("sensor", count), ("binary_sensor", occupied)):
                    identity = {"unique_id": f"{key}_{kind}", "object_id": f"{key}_{kind}"}
                    found[f"{self._options.discovery}/{kind}/{key}/config"] = json.dumps(
                        {**entity, **identity, **shared}
                    )
        return found
