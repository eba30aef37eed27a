"""tools/serve.py: where it listens, to whom, and how it ends."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT, ROOT, options_of

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.checkpoints.weight_files import SYNTHETIC
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.serving.sources import play

pytest.importorskip("fastapi", reason="fastapi is not installed (python -m pip install fastapi uvicorn websockets)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

import actions  # noqa: E402
import serve  # noqa: E402


def config(*options: str) -> Any:
    return options_of("serve", "device=cpu", *options)


def test_from_start_to_ctrl_c(tiny_detector: Detector, tmp_path: Path) -> None:
    save_detector(tiny_detector, tmp_path / "tiny.safetensors", torch.float32)
    options = [f"weights={tmp_path / 'tiny.safetensors'}", "source=synthetic:1", "port=0", "budget=10%", "token=auto"]
    process = subprocess.Popen(
        [sys.executable, "tools/serve.py", "device=cpu", *options],
        cwd=ROOT,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"watch at (http://127\.0\.0\.1:\d+/)\?token=([\w-]{32}) \(Ctrl-C ends\)\n", line)
        assert found, line + process.communicate(timeout=60)[1]
        asked = urllib.request.Request(found[1] + "api/state", headers={"Authorization": f"Bearer {found[2]}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            state = json.load(answer)
        assert state["budget"] == "10%" and [one["title"] for one in state["streams"]] == ["synthetic:1"]
        assert list(tmp_path.glob("eventful_det-*"))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and stderr == "stopped\n"
    assert not list(tmp_path.glob("eventful_det-*"))


def test_the_first_line_is_json_as_well() -> None:
    address = "http://127.0.0.1:1/?token=abcdefghijklmnop"
    assert json.loads(serve.announce(address, "json"))["message"] == f"watch at {address} (Ctrl-C ends)"


def test_what_ends_it_is_json_as_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for ends, status, level, message in (
        (UserError("a: 100 % wrong"), 2, "error", "a: 100 % wrong"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "info", "stopped"),
    ):
        monkeypatch.setattr(serve, "run_server", lambda _, ends=ends: (_ for _ in ()).throw(ends))
        with pytest.raises(SystemExit) as ended:
            serve.run(config("log=json"))
        line = json.loads(capsys.readouterr().err)
        assert (ended.value.code, line["level"], line["message"]) == (status, level, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["host=0.0.0.0"], "expose=true"),
        (["host=0.0.0.0", "expose=true"], "a token"),
        (["host=192.168.1.5", "token=auto"], "expose=true"),
        (["host=gate.example", "expose=true"], "a token"),
        (["host=::"], "expose=true"),
        (["token=short"], "at least 16"),
    ],
)
def test_nobody_else_by_accident(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        serve.run(config(*options))


def test_live_streams_choose_their_key_frames(tiny_detector: Detector) -> None:
    runner = serve.build_runner(config("live=true"), tiny_detector, [])
    runner.pool.close()
    with pytest.raises(UserError, match="leave hold out"):
        serve.build_runner(config("live=true", "hold=4"), tiny_detector, [])


def test_what_is_reported_has_a_least_score() -> None:
    runner = serve.build_runner(config("conf=0.4"), load_detector(SYNTHETIC), [])
    runner.add(play("synthetic:1", "clip"))
    (view,) = runner.views.values()
    (result,) = next(runner.pool)
    view.show(result)
    runner.pool.close()
    assert view.newest is not None
    reported = view.newest.result.detections.scores
    assert result.detections.scores.min() < 0.4 <= reported.min() and len(reported) > 0


def test_tokens() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        assert serve.token_of(config(f"host={host}")) is None
    first, second = (serve.token_of(config("host=0.0.0.0", "expose=true", "token=auto")) for _ in range(2))
    assert first != second and len(first) >= 32


def test_other_people_get_neither_cameras_nor_addresses(tiny_detector: Detector) -> None:
    for options, allowed in (
        ([], True),
        (["expose=true"], False),
        (["expose=true", "cameras=true", "urls=true"], True),
    ):
        offers = serve.build_opener(config(*options), tiny_detector).offers()
        assert (offers["cameras"], offers["urls"]) == (allowed, allowed)
        assert offers["synthetic"] is False and offers["max_bytes"] == 512 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["weights={tmp}/none.safetensors"], "no weights"),
        (["source=missing.mp4"], "no such file"),
        (["source=[synthetic:1,missing.mp4]"], "no such file"),
        (["budget=much"], "budget='much'"),
        (["gate=dense", "budget=10%", "weights=none"], "budget: gate=dense recomputes everything"),
        (["media={tmp}/none"], "is no folder"),
        (["port={taken}"], "cannot listen on 127.0.0.1:"),
        (["port=99999"], "port must be a whole number from 0 to 65535"),
    ],
)
def test_error_lines(tmp_path: Path, options: list[str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        filled = [option.format(tmp=tmp_path, taken=other.getsockname()[1]) for option in options]
        free = [] if any(option.startswith("port") for option in filled) else ["port=0"]
        with pytest.raises(UserError, match=message):
            serve.run(config(*filled, *free))


def test_zones_are_refused_to_a_recogniser_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cameras.yaml").write_text("cameras: {a: {source: 0}}\n")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(actions, "load_recogniser", None)
    with pytest.raises(UserError, match=r"cameras\.yaml: zones .* need a detector, not a recogniser"):
        serve.run(config(f"source={tmp_path / 'cameras.yaml'}", "task=recognition"))
    with pytest.raises(UserError, match="min_score: each camera has a score of its own in"):
        serve.run(config(f"source={tmp_path / 'cameras.yaml'}", "min_score=0.3"))
