"""tools/demo.py track=true: ids in every line."""

from __future__ import annotations

import json
from pathlib import Path

import demo
import pytest
from running import options_of

pytest.importorskip("trackers", reason="trackers is not installed")


def test_ids_last(tmp_path: Path) -> None:
    config = options_of("demo", "device=cpu", "max_frames=5", "track=true", f"output={tmp_path}")
    demo.run(config)
    lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
    tracks = [{d["track_id"]: d["name"] for d in line["detections"] if "track_id" in d} for line in lines]
    assert tracks[0] == {}  # an object gets its id on its second frame
    assert tracks[1] and tracks[1] == tracks[2] == tracks[3] == tracks[4]
