"""The table of disturbances, as a user gets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import run


@pytest.mark.slow
def test_a_still_scene_is_free_and_noise_nearly(tmp_path: Path) -> None:
    run(
        "tools/disturbances.py",
        "only=[none,noise_20,exposure_steps]",
        "videos=1",
        "frames=10",
        f"output={tmp_path}",
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["none"]["selected"] == 0
    assert rows["noise_20"]["selected"] <= 0.1 and rows["exposure_steps"]["selected"] <= 0.1
    assert (tmp_path / "disturbances.md").read_text().count("\n") == 5


def test_unknown_names_are_told(tmp_path: Path) -> None:
    done = run("tools/disturbances.py", "only=[nigth]", f"output={tmp_path / 'new'}", check=False)
    assert done.returncode and "did you mean night?" in done.stderr and not (tmp_path / "new").exists()
