"""Newest frames to a page, over one WebSocket.

The server sends the state as JSON text and after it a binary message (`reports.message`) for every stream that has a
frame newer than the page's last one; how many, the state says in "frames". The page answers with any text once it has
drawn them. Meanwhile one more such turn is sent, and no third: a slow page gets fewer frames, never old ones, and holds
up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from fastapi import WebSocket, WebSocketDisconnect

from eventful_det.serving.reports import message, state
from eventful_det.serving.runner import PoolRunner

_UNDRAWN = 2  # turns: the page draws the one while the other is on its way
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
    undrawn: asyncio.Queue[None] = asyncio.Queue(_UNDRAWN)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(_send(socket, runner, notifier, undrawn))
        while (answer := await socket.receive()).get("text") is not None:
            if not undrawn.empty():
                undrawn.get_nowait()
        sending.cancel()
    if answer["type"] == "websocket.receive":  # it is no page of ours; otherwise it left
        await socket.close(1003, "text only")


async def _send(socket: WebSocket, runner: PoolRunner, notifier: Notifier, undrawn: asyncio.Queue[None]) -> None:
    """Send turns, each of which is in `undrawn` until the page has drawn it."""
    seen: dict[str, int] = {}
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            late = undrawn.full()
            await undrawn.put(None)
            notified = notifier.notified  # before looking, so that no frame is missed
            about = state(runner)
            names = [one["name"] for one in about["streams"]]
            newer = [(name, *one) for name in names for one in runner.unseen(name, seen.get(name, 0), late=late)]
            await socket.send_text(json.dumps({**about, "frames": len(newer)}))
            for name, frame, samples in newer:
                await socket.send_bytes(await asyncio.to_thread(message, name, frame, samples))
            seen = {name: seen.get(name, 0) for name in names}  # forget those that left
            seen.update((name, frame.number) for name, frame, _ in newer)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(notified.wait(), _HEARTBEAT)
