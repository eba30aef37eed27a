"""The examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from videos import encode

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.checkpoints import files as checkpoints
from eventful_det.detectors.vitdet.detector import Detector

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = ("video.mp4", "corridor.mp4", "gate.mp4")
# What a reader has and a test has not: cameras, patience.
STAND_INS = {'"rtsp://gate/stream"': '"gate.mp4"', "672, 672": "128, 128"}


@pytest.mark.parametrize("name", ["README.md", "docs/live.md", "docs/policies.md", "docs/cameras.md"])
def test_examples(name: str, tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of a page, one block after the other, with a detector that takes no time."""
    monkeypatch.setattr(checkpoints, "load_detector", lambda: tiny_detector)
    monkeypatch.chdir(tmp_path)
    for seed, video in enumerate(VIDEOS):
        frames = render_video(SceneOptions(width=192, height=128, frames=12), seed=seed)
        encode(tmp_path / video, [frame.image for frame in frames])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        for theirs, ours in STAND_INS.items():
            block = block.replace(theirs, ours)
        exec(compile(block, name, "exec"), names)
