"""detect folder/ on=ray: every video is done once, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import archive
import demo
import pytest
import torch
from running import ENVIRONMENT, ROOT, options_of
from videos import encode

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError

FRAMES = 12


def command(folder: Path, detector: Detector, *more: str) -> list[str]:
    save_detector(detector, folder / "tiny.safetensors", torch.float32)
    clips = folder / "clips"
    clips.mkdir()
    options = SceneOptions(width=96, height=64, frames=FRAMES)
    for seed, name in enumerate(("a", "b")):
        encode(clips / f"{name}.mp4", [frame.image for frame in render_video(options, seed=seed)])
    (clips / "broken.mp4").write_bytes(b"no video")
    return [
        *("device=cpu", "width=320", "on=ray", f"source={clips}", f"output={folder / 'out'}"),
        *(f"weights={folder / 'tiny.safetensors'}", *more),
    ]


class Killer(threading.Thread):
    """Kills the process that writes the results of a video, once."""

    def __init__(self, lines: Path) -> None:
        super().__init__(daemon=True)
        self.lines, self.killed = lines.resolve(), False
        self.start()

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.02)
            for process in Path("/proc").glob("[0-9]*") if self.lines.exists() else ():
                if self.writes(process):
                    os.kill(int(process.name), signal.SIGKILL)
                    self.killed = True

    def writes(self, process: Path) -> bool:
        try:
            return any(Path(os.readlink(file)) == self.lines for file in (process / "fd").iterdir())
        except OSError:
            return False


@pytest.mark.slow
def test_a_worker_that_dies(tiny_detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    slow_machine = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    options = command(tmp_path, tiny_detector)
    out = tmp_path / "out"
    killer = Killer(out / "a" / "detections.part.jsonl")

    def detect() -> subprocess.CompletedProcess[str]:
        # In a session of its own: Ray ends the process it was used in, even afterwards, if it misses its cluster.
        call, env = [sys.executable, "tools/demo.py", *options], {**ENVIRONMENT, **slow_machine}
        return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, start_new_session=True)

    done = detect()
    assert done.returncode == 2 and re.search(r"1 of 3 sources failed: \S*broken.mp4$", done.stderr.strip())
    assert killer.killed
    summary = json.loads((out / "results.json").read_text())
    assert set(summary["runs"]) == {"a", "b"} and len(summary["failed"]) == 1
    for name in ("a", "b"):
        assert summary["runs"][name]["frames"] == FRAMES
        assert len((out / name / "detections.jsonl").read_text().splitlines()) == FRAMES

    # The same command does nothing again that is done, and needs no cluster for that.
    (out / "results.json").unlink()
    (tmp_path / "clips" / "broken.mp4").unlink()
    before = (out / "b" / "results.json").stat().st_mtime_ns
    slow_machine["RAY_ADDRESS"] = "nowhere:1"
    assert detect().returncode == 0 and (out / "b" / "results.json").stat().st_mtime_ns == before
    assert json.loads((out / "results.json").read_text())["runs"]["a"]["frames"] == FRAMES


def test_only_a_death_has_a_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception): ...

    class RayTaskError(RayError): ...

    tried: list[str] = []
    made: list[object] = []

    class Handle:
        def __init__(self) -> None:
            made.append(self)
            self.fault, self.detect = SimpleNamespace(remote=lambda: None), SimpleNamespace(remote=self.begin)

        def begin(self, source: str, _: Path) -> str:
            tried.append(source)
            return source

    def get(task: str | None) -> None:
        if task is not None:
            raise RayTaskError("a mistake of ours") if task == "bad.mp4" else RayError("killed")

    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
        cluster_resources=lambda: {"CPU": 1},
        remote=lambda **_: lambda _: SimpleNamespace(remote=lambda *_: Handle()),
        wait=lambda tasks, num_returns: (tasks[:1], tasks[1:]),
        get=get,
        kill=lambda _: None,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    sources: dict[Path, str | Path] = {Path("a"): "bad.mp4", Path("b"): "deadly.mp4"}
    results = [str(outcome.result) for outcome in archive._results(SimpleNamespace(device="cpu"), sources)]  # type: ignore[arg-type]
    assert [result.partition(": ")[2] for result in results] == [
        "its worker failed (a mistake of ours)",
        "its worker failed (killed)",
    ]
    assert tried == ["bad.mp4", "deadly.mp4", "deadly.mp4"]
    assert len(made) == 3, "none when nothing waits"


def test_a_worker_tells_faults(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["as", "before"])  # which a worker sets
    given = command(tmp_path, tiny_detector)
    worker = archive.Worker(options_of("demo", *given), [], ["detect"])
    result = worker.detect(tmp_path / "clips" / "broken.mp4", tmp_path / "out")
    assert worker.fault() is None and isinstance(result, UserError) and "broken.mp4" in str(result)
    worker = archive.Worker(options_of("demo", *given, "classes=[elephant]"), [], ["detect"])
    assert str(worker.fault()).startswith("classes: no class elephant")
    assert worker.detect("a.mp4", tmp_path) is worker.fault()


@pytest.mark.parametrize(
    ("results", "done"),
    [
        ({"command": "detect a.mp4", "stopped": None}, True),
        ({"command": "detect a.mp4 --budget 0.1", "stopped": None}, False),
        ({"command": "detect a.mp4", "stopped": "interrupted"}, False),
        ({"command": "detect a.mp4"}, False),
        ([], False),
        (None, False),
    ],
)
def test_done_is_what_the_same_command_brought_to_its_end(
    results: Any, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["detect", "a.mp4"])
    if results is not None:
        (tmp_path / "results.json").write_text(json.dumps(results))
    assert (archive.finished(tmp_path) is not None) == done


def test_without_ray(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="on=ray needs the package ray: pip install ray"):
        demo.run(options_of("demo", *command(tmp_path, tiny_detector)))
