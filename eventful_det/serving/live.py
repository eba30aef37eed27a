"""Newest frames to a page, over one WebSocket.

The server sends the state as JSON text and after it a binary message (`reports.message`) for every stream that has a
frame newer than the page's last one; how many, the state says in "frames". The page answers with any text once it has
drawn them. Nothing else is sent until then: a slow page gets fewer frames, never old ones, and holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from fastapi import WebSocket, WebSocketDisconnect

from eventful_det.serving.reports import message, state
from eventful_det.serving.runner import PoolRunner

_HEARTBEAT = 1.0  # seconds after which the state is sent even without a frame


class Notifier:
    """Wakes everybody who waits; to be used in one event loop."""

    def __init__(self) -> None:
        self.notified = asyncio.Event()

    def notify(self) -> None:
        """Wake those who hold the present event."""
        self.notified.set()
        self.notified = asyncio.Event()


async def show(socket: WebSocket, runner: PoolRunner, notifier: Notifier) -> None:
    """Serve one page until it leaves."""
    await socket.accept()
    seen: dict[str, int] = {}
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            notified = notifier.notified  # before looking, so that no frame is missed
            about = state(runner)
            newer = [
                (one["name"], *latest)
                for one in about["streams"]
                if (latest := runner.newest(one["name"], seen.get(one["name"], 0))) is not None
            ]
            await socket.send_text(json.dumps({**about, "frames": len(newer)}))
            for name, frame, samples in newer:
                await socket.send_bytes(await asyncio.to_thread(message, name, frame, samples))
            seen = {one["name"]: seen.get(one["name"], 0) for one in about["streams"]}  # forget those that left
            seen.update((name, frame.number) for name, frame, _ in newer)
            answer = await socket.receive()
            if answer.get("text") is None:  # the page left, or it is no page of ours
                if answer["type"] == "websocket.receive":
                    await socket.close(1003, "text only")
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(notified.wait(), _HEARTBEAT)
