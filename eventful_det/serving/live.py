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

from eventful_det.serving.engine import Engine
from eventful_det.serving.reports import message, state

_HEARTBEAT = 1.0  # seconds after which the state is sent even without a frame


class Bell:
    """Wakes everybody who waits; to be rung and awaited in one event loop."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()

    def ring(self) -> None:
        """Wake those who hold the present event."""
        self.rung.set()
        self.rung = asyncio.Event()


async def show(socket: WebSocket, engine: Engine, bell: Bell) -> None:
    """Serve one page until it leaves."""
    await socket.accept()
    seen: dict[str, int] = {}
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            rung = bell.rung  # before looking, so that no news is missed
            about = state(engine)
            news = [
                (one["name"], *found)
                for one in about["streams"]
                if (found := engine.newest(one["name"], seen.get(one["name"], 0))) is not None
            ]
            await socket.send_text(json.dumps({**about, "frames": len(news)}))
            for name, shot, marks in news:
                await socket.send_bytes(await asyncio.to_thread(message, name, shot, marks))
            seen = {one["name"]: seen.get(one["name"], 0) for one in about["streams"]}  # forget those that left
            seen.update((name, shot.number) for name, shot, _ in news)
            await socket.receive_text()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(rung.wait(), _HEARTBEAT)
