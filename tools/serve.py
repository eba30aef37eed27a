"""A web page to watch detectors at work, with a slider for what they may spend.

    python tools/serve.py                                  # http://127.0.0.1:8077, then choose what to watch
    python tools/serve.py source=clip.mp4 budget=40GMACs
    python tools/serve.py source='[0,rtsp://gate/stream]' media=videos/
    python tools/serve.py host=0.0.0.0 expose=true token=auto

Ctrl-C ends it and removes all uploads.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import hydra
from common import console, open_detector, tool
from omegaconf import DictConfig, ListConfig

from eventful_det.data.classes import SYNTHETIC_SHAPES
from eventful_det.errors import UserError
from eventful_det.models.detector import Detector
from eventful_det.runtime.pool import StreamPool

try:
    from eventful_det.serving.app import create_app
    from eventful_det.serving.limits import build_server
    from eventful_det.serving.runner import PoolRunner
    from eventful_det.serving.sources import SourceOpener, play, public_name
except ImportError as error:
    raise SystemExit(f"error: the web page needs more libraries ({error}); pip install 'eventful_det[serve]'") from None

_TOKEN = 16  # characters of the shortest token that is accepted


def sources_of(config: DictConfig) -> list[str]:
    """The sources to watch from the start."""
    if config.source is None:
        return []
    return [str(source) for source in config.source] if isinstance(config.source, ListConfig) else [str(config.source)]


def token_of(config: DictConfig) -> str | None:
    """The token that everybody has to give.

    Raises:
        UserError: other machines could connect although nobody said so, or without a token.
    """
    token = secrets.token_urlsafe(24) if config.token == "auto" else config.token
    if token is not None and len(str(token)) < _TOKEN:
        raise UserError(f"a token needs at least {_TOKEN} characters; token=auto makes one up")
    if not is_loopback(config.host) and not (config.expose and token):
        raise UserError(
            f"host={config.host} lets other machines connect; say so with expose=true, and give a token (token=auto)"
        )
    return None if token is None else str(token)


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


def build_opener(config: DictConfig, detector: Detector) -> SourceOpener:
    """What people may open."""
    synthetic = {shape.name for shape in SYNTHETIC_SHAPES} <= set(detector.names)
    local = not config.expose
    return SourceOpener(
        media=None if config.media is None else Path(config.media),
        cameras=local if config.cameras is None else config.cameras,
        urls=local if config.urls is None else config.urls,
        synthetic=synthetic,
        max_bytes=int(config.upload_mb * 2**20),
        max_uploads=config.max_streams,
    )


def build_runner(config: DictConfig, detector: Detector, sources: Sequence[str]) -> PoolRunner:
    """A pool of the sources to watch from the start, and what drives it."""
    pool = StreamPool(detector, short_side=config.short_side, long_side=config.long_side, hold=config.hold)
    runner = PoolRunner(pool, max_streams=config.max_streams, track=config.track, rescore=config.rescore)
    if detector.rule is not None:
        runner.set_budget(str(config.budget))
    for opened in [play(source, public_name(source)) for source in sources]:
        runner.add(opened)
    return runner


def serve(config: DictConfig) -> None:
    """Run until Ctrl-C."""
    token, sources = token_of(config), sources_of(config)
    detector = open_detector(config, sources)
    opener = build_opener(config, detector)
    port = listen(config.host, config.port)
    runner = build_runner(config, detector, sources)
    app = create_app(runner, opener, token=token, hosts=config.hosts, root_path=config.root_path)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{port.getsockname()[1]}/" + (f"?token={token}" if token else "")
    console.print(f"watch at {address} (Ctrl-C ends)", soft_wrap=True, highlight=False)
    build_server(app).run(sockets=[port])


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve")
@tool
def main(config: DictConfig) -> None:
    """Entry point."""
    serve(config)


if __name__ == "__main__":
    main()
