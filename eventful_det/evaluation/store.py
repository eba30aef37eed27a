"""Results kept video by video while an evaluation runs, so that a killed run goes on where it was.

A kept result is used again only if nothing it depends on has changed: weights, code, frames, the method and its
options. Processes may share a store: each writes whole files of its own videos.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventful_det.data.coco_video import Video
from eventful_det.models.cost import FrameCost

if TYPE_CHECKING:
    from eventful_det.evaluation.sweep import Method, VideoRun

SESSION = uuid.uuid4().hex  # of this process; times are compared only within one


class ResultStore:
    """A folder of finished videos.

    Args:
        directory: made when needed.
        about: whatever else the results depend on, as JSON values: the weights, the options of the run.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.directory, self.about = directory, {**about, "code": code_hash()}

    def load(self, method: Method, video: Video) -> VideoRun | None:
        """What the method did on the video, or None where that is not known."""
        from eventful_det.evaluation.sweep import VideoRun

        try:
            kept = json.loads(self._path(method, video).read_text())
            if kept["images"] != [frame.image_id for frame in video.frames]:
                return None
            costs = [FrameCost(**cost) for cost in kept["costs"]]
            return VideoRun(video, kept["results"], costs, kept["state_bytes"], kept["peak_bytes"], kept["session"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, method: Method, run: VideoRun) -> None:
        """Keep what a method did on a video; the file is whole or not there."""
        path = self._path(method, run.video)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "images": [frame.image_id for frame in run.video.frames],
            "results": run.results,
            "costs": [asdict(cost) for cost in run.costs],
            "state_bytes": run.state_bytes,
            "peak_bytes": run.peak_bytes,
            "session": run.session,
        }
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(record))
        os.replace(part, path)

    def _path(self, method: Method, video: Video) -> Path:
        spec = json.dumps({**self.about, "method": [repr(method.rule), method.hold, method.scale]}, sort_keys=True)
        name = re.sub(r"[^\w.]+", "_", method.name)
        return self.directory / f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}" / f"{video.id}.json"


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 of the package's own code: results of other code are not these results."""
    root = Path(str(resources.files("eventful_det")))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
