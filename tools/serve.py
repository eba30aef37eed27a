"""A web page to watch detectors at work, with a slider for what they may spend.

    python tools/serve.py                                  # http://127.0.0.1:8077, then choose what to watch
    python tools/serve.py source=clip.mp4 budget=40GMACs
    python tools/serve.py source='[0,rtsp://gate/stream]' media=videos/
    python tools/serve.py weights=vivit_tiny_synthetic     # recognise actions
    python tools/serve.py host=0.0.0.0 expose=true token=auto
    python tools/serve.py cameras.yaml log=json            # masks, zones, events, clips: docs/cameras.md

Ctrl-C ends it and removes all uploads. SIGHUP has cameras.yaml read again.
"""

from __future__ import annotations

import gc
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import actions
from command_line import guard, refuse
from common import AnyDetector, Texts, as_list, build_gate, console

from eventful_det.cameras.service import CameraService
from eventful_det.cameras.site_file import read_site
from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.errors import UserError, printable
from eventful_det.gating.dense import Dense
from eventful_det.options import Count, Positive, Range
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.motion.key_frames import parse_hold
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.tracking import Tracker
from eventful_det.secrets import mask_secrets
from eventful_det.serving.app import create_app
from eventful_det.serving.limits import build_server
from eventful_det.serving.runner import PoolRunner
from eventful_det.serving.sources import SourceOpener, play, public_name

_TOKEN = 16  # characters of the shortest token that is accepted


@dataclass(frozen=True, kw_only=True)
class Options(actions.NetworkOptions):
    """What may be asked of the page; configs/serve.yaml explains it."""

    source: Texts | None
    budget: float | int | str
    port: Annotated[int, Range(0, 65535)]
    host: str
    expose: bool
    token: str | None
    hosts: Texts
    media: str | None
    cameras: bool | None
    urls: bool | None
    upload_mb: Positive
    root_path: str
    max_streams: Count
    log: Literal["text", "json"]


class Lines(logging.Formatter):
    """Text without secrets, whoever logs it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines of a traceback."""
        return mask_secrets(super().format(record))


class JsonLines(logging.Formatter):
    """A JSON object for each line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = record.getMessage() + (f": {record.exc_info[1]!r}" if record.exc_info else "")
        return json_line(record.created, record.levelname.lower(), record.name, printable(text))


def json_line(at: float, level: str, logger: str, message: str) -> str:
    """A line of the log."""
    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": stamp, "level": level, "logger": logger, "message": message})


def announce(address: str, kind: Literal["text", "json"]) -> str:
    """What tells people where to look; its token is not masked."""
    text = f"watch at {address} (Ctrl-C ends)"
    return text if kind == "text" else json_line(time.time(), "info", "eventful_det.serve", text)


def set_up_log(kind: Literal["text", "json"]) -> None:
    """Log to standard error, from information on for our own modules."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else Lines("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("eventful_det").setLevel(logging.INFO)


def token_of(options: Options) -> str | None:
    """The token that everybody has to give.

    Raises:
        UserError: other machines could connect although nobody said so, or without a token.
    """
    token = secrets.token_urlsafe(24) if options.token == "auto" else options.token
    if token is not None and len(token) < _TOKEN:
        raise UserError(f"a token needs at least {_TOKEN} characters; token=auto makes one up")
    if not is_loopback(options.host) and not (options.expose and token):
        raise UserError(
            f"host={options.host} lets other machines connect; say so with expose=true, and give a token (token=auto)"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """An open port.

    Raises:
        UserError: it cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; try another port, or port=0") from error


def build_opener(options: Options, network: AnyDetector | Recogniser) -> SourceOpener:
    """What people may open."""
    synthetic = not isinstance(network, Recogniser) and {shape.name for shape in SYNTHETIC_SHAPES} <= set(network.names)
    local = not options.expose
    return SourceOpener(
        media=None if options.media is None else Path(options.media),
        cameras=local if options.cameras is None else options.cameras,
        urls=local if options.urls is None else options.urls,
        synthetic=synthetic,
        max_bytes=int(options.upload_mb * 2**20),
        max_uploads=options.max_streams,
    )


def build_runner(options: Options, network: AnyDetector | Recogniser, sources: Sequence[str]) -> PoolRunner:
    """A pool of the sources to watch from the start, and what drives it."""
    gate, hold = build_gate(options.gate), parse_hold(options.hold)
    pool: StreamPool[Any]
    if isinstance(network, Recogniser):
        gate = actions.own_gate(gate)
        pool = StreamPool(network, budget=gate.selector, rule=gate.rule, timing=True)
    else:
        pool = StreamPool(
            network,
            budget=gate.selector,
            rule=gate.rule,
            short_side=options.short_side,
            long_side=options.long_side,
            hold=hold,
            timing=True,
            live=options.live,
        )
    most = max(options.max_streams, len(sources))
    runner = PoolRunner(
        pool, max_streams=most, track=options.track, rescore=options.rescore, min_score=options.min_score or 0.0
    )
    if gate.rule != Dense():
        runner.set_budget(str(options.budget))
    return runner


def site_of(sources: Sequence[str]) -> Path | None:
    """The `cameras.yaml` among the sources, which then is the only one.

    Raises:
        UserError: it is not.
    """
    files = [source for source in sources if Path(source).suffix in (".yaml", ".yml")]
    if files and len(sources) > 1:
        raise UserError(f"{files[0]} names all cameras; give no other source beside it")
    return Path(files[0]) if files else None


def log_end(text: str, kind: str = "error: ") -> None:
    """As `print_error`, in the log."""
    logging.getLogger("eventful_det.serve").log(logging.ERROR if kind else logging.INFO, text)


def run(options: Options) -> None:
    """Run until Ctrl-C."""
    set_up_log(options.log)
    if options.log == "json":  # as is what keeps it from beginning, and its end
        guard(lambda: run_server(options), log_end)
    else:
        run_server(options)


def run_server(options: Options) -> None:
    """Load, listen and serve."""
    token, sources = token_of(options), as_list(options.source)
    if options.budget != "auto":
        parse_budget(options.budget)
    if options.track:
        Tracker()  # tells now what is missing
    if (site := site_of(sources)) is not None:
        refuse("serve", options, ("min_score",), f"each camera has a score of its own in {site}")
        for number in (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ():
            signal.signal(number, signal.SIG_IGN)  # there is nothing to read again yet
        sources = [str(camera.source) for camera in read_site(site).cameras.values()]
        if actions.recognises(options.task, options.weights):
            raise UserError(f"{site}: zones and events need a detector, not a recogniser of actions")
    network = actions.open_network("serve", options, sources)
    opener = build_opener(options, network)
    port = listen(options.host, options.port)
    runner, cameras = build_runner(options, network, sources), None
    if site is not None and not isinstance(network, Recogniser):
        cameras = CameraService(site, runner, network.names)
        gc.freeze()  # what is there for good, so that collecting the rest takes no time
        for number in (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ():
            signal.signal(number, lambda *_: cameras.ask_to_reload())
    else:
        for opened in [play(source, public_name(source)) for source in sources]:
            runner.add(opened)
    names = as_list(options.hosts)
    app = create_app(runner, opener, token=token, hosts=names, root_path=options.root_path, cameras=cameras)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{port.getsockname()[1]}/" + (f"?token={token}" if token else "")
    console.print(announce(address, options.log), soft_wrap=True)
    build_server(app).run(sockets=[port])


if __name__ == "__main__":
    from command_line import start

    start("serve")
