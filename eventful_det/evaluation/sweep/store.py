"""Results kept video by video while an evaluation runs, so that a killed run goes on where it was.

A kept result is used again only if nothing it depends on has changed: weights, code, data and its pictures, the method
and its options, the number of streams, on which times depend. Processes may share a store: each writes whole files of
its own videos.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from eventful_det.data.coco_video import CocoVideo, Video
from eventful_det.detectors.results import FrameCost
from eventful_det.evaluation.sweep.runs import Method, VideoRun
from eventful_det.outputs import write_text

_PLAIN = ("results", "latencies", "state_bytes", "peak_bytes", "session")  # what JSON holds as it is


class Store(Protocol):
    """Where finished videos are kept."""

    def load(self, method: Method, video: Video) -> VideoRun | None:
        """What the method did on the video, or None where that is not known."""

    def save(self, method: Method, run: VideoRun) -> None:
        """Keep what a method did on a video."""


class MemoryStore:
    """Keeps finished videos while the process lives."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], VideoRun] = {}

    def load(self, method: Method, video: Video) -> VideoRun | None:
        """What the method did on the video, or None where that is not known."""
        return self._kept.get((repr(method), video.id))

    def save(self, method: Method, run: VideoRun) -> None:
        """Keep what a method did on a video."""
        self._kept[repr(method), run.video.id] = run


class ResultStore:
    """A folder of finished videos.

    Args:
        directory: made when needed.
        about: whatever else the results depend on, as JSON values: the weights, the data set, the options of the run.
        data: whose videos are run; their files are known by their places, sizes and times.
    """

    def __init__(self, directory: Path, about: Mapping[str, object], data: CocoVideo) -> None:
        self.directory, self.about, self._data = directory, {**about, "code": code_hash()}, data
        self._files: dict[int, str] = {}

    def load(self, method: Method, video: Video) -> VideoRun | None:
        """What the method did on the video, or None where that is not known."""
        try:
            kept = json.loads(self._path(method, video).read_text())
            skipped = {int(image): reason for image, reason in kept["skipped"].items()}
            frames = [frame for frame in video.frames if frame.image_id not in skipped]
            if kept["images"] != [frame.image_id for frame in frames] or len(frames) + len(skipped) != len(
                video.frames
            ):
                return None
            return VideoRun(
                video=dataclasses.replace(video, frames=frames),
                costs=[FrameCost(**cost) for cost in kept["costs"]],
                skipped=skipped,
                **{key: kept[key] for key in _PLAIN},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, method: Method, run: VideoRun) -> None:
        """Keep what a method did on a video; the file is whole or not there."""
        path = self._path(method, run.video)
        record = {key: getattr(run, key) for key in _PLAIN}
        record["images"] = [frame.image_id for frame in run.video.frames]
        record["costs"] = [dataclasses.asdict(cost) for cost in run.costs]
        record["skipped"] = run.skipped
        write_text(path, json.dumps(record))

    def _path(self, method: Method, video: Video) -> Path:
        options = repr(dataclasses.replace(method, curve="", setting=None))
        about = {**self.about, "method": options, "files": self._files_hash(video)}
        spec = json.dumps(about, sort_keys=True)
        name = re.sub(r"[^\w.]+", "_", method.name)
        return self.directory / f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}" / f"{video.id}.json"

    def _files_hash(self, video: Video) -> str:
        if video.id not in self._files:
            self._files[video.id] = files_hash(self._data, video.id)
        return self._files[video.id]


def files_hash(data: CocoVideo, video_id: int) -> str:
    """SHA-256 of where the files of a video lie, how long they are and when they were written."""
    (video,) = (video for video in data.videos if video.id == video_id)
    root = data.image_root.resolve()
    names = [video.file_name] if video.file_name else [frame.file_name for frame in video.frames]
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        about = path.stat() if path.exists() else None
        identity = about and (about.st_ino, about.st_size, about.st_mtime_ns)  # a link may lead elsewhere now
        digest.update(repr((str(path), identity)).encode(errors="surrogateescape"))
    return digest.hexdigest()


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
