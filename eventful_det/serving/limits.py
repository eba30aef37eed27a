"""What a connection may take: seconds for its head, bytes and seconds for its body, and how many there may be."""

from __future__ import annotations

import asyncio
import time

import h11
import uvicorn
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

UPLOADS = "/api/uploads"  # the path whose bodies may be large
_SMALL = 64 * 2**10  # bytes of any other body
_SILENCE = 20.0  # seconds without a byte of a body, and for the first ones
_SLOWEST = 16 * 2**10  # bytes per second, over a whole body
_HEAD = 10.0  # seconds for the head of a request, and between two requests
_CONNECTIONS = 256  # at the same time; more are answered 503


class BodyLimits:
    """ASGI middleware that answers 413 to bodies that are too large, and 408 to those that come too slowly.

    Args:
        app: what is guarded.
        max_upload: bytes of an upload.
    """

    def __init__(self, app: ASGIApp, max_upload: int) -> None:
        self.app, self.max_upload = app, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, with a body that keeps to the limits."""
        if scope["type"] == "http":
            most = self.max_upload if scope["path"].endswith(UPLOADS) else _SMALL
            length = Headers(scope=scope).get("content-length", "0")
            receive = _limited(receive, most, too_large=not length.isdecimal() or int(length[:20]) > most)
        await self.app(scope, receive, send)


def _limited(receive: Receive, most: int, too_large: bool) -> Receive:
    """`receive` that raises HTTPException where a body breaks a limit; `too_large`: the request says that it will."""
    began, taken, done = time.monotonic(), 0, False

    async def receiving() -> Message:
        nonlocal taken, done
        if done:
            return await receive()
        if too_large:
            raise _refusal(413, most)
        left = began + _SILENCE + taken / _SLOWEST - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), min(_SILENCE, left))
        except TimeoutError:
            raise _refusal(408, most) from None
        taken += len(message.get("body", b""))
        if taken > most:
            raise _refusal(413, most)
        done = not message.get("more_body", False)
        return message

    return receiving


def _refusal(status: int, most: int) -> HTTPException:
    size = f"{most / 2**20:.0f} MiB" if most >= 2**20 else f"{most / 2**10:.0f} KiB"
    reason = f"it is too large; this server takes up to {size}" if status == 413 else "it came too slowly"
    return HTTPException(status, reason, {"Connection": "close"})  # nobody reads the rest


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on whoever does not send a whole head in time."""

    _deadline: asyncio.TimerHandle | None = None
    _upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        super().handle_websocket_upgrade(event)
        self._upgraded = True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        """Have a deadline while no request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self._upgraded or self.transport.is_closing():
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD, self.transport.close)


def build_server(app: ASGIApp) -> uvicorn.Server:
    """A server with limits on what connections take."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
            limit_concurrency=_CONNECTIONS,
            ws_max_size=4096,
            ws_per_message_deflate=False,  # pictures are compressed already
            log_config=None,  # that of the process
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
    )
