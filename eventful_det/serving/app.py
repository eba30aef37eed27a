"""The web application: a page, and the JSON that it and other programs use.

======================================  ==========================================================
GET    /                                the page
GET    /api/state                       budget, streams, what they did
PUT    /api/budget                      {"budget": "25%"}, "40 GMACs", "50ms", "96 tokens", "auto"
GET    /api/sources                     what may be opened, files of the media folder
POST   /api/streams                     {"source": "synthetic:1"}: joins
POST   /api/uploads?name=clip.mp4       the file as the body: joins
GET    /api/streams/NAME/detections     of the newest frame; of recognisers, its classes
GET    /api/streams/NAME/frame.jpg      the newest frame with its boxes
DELETE /api/streams/NAME                leaves; an upload is removed
WS     /api/live                        newest frames of all streams, see `live`
GET    /cameras                         the page on which masks and zones are drawn
GET    /api/cameras                     masks and zones of a `cameras.yaml`
PUT    /api/cameras/NAME                {"masks": [[[0, 0], ...]], "zones": {"drive": [[0, 0], ...]}}: into the file
GET    /metrics                         for Prometheus
GET    /health                          200 while the detector works, else 503; needs no token
======================================  ==========================================================

Errors are JSON: {"error": "what was wrong"}.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from eventful_det.adapters import to_record
from eventful_det.cameras.service import CameraService
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.runtime.regions import Point
from eventful_det.runtime.session import StreamResult
from eventful_det.secrets import mask_secrets
from eventful_det.serving.guard import HEALTH, Guard, content_policy
from eventful_det.serving.limits import UPLOADS, BodyLimits
from eventful_det.serving.live import Notifier, show
from eventful_det.serving.reports import prometheus, state
from eventful_det.serving.runner import PoolRunner
from eventful_det.serving.sources import OpenedSource, SourceOpener
from eventful_det.serving.views import LatestFrame, encode_jpeg
from eventful_det.viz import draw_detections
from eventful_det.viz.actions import central_crop, draw_probabilities


class SourceRequest(BaseModel):
    """What to watch."""

    source: str = Field(max_length=2000)


class BudgetRequest(BaseModel):
    """What a round may cost."""

    budget: str = Field(max_length=40)


class RegionsRequest(BaseModel):
    """Masks and zones of a camera; their points are checked with the file."""

    masks: list[tuple[Point, ...]] = Field(max_length=100)
    zones: dict[str, tuple[Point, ...]] = Field(max_length=100)


def create_app(
    runner: PoolRunner,
    opener: SourceOpener,
    *,
    token: str | None = None,
    hosts: Collection[str] = (),
    root_path: str = "",
    cameras: CameraService | None = None,
) -> FastAPI:
    """The application. It starts the runner when it starts, and closes runner and opener when it ends.

    Args:
        runner: not started yet.
        opener: opens what people ask for.
        token: that everybody needs; None = none.
        hosts: names, besides localhost and bare addresses, under which the server may be reached.
        root_path: under which a proxy that passes the whole path on has the page, such as "/cameras".
        cameras: of a `cameras.yaml` on the same runner; not started yet.
    """
    notifier = Notifier()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def on_round() -> None:
            loop.call_soon_threadsafe(notifier.notify)

        runner.on_round = on_round
        runner.start()
        if cameras is not None:
            await asyncio.to_thread(cameras.start)
        yield
        if cameras is not None:
            await asyncio.to_thread(cameras.close)
        await asyncio.to_thread(runner.close)
        opener.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimits, max_upload=opener.max_bytes)
    app.add_middleware(Guard, token=token, hosts=hosts, root_path=root_path)
    _answer_errors(app)
    _add_page(app, "/", "page.html")
    if cameras is not None:
        _add_page(app, "/cameras", "regions.html")
    _add_cameras(app, cameras)
    _add_streams(app, runner, opener)
    _add_reports(app, runner, cameras)

    @app.websocket("/api/live")
    async def live(socket: WebSocket) -> None:
        await show(socket, runner, notifier)

    return app


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error for whoever asked: no password, and nothing that JSON cannot hold."""
    shown = mask_secrets(text).encode("utf-8", "replace").decode()
    return JSONResponse({"error": shown}, status, headers)


def _answer_errors(app: FastAPI) -> None:
    """Every error is {"error": text}."""

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # an upload broke off: nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(422, f"{where or 'request'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail, error.headers)


def _add_page(app: FastAPI, path: str, file: str) -> None:
    page = (resources.files("eventful_det.serving") / file).read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": content_policy(page)}

    @app.get(path)
    def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _add_cameras(app: FastAPI, cameras: CameraService | None) -> None:
    @app.get("/api/cameras")
    def regions() -> list[JsonObject]:
        return [] if cameras is None else cameras.regions()

    @app.put("/api/cameras/{name}")
    def draw(name: str, request: RegionsRequest) -> list[JsonObject]:
        if cameras is None:
            raise UserError("this server has no cameras.yaml")
        cameras.draw(name, request.masks, request.zones)
        return cameras.regions()


def _add_streams(app: FastAPI, runner: PoolRunner, opener: SourceOpener) -> None:
    def join(opened: OpenedSource) -> dict[str, str]:
        try:
            return {"name": runner.add(opened)}
        except BaseException:
            opened.source.close()
            opened.release()
            raise

    @app.get("/api/sources")
    def sources() -> JsonObject:
        return opener.offers()

    @app.post("/api/streams", status_code=201)
    def add_stream(request: SourceRequest) -> dict[str, str]:
        runner.check_room()
        return join(opener.open(request.source))

    @app.post(UPLOADS, status_code=201)
    async def upload(request: Request, name: str = "") -> dict[str, str]:
        runner.check_room()
        opened = await opener.receive(name, request.stream())
        return await asyncio.to_thread(join, opened)

    @app.delete("/api/streams/{name}", status_code=204)
    def remove_stream(name: str) -> None:
        if not runner.remove(name):
            raise HTTPException(404, f"no stream {name!r}")

    @app.put("/api/budget")
    def set_budget(request: BudgetRequest) -> JsonObject:
        runner.set_budget(request.budget)
        return state(runner)


def _add_reports(app: FastAPI, runner: PoolRunner, cameras: CameraService | None) -> None:
    def newest(name: str) -> LatestFrame:
        found = runner.newest(name)
        if found is None:
            raise HTTPException(404, f"no stream {name!r}, or it has no frame yet")
        return found

    @app.get("/api/state")
    def report() -> JsonObject:
        return state(runner)

    @app.get("/api/streams/{name}/detections")
    def detections(name: str) -> JsonObject:
        return to_record(newest(name).result)

    @app.get("/api/streams/{name}/frame.jpg")
    def frame(name: str, show: Annotated[float, Query(ge=0, le=1)] = 0.5) -> Response:
        result = newest(name).result
        if isinstance(result, StreamResult):
            picture = draw_detections(result.image, result.detections, result.names, show)
        else:
            picture = draw_probabilities(central_crop(result), [result])
        return Response(encode_jpeg(picture), media_type="image/jpeg")

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        text = prometheus(runner) + ("" if cameras is None else cameras.prometheus())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get(HEALTH)
    def health() -> JSONResponse:
        """No names, as nobody has to say who they are."""
        about = {} if cameras is None else cameras.health()
        online = sum(one == "online" for one in about.get("cameras", {}).values())
        answer: dict[str, object] = {"status": "stuck" if runner.stuck else "ok"}
        if cameras is not None:
            answer |= {"cameras": len(about["cameras"]), "online": online}
            answer |= {"sinks": {name: one["error"] is None for name, one in about["sinks"].items()}}
        return JSONResponse(answer, 503 if runner.stuck else 200)
