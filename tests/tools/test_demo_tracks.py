"""tools/demo.py track=true: ids in every line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import run

pytest.importorskip("trackers", reason="trackers is not installed")


@pytest.mark.slow
def test_ids_last(tmp_path: Path) -> None:
    run("tools/demo.py", "device=cpu", "source=synthetic:1", "max_frames=5", "track=true", f"output={tmp_path}")
    lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
    ids = [{d["track_id"] for d in line["detections"] if "track_id" in d} for line in lines]
    assert ids[0] == set()  # an object gets its id on its second frame
    assert ids[1] and ids[1] == ids[2] == ids[3] == ids[4]
    named = [{d["track_id"]: d["name"] for d in line["detections"] if "track_id" in d} for line in lines[1:]]
    assert all(names == named[0] for names in named)
