"""What tests of the web application share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.vitdet.detector import Detector


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 frames in which something moves."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(path, fps=25) as writer:
        for frame in render_video(SceneOptions(width=144, height=96, frames=12, cut_fraction=0), index=1):
            writer.write(frame.image)
    return path


@pytest.fixture
def server(tiny_detector: Detector, clip: Path) -> Iterator[Any]:
    """A running application (`served.Server`) whose media folder holds `clip`."""
    from served import serving

    with serving(tiny_detector, media=clip.parent, max_bytes=200_000) as running:
        yield running
