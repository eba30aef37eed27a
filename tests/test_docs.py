"""The examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eventful_det.detectors.checkpoints import files as checkpoints
from eventful_det.detectors.vitdet.detector import Detector

ROOT = Path(__file__).resolve().parents[1]
# What a reader has and a test has not: videos, cameras, patience.
STAND_INS = {
    '"video.mp4"': '"synthetic:1"',
    '"corridor.mp4"': '"synthetic:3"',
    '"rtsp://gate/stream"': '"synthetic:2"',
    "672, 672": "128, 128",
}


@pytest.mark.parametrize("name", ["README.md", "docs/live.md", "docs/policies.md", "docs/cameras.md"])
def test_examples(name: str, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of a page, one block after the other, with a detector that takes no time."""
    monkeypatch.setattr(checkpoints, "load_detector", lambda: tiny_detector)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        for theirs, ours in STAND_INS.items():
            block = block.replace(theirs, ours)
        exec(compile(block, name, "exec"), names)
