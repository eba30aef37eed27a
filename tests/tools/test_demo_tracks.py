"""tools/demo.py track=true: ids in every line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import compose_config, import_tool

pytest.importorskip("trackers", reason="trackers is not installed")


def test_ids_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config("demo", "device=cpu", "max_frames=5", "track=true", f"output={tmp_path}")
    import_tool("demo", monkeypatch).demo(config)
    lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
    tracks = [{d["track_id"]: d["name"] for d in line["detections"] if "track_id" in d} for line in lines]
    assert tracks[0] == {}  # an object gets its id on its second frame
    assert tracks[1] and tracks[1] == tracks[2] == tracks[3] == tracks[4]
