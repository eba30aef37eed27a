"""Who may talk to the server: its own page, programs on this machine, and whoever has the token."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import secrets
from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEALTH = "/health"  # for whoever restarts servers; tells nothing about what they watch
COOKIE = "eventful_det_token"
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that turns away

    - names in `Host` that are not ours: a foreign page whose name was pointed at this machine (DNS rebinding);
    - other pages, by `Origin` and `Sec-Fetch-Site` (cross-site requests, WebSockets included);
    - with a token, everybody without it: as `Authorization: Bearer`, or as a cookie, which `/?token=...` sets. Whether
      the server works (`HEALTH`) is told without it.

    Args:
        app: what is guarded.
        token: None = none is asked for.
        hosts: names, besides localhost and bare addresses, under which the server may be reached.
        root_path: of the page, where a proxy passes the whole path on.
    """

    def __init__(
        self, app: ASGIApp, token: str | None = None, hosts: Collection[str] = (), root_path: str = ""
    ) -> None:
        self.app, self.token, self.root_path = app, token, f"/{root_path.strip('/')}".rstrip("/")
        self.hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http" and self.root_path and scope["path"] == self.root_path:
            query = scope.get("query_string", b"").decode("latin-1")
            await RedirectResponse(f"{self.root_path.rpartition('/')[2]}/?{query}", 307)(scope, receive, send)
            return
        if scope["path"].startswith(f"{self.root_path}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.root_path)}
        answer = self._answer(HTTPConnection(scope))
        if answer is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
        else:
            await answer(scope, receive, _with_headers(send))

    def _answer(self, request: HTTPConnection) -> Response | None:
        """What is answered instead of the application; None = go on."""
        host = request.headers.get("host", "")
        if not self._is_own(host):
            return _refuse(403, f"this server is not called {host!r}; add the name to hosts")
        origin = request.headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            return _refuse(403, "requests from other pages are not answered")
        visit = request.scope.get("method") == "GET" and request.scope["path"] == "/"
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not visit:
            return _refuse(403, "requests from other pages are not answered")
        if self.token is None or request.scope["path"] == HEALTH:
            return None
        given = parse_qs(request.scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if visit and self._is_token(given):
            answer = RedirectResponse(
                "./", 303
            )  # relative, as is the cookie's path: a proxy may have the page elsewhere
            answer.set_cookie(COOKIE, self.token, path=None, httponly=True, samesite="strict")
            return answer
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if self._is_token(request.cookies.get(COOKIE, "")) or (scheme.lower() == "bearer" and self._is_token(bearer)):
            return None
        return _refuse(401, "a token is needed: open the address with ?token=... that the server printed")

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)  # an address was not looked up, so nobody can have pointed it here
        except ValueError:
            return False
        return True

    def _is_token(self, given: str) -> bool:
        return self.token is not None and secrets.compare_digest(given.strip().encode(), self.token.encode())


def _place(origin: str) -> str | None:
    """Host and port of an origin; None of what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def content_policy(page: str) -> str:
    """A Content-Security-Policy that lets a page run the script and styles that it holds, and nothing else."""
    script, style = (
        " ".join(f"'sha256-{_hash(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _refuse(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _SAFE.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
