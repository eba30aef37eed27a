"""Events are delivered at least once, in order, whoever is away meanwhile; and nobody waits for it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from brokers import KEEP, Broker, Subscriber, wait

from eventful_det.cameras.config import Camera, Mqtt, Webhook, Zone
from eventful_det.cameras.events import Event
from eventful_det.cameras.journal import Journal
from eventful_det.cameras.sinks import MqttSink, WebhookSink, sign

CAMERA = Camera(source=0, zones={"drive": Zone(polygon=((0, 0), (1, 0), (1, 1)))})
SECRET = "a secret of a few words"


def happen(journal: Journal, count: int, first: int = 0) -> list[str]:
    """Let things happen; the ids of the events."""
    events = [Event(kind="enter", camera="gate", object=str(first + i), label="car") for i in range(count)]
    for event in events:
        journal.append(event)
    return [event.id for event in events]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "events", 10**6)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.kill()


def test_events_reach_a_broker_and_home_assistant_finds_the_cameras(journal: Journal, broker: Broker) -> None:
    sink = MqttSink(journal, Mqtt(host="127.0.0.1", port=broker.port))
    sink.configure({"gate": CAMERA, "yard": Camera(source=1)})
    subscriber = Subscriber(broker.port)
    sink.start()
    sent = happen(journal, 3)
    journal.append(Event(kind="online", camera="gate"))
    journal.append(Event(kind="count", camera="gate", zone="drive", count=2, classes={"car": 2}))
    wait(lambda: subscriber.newest("eventful/gate/zones/drive/count"))
    assert [event["id"] for event in subscriber.events("gate")][:3] == sent
    assert subscriber.newest("eventful/status") == "online" == subscriber.newest("eventful/gate/status")
    wait(lambda: subscriber.newest("homeassistant/binary_sensor/eventful_yard/config"))
    found = json.loads(subscriber.newest("homeassistant/sensor/eventful_gate_zones_drive/config") or "")
    assert found["state_topic"] == "eventful/gate/zones/drive/count" and found["unique_id"]
    assert found["default_entity_id"] == "sensor.eventful_gate_zones_drive_sensor" and "object_id" not in found, (
        "gone since 2026.4"
    )
    assert {one["topic"] for one in found["availability"]} == {"eventful/status", "eventful/gate/status"}
    sink.configure({"gate": CAMERA})  # the yard is withdrawn
    wait(lambda: subscriber.newest("homeassistant/binary_sensor/eventful_yard/config") == "")
    subscriber.close()
    late = Subscriber(broker.port)  # what is retained is there for who comes later
    wait(lambda: late.newest("eventful/gate/zones/drive/count") == '{"count": 2, "classes": {"car": 2}}')
    assert not late.events("gate"), "events are not retained"
    sink.close()
    wait(lambda: late.newest("eventful/status") == "offline")
    late.close()


@pytest.mark.slow
def test_a_broker_that_is_killed_gets_all_events_when_it_is_back(journal: Journal, broker: Broker) -> None:
    sink = MqttSink(journal, Mqtt(host="127.0.0.1", port=broker.port))
    sink.configure({"gate": CAMERA})
    subscriber = Subscriber(broker.port)
    sink.start()
    sent = happen(journal, 20)
    journal.append(Event(kind="count", camera="gate", count=1, classes={"car": 1}))
    wait(lambda: len(subscriber.events("gate")) == 21)
    broker.kill()
    began = time.monotonic()
    sent += happen(journal, 500, 20)
    assert time.monotonic() - began < 2, "nobody waits for a dead broker"
    wait(lambda: sink.error)
    assert len(sink._client._out_messages) < 20, "they wait on disk, not in memory"
    broker.start()
    subscriber.wait_for_connection()
    wait(lambda: not sink.bookmark.behind, 60)
    wait(lambda: subscriber.events("gate") and subscriber.events("gate")[-1]["id"] == sent[-1])
    seen = [event["id"] for event in subscriber.events("gate") if event["kind"] == "enter"]
    assert list(dict.fromkeys(seen)) == sent, "each of them, in order"
    assert len(seen) <= len(sent) + 1, "at most the one under way comes twice"
    wait(lambda: subscriber.newest("eventful/gate/count"))
    late = Subscriber(broker.port, "eventful/#")
    wait(lambda: late.newest("eventful/gate/count"))  # the broker forgot it, and was told again
    late.close()
    sink.close()
    subscriber.close()


def test_a_broker_that_keeps_what_it_has_loses_no_event_when_it_is_killed(journal: Journal, tmp_path: Path) -> None:
    """Whoever subscribed is known to it afterwards, and gets what came meanwhile."""
    broker, kept = Broker(tmp_path, KEEP.format(folder=tmp_path)), tmp_path / "mosquitto.db"
    broker.start()
    Subscriber(broker.port, "eventful/+/event").close()
    sink = MqttSink(journal, Mqtt(host="127.0.0.1", port=broker.port))
    sink.start()
    try:
        event = Event(kind="enter", camera="gate")
        journal.append(event)
        wait(lambda: kept.exists() and event.id.encode() in kept.read_bytes())
        broker.kill()
        broker.start()
        subscriber = Subscriber(broker.port, "none")
        wait(lambda: [told["id"] for told in subscriber.events("gate")] == [event.id])
        subscriber.close()
    finally:
        sink.close()
        broker.kill()


def test_events_that_a_process_could_not_deliver_come_after_its_next_start(tmp_path: Path, broker: Broker) -> None:
    broker.kill()
    options = Mqtt(host="127.0.0.1", port=broker.port)
    journal = Journal(tmp_path / "events", 10**6)
    sink = MqttSink(journal, options)
    sink.start()
    sent = happen(journal, 5)
    wait(lambda: sink.error)
    sink.close()
    journal.close()
    broker.start()
    subscriber = Subscriber(broker.port)
    sink = MqttSink(Journal(tmp_path / "events", 10**6), options)
    sink.start()
    wait(lambda: len(subscriber.events("gate")) == 5)
    assert [event["id"] for event in subscriber.events("gate")] == sent
    sink.close()
    subscriber.close()


@contextmanager
def receiver(statuses: list[int]) -> Iterator[tuple[str, list[tuple[Any, bytes]]]]:
    """A web server that answers so, then 200; and the requests that it got."""
    got: list[tuple[Any, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            got.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", got
        server.shutdown()
        thread.join()


def test_a_webhook_is_signed_and_tried_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventful_det.cameras.sinks._PAUSES", (0.05, 0.1))
    with receiver([500, 503, 200, 422]) as (url, got):
        sink = WebhookSink(journal, Webhook(url=url, secret=SECRET))
        sink.start()
        sent = happen(journal, 3)
        wait(lambda: not sink.bookmark.behind)
        sink.close()
    ids = [headers["X-Eventful-Id"] for headers, _ in got]
    assert ids == [sent[0]] * 3 + sent[1:], "the second one was refused for good"
    assert (sink.delivered, sink.refused) == (2, 1)
    for headers, body in got:
        assert headers["X-Eventful-Signature"] == sign(SECRET, headers["X-Eventful-Timestamp"], body)
        assert headers["X-Eventful-Signature"] != sign("another secret of ours", headers["X-Eventful-Timestamp"], body)
        assert json.loads(body)["class"] == "car"


def test_a_dead_address_keeps_the_events_and_holds_nobody_up(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    sink = WebhookSink(journal, Webhook(url="http://u:hidden@127.0.0.1:9/hook", secret=SECRET))
    sink.start()
    began = time.monotonic()
    happen(journal, 200)
    assert time.monotonic() - began < 2
    wait(lambda: sink.error)
    sink.close()
    assert sink.bookmark.behind and sink.delivered == 0
    assert "hidden" not in caplog.text and SECRET not in caplog.text


def test_a_journal_is_bounded_and_tells_what_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 8000)
    sink = WebhookSink(journal, Webhook(url="http://127.0.0.1:9/", secret=SECRET))
    sent = happen(journal, 300)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) < 8000 + 2 * 300
    left = []
    while (entry := sink.bookmark.next()) is not None:
        left.append(json.loads(entry.line)["id"])
        sink.bookmark.advance(entry)
    assert left == sent[-len(left) :] and 20 < len(left) < 100 and sink.bookmark.lost > 0
    again = WebhookSink(Journal(tmp_path, 8000), Webhook(url="http://127.0.0.1:9/", secret=SECRET))
    assert again.bookmark.next() is None, "what was delivered is not told again after a restart"


def test_half_a_line_of_a_process_that_was_killed_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10**6)
    sent = happen(journal, 2)
    journal.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"kind": "en')
    journal = Journal(tmp_path, 10**6)
    sent += happen(journal, 1)
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == sent


def test_a_full_disk_makes_events_wait_and_old_clips_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, freed = [True], []
    journal = Journal(tmp_path, 10**6, lambda: bool(freed.append(1)) or full.clear() is None)
    real = Journal._write

    def write(self: Journal, line: bytes) -> None:
        if full:
            raise OSError(28, "No space left on device")
        real(self, line)

    monkeypatch.setattr(Journal, "_write", write)
    happen(journal, 1)
    assert freed == [1] and journal.read(0) is not None
    full.append(True)
    monkeypatch.setattr(journal, "_make_room", lambda: False)
    happen(journal, 1200)
    assert journal.lost == 200, "memory is bounded"
    full.clear()
    journal.flush()
    assert sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("*.jsonl")) == 1001


def test_what_is_no_event_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "2026-notes.jsonl").write_text("of somebody else\n")
    journal = Journal(tmp_path, 10**6)
    happen(journal, 1)
    journal.close()
    (path,) = tmp_path.glob("0*.jsonl")
    path.write_bytes(path.read_bytes() + b"\0\0\0\n[1]\n")  # as after a power cut
    (tmp_path / "webhook.offset").write_text("0")
    with receiver([]) as (url, got):
        sink = WebhookSink(journal := Journal(tmp_path, 10**6), Webhook(url=url, secret=SECRET))
        sink.start()
        happen(journal, 1)
        wait(lambda: not sink.bookmark.behind)
        sink.close()
    assert len(got) == sink.delivered == 2 and sink.refused == 2


def test_a_redirect_is_not_followed_and_a_user_is_told(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventful_det.cameras.sinks._PAUSES", (0.05, 0.1))
    with receiver([302, 307]) as (url, got):
        sink = WebhookSink(journal, Webhook(url=url.replace("://", "://me:p%40ss@"), secret=SECRET))
        sink.start()
        happen(journal, 1)
        wait(lambda: not sink.bookmark.behind)
        sink.close()
    assert [headers["Authorization"] for headers, _ in got] == ["Basic bWU6cEBzcw=="] * 3
    assert sink.delivered == 1


@pytest.mark.parametrize("reason", ["Not authorized", "Connection refused"])
def test_why_there_is_no_broker_is_told(
    tmp_path: Path, journal: Journal, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    broker = Broker(tmp_path)
    broker._config.write_text(broker._config.read_text().replace("anonymous true", "anonymous false"))
    if reason == "Not authorized":
        broker.start()
    sink = MqttSink(journal, Mqtt(host="127.0.0.1", port=broker.port, user="me", password="of nobody"))
    sink.configure({"gate": CAMERA})
    sink.start()
    happen(journal, 1)
    wait(lambda: reason in caplog.text)
    assert not sink._client._out_messages, "nothing is kept for a broker that does not let us in"
    assert "of nobody" not in caplog.text
    sink.close()
    broker.kill()
