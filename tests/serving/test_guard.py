"""serving/guard.py: who is turned away."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
from served import Server, serving
from starlette.websockets import WebSocketDisconnect

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.serving.guard import COOKIE, content_policy

TOKEN = "correct-horse-battery"


@pytest.fixture
def closed(tiny_detector: Detector) -> Iterator[Server]:
    """An application that asks for a token."""
    with serving(tiny_detector, token=TOKEN) as running:
        yield running


def status(server: Server, path: str = "/api/state", **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return int(server.client.get(path, headers=names, follow_redirects=False).status_code)


def test_foreign_names_are_refused(server: Server) -> None:
    for host in ("localhost", "localhost:8077", "127.0.0.1:8077", "[::1]:8077", "192.168.1.5", "watch.example:80"):
        assert status(server, host=host) == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a b"):
        assert status(server, host=host) == 403, host
        assert status(server, "/", host=host) == 403, host


def test_foreign_pages_are_refused(server: Server) -> None:
    assert status(server, origin="http://localhost") == 200
    for origin in (
        "http://evil.example",
        "http://localhost:9999",
        "null",
        "http://localhost.evil.example",
        "http://[x",
    ):
        assert status(server, origin=origin) == 403, origin
    for path in ("/api/state", "/metrics"):
        assert status(server, path, sec_fetch_site="same-origin") == 200
        assert status(server, path, sec_fetch_site="cross-site") == 403
        assert status(server, path, sec_fetch_site="same-site") == 403
    assert status(server, "/", sec_fetch_site="cross-site") == 200  # a link to the page
    answer = server.client.put("/api/budget", json={"budget": "5%"}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403 and server.state()["budget"] == "auto"
    form = {"Content-Type": "text/plain"}  # what a form of another page could send
    assert server.client.put("/api/budget", content='{"budget": "5%"}', headers=form).status_code == 422


def test_foreign_pages_get_no_pictures(server: Server) -> None:
    url = "ws://localhost/api/live"
    with server.client.websocket_connect(url, headers={"Origin": "http://localhost"}) as page:
        page.receive_text()
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), server.client.websocket_connect(url, headers=headers):
            pass


def test_token(closed: Server) -> None:
    for path in ("/", "/api/state", "/metrics", "/?token=wrong", "/api/state?token=" + TOKEN):
        assert status(closed, path) == 401, path
    assert status(closed, authorization=f"Bearer {TOKEN}") == 200
    assert status(closed, authorization="Bearer wrong") == 401
    assert status(closed, authorization=f"Basic {TOKEN}") == 401
    with pytest.raises(WebSocketDisconnect), closed.page():
        pass
    answer = closed.client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(COOKIE) and "httponly" in cookie and "samesite=strict" in cookie
    assert status(closed, "/") == status(closed) == 200
    with closed.client.websocket_connect("ws://localhost/api/live", headers={"Cookie": f"{COOKIE}={TOKEN}"}) as page:
        page.receive_text()


def test_the_page_may_run_its_own_script_only(server: Server) -> None:
    answer = server.client.get("/")
    policy = answer.headers["content-security-policy"]
    script = answer.text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy and policy == content_policy(answer.text)
    for name, value in (("x-frame-options", "DENY"), ("x-content-type-options", "nosniff")):
        assert answer.headers[name] == value
    for outside in ("src=", 'href="http', "@import", "url("):
        assert outside not in answer.text


def test_the_page_under_a_path_of_its_own(tiny_detector: Detector) -> None:
    """Behind a proxy that passes the whole path on, and behind one that cuts its part off."""
    with serving(tiny_detector, token=TOKEN, root_path="cam/") as server:
        assert status(server, "/cam/") == 401
        answer = server.client.get("/cam?token=a", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "cam/?token=a")
        answer = server.client.get(f"/cam/?token={TOKEN}", follow_redirects=False)
        assert answer.headers["location"] == "./" and "path" not in answer.headers["set-cookie"].lower()
        bearer = f"Bearer {TOKEN}"
        for path in ("/cam/", "/", "/cam/api/state", "/api/state", "/cam/metrics"):
            assert status(server, path, authorization=bearer) == 200, path
        assert status(server, "/cam/cam/api/state", authorization=bearer) == 404
        assert server.client.post("/cam/api/uploads", headers={"Authorization": bearer}).status_code == 400
        headers = {"Authorization": bearer, "Origin": "http://localhost"}
        with server.client.websocket_connect("ws://localhost/cam/api/live", headers=headers) as page:
            page.receive_text()


def test_the_page_asks_for_nothing_from_the_root(server: Server) -> None:
    page = server.client.get("/").text
    assert not re.search(r"""["'`]/|location\.host|location\.origin""", page.split("<script>")[1])
