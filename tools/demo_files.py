"""The files of a run of tools/demo.py: all hold the same frames, whatever ends the run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import say
from numpy.typing import NDArray

from eventful_det.adapters import to_record
from eventful_det.data.layouts.exports import EXPORTS, VideoInfo, export_detections
from eventful_det.data.video.writer import VideoWriter
from eventful_det.detectors.results import FrameCost
from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.outputs import as_json, reporting
from eventful_det.viz import Caption, annotate, cost_row, plot_cost
from eventful_det.viz.actions import annotate_action

VIDEOS = ("annotated.mp4", "annotated.jpg")  # of a video, of a single picture
HISTORY = 100  # frames in the strip charts
_WAITING = 3  # frames that may wait to be written


class Outputs:
    """Writes annotated.mp4, detections.jsonl (`lines`), cost.csv, cost.png and results.json into a folder.

    Of a single picture the first is annotated.jpg.

    Until the run is over they are called annotated.part.mp4 and so on; then they replace those of an earlier run. A
    thread draws and writes; it goes on where the caller is interrupted. `open` comes first.

    Args:
        directory: made if it does not exist; it belongs to this run, see `owned`.
        fps: frames per second of the video, for frames without a time.
        show, width: of the pictures; see `annotate`.
        still: the source is a single picture.
        exports: formats of `EXPORTS` to write the detections in as well, and what they have to know of the video.
    """

    lines = "detections.jsonl"

    def __init__(
        self,
        directory: Path,
        fps: float,
        *,
        show: float,
        width: int,
        still: bool = False,
        exports: Mapping[str, VideoInfo] | None = None,
    ) -> None:
        self.directory, self.fps, self.show, self.width = directory, fps, show, width
        self._still, self._exports = still, dict(exports or {})
        self.frames = 0
        self._found: dict[str, list[int]] = {}  # of each class: frames that show it, most at once
        self._history: deque[FrameCost] = deque(maxlen=HISTORY)
        self._results: deque[Any] = deque(maxlen=HISTORY)  # of actions
        self._work: Any = None  # of the last key frame
        self._video_path, self._lines_path, self._table_path, self._plot_path = (
            _part(directory / n) for n in self._names[:4]
        )
        self._open_files = contextlib.ExitStack()
        self._rows: csv.DictWriter[str] | None = None
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "demo-writer")
        self._waiting: deque[Future[None]] = deque()

    def open(self) -> None:
        """Begin the files.

        Raises:
            UserError: the folder cannot be written to.
        """
        with reporting(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            # Line by line: complete whatever ends the run.
            self._lines = self._open_files.enter_context(self._lines_path.open("w", buffering=1, encoding="utf-8"))
            self._table = self._open_files.enter_context(self._table_path.open("w", buffering=1, newline=""))
            if not self._still:
                self._video = VideoWriter(self._video_path, self.fps)
                self._open_files.callback(self._video.close)

    def write(self, result: Any, caption: Caption) -> None:
        """Append a frame to every file, soon.

        Raises:
            UserError: this frame or one before it could not be written.
        """
        self._waiting.append(self._thread.submit(self._write, result, caption))
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def drain(self) -> None:
        """Wait until all frames are written, or could not be."""
        self._thread.shutdown()

    def finish(self) -> dict[str, Any]:
        """Write what waits, close the files and sum them up.

        Raises:
            UserError: they cannot be written. Nothing of them is left; those of an earlier run are.
        """
        self.drain()
        try:
            if self._error is not None:
                raise self._error
            with reporting(self._table_path):
                self._open_files.close()
                columns = _read_table(self._table_path)
            self._plot(columns)
            self._export()
        except BaseException:
            self.discard()
            raise
        names = [name for name in self._names if _part(self.directory / name).exists()]
        found = {name: {"frames": frames, "most": most} for name, (frames, most) in self._found.items()}
        return {"found": found, **sum_up(columns), "files": [str(self.directory / name) for name in names]}

    def _plot(self, columns: dict[str, NDArray[np.float64]]) -> None:
        try:
            with reporting(self.directory / "cost.png"):
                plot_cost(columns, self._plot_path)
        except ImportError:
            say("no cost.png, which needs matplotlib: python -m pip install matplotlib")

    def _export(self) -> None:
        for kind, info in self._exports.items():
            with reporting(self.directory / EXPORTS[kind][0]):
                target = _part(self.directory / EXPORTS[kind][0])
                _remove(target)
                export_detections(self._lines_path, kind, target, info)

    def publish(self, results: dict[str, Any]) -> None:
        """Write results.json, and put all files in the places of those of an earlier run.

        Raises:
            UserError: they cannot be written. Nothing of them is left; those of an earlier run are.
        """
        try:
            with written_whole(self.directory / "results.json") as part:
                part.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
                for name in (*VIDEOS, *(name for name, _ in EXPORTS.values())):
                    _remove(self.directory / name)
                for name in self._names:
                    if _part(self.directory / name).exists():
                        os.replace(_part(self.directory / name), self.directory / name)
        except UserError:
            self.discard()
            raise

    def discard(self) -> None:
        """Close what can be closed, and remove what was written."""
        with contextlib.suppress(OSError, UserError):
            self._open_files.close()
        for name in self._names:
            _remove(_part(self.directory / name))

    @property
    def _names(self) -> tuple[str, ...]:
        exports = (EXPORTS[kind][0] for kind in self._exports)
        return VIDEOS[self._still], self.lines, "cost.csv", "cost.png", *exports

    def picture(self, result: Any, caption: Caption) -> NDArray[np.uint8]:
        """What the video shows of a frame; of held ones, the tokens of the key frame before."""
        if result.held:
            result = dataclasses.replace(result, work=self._work)
        self._work = result.work
        return annotate(result, self._history, self.show, caption=caption, width=self.width)

    def shown(self, result: Any) -> list[str]:
        """The class of each object that is drawn."""
        detections = result.detections
        return [result.names[label] for label in detections.labels[detections.scores >= self.show].tolist()]

    def _draw(self, picture: NDArray[np.uint8], timestamp: float | None) -> None:
        if self._still:
            with reporting(self._video_path):
                self._video_path.write_bytes(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes())
        else:
            self._video.write(picture, timestamp)

    def _write(self, result: Any, caption: Caption) -> None:
        if self._error is not None:
            return
        try:
            self._history.append(result.cost)
            picture = self.picture(result, caption)
            row = {"frame": result.frame_index, **cost_row(result.cost), "held": int(result.held)}
            self._draw(picture, result.timestamp)
            for name, count in Counter(self.shown(result)).items():
                frames, most = self._found.get(name, (0, 0))
                self._found[name] = [frames + 1, max(most, count)]
            with reporting(self.directory / self.lines):
                self._lines.write(json.dumps(to_record(result)) + "\n")
            with reporting(self.directory / "cost.csv"):
                if self._rows is None:
                    self._rows = csv.DictWriter(self._table, list(row))
                    self._rows.writeheader()
                self._rows.writerow({key: round(value, 6) for key, value in row.items()})
            self.frames += 1
        except BaseException as error:
            self._error = error
            raise


class ActionOutputs(Outputs):
    """The same of a stream of actions; the lines are in actions.jsonl."""

    lines = "actions.jsonl"

    def picture(self, result: Any, caption: Caption) -> NDArray[np.uint8]:
        """See `Outputs`."""
        self._results.append(result)
        return annotate_action(result, list(self._results), self._history, caption=caption, width=self.width)

    def shown(self, result: Any) -> list[str]:
        """None: actions have no boxes."""
        return []


def _part(path: Path) -> Path:
    """The name of a file that is being written; its suffix stays, so that it can be played."""
    return path.with_suffix(f".part{path.suffix}")


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _read_table(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of cost.csv."""
    with path.open() as file:
        names = file.readline().strip().split(",")
        values = np.loadtxt(file, delimiter=",", ndmin=2)
    return dict(zip(names, values.T, strict=True))


def sum_up(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """What cost.csv says of a whole run, column by column."""
    gmacs, dense = columns["gmacs_total"], columns["dense_total"]
    latency = columns["ms_total"][columns["held"] == 0]
    return {
        "frames": len(gmacs),
        "flushes": int(columns["flush"].sum()),
        "gmacs_per_frame": {"total": gmacs.mean(), "backbone": columns["gmacs_backbone"].mean()},
        "dense_gmacs_per_frame": {"total": dense.mean(), "backbone": columns["dense_backbone"].mean()},
        "share_of_dense": {
            "total": gmacs.sum() / dense.sum(),
            "backbone": columns["gmacs_backbone"].sum() / columns["dense_backbone"].sum(),
        },
        "latency_ms": {"median": float(np.median(latency)), "p95": float(np.percentile(latency, 95))},
        "detector_frames_per_second": len(gmacs) / max(columns["ms_total"].sum() / 1e3, 1e-9),
    }
