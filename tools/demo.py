"""Detect in a video and show what was found, which tokens were recomputed, and what every frame cost.

    python tools/demo.py                                          # a synthetic clip
    python tools/demo.py source=clip.mp4 budget=0.25 max_frames=300
    python tools/demo.py source=clip.mp4 budget=50ms shadow_every=30   # or budget=40GMACs; how far it drifts from dense
    python tools/demo.py source=0 output=outputs/webcam           # until Ctrl-C
    python tools/demo.py source=pictures/ gate/policy=threshold gate.policy.threshold=2

Writes annotated.mp4, detections.jsonl (a line per frame), cost.csv, cost.png and results.json. Whatever ends the
run, the files hold all frames until then.
"""

from __future__ import annotations

import csv
import itertools
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from common import build_rule, choose_device, console, tool, write_results
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventful_det.adapters import to_record
from eventful_det.data.video import VideoSource, open_source
from eventful_det.data.video_writer import VideoWriter
from eventful_det.errors import UserError
from eventful_det.evaluation.efficiency import peak_memory
from eventful_det.models.checkpoints import SYNTHETIC, load_detector
from eventful_det.models.detector import Detector
from eventful_det.models.regions import Detections
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.drift import matches
from eventful_det.runtime.sharing import Terms
from eventful_det.runtime.stream import Stream, StreamResult
from eventful_det.runtime.tracking import Tracker
from eventful_det.viz import annotate, cost_row, plot_cost

HISTORY = 100  # frames in the strip chart


class Outputs:
    """The files of a run, one record per frame in each. Files of an earlier run are replaced."""

    def __init__(self, directory: Path, fps: float, show: float) -> None:
        self.show = show
        self.history: deque[Any] = deque(maxlen=HISTORY)
        names = ("annotated.mp4", "detections.jsonl", "cost.csv", "cost.png", "results.json")
        self.video_path, self.lines_path, self.table_path, self.plot_path, results = (directory / n for n in names)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for stale in (self.plot_path, results):
                stale.unlink(missing_ok=True)
            self.lines = self.lines_path.open("w", buffering=1)  # line by line: complete whatever ends the run
            self.table = self.table_path.open("w", buffering=1, newline="")
        except OSError as error:
            raise UserError(f"cannot write to output={directory}: {error.strerror}") from error
        self.video = VideoWriter(self.video_path, fps)
        self.rows: csv.DictWriter[str] | None = None
        self.frames = 0

    def __len__(self) -> int:
        return self.frames

    def write(self, result: StreamResult) -> None:
        """Append a frame to every file."""
        self.history.append(result.cost)
        self.video.write(annotate(result, self.history, self.show))
        row = {"frame": result.frame_index, **cost_row(result.cost), "held": int(result.held)}
        try:
            self.lines.write(json.dumps(to_record(result)) + "\n")
            if self.rows is None:
                self.rows = csv.DictWriter(self.table, list(row))
                self.rows.writeheader()
            self.frames += 1
            self.rows.writerow({key: round(value, 6) for key, value in row.items()})
        except OSError as error:
            raise UserError(f"cannot write to {self.lines_path.parent}: {error.strerror}") from error

    def close(self) -> dict[str, Any]:
        """Finish the files and sum them up."""
        self.lines.close()
        self.table.close()
        self.video.close()
        columns = np.atleast_1d(np.genfromtxt(self.table_path, delimiter=",", names=True))
        plot_cost({name: columns[name] for name in columns.dtype.names or ()}, self.plot_path)
        gmacs, dense = columns["gmacs_total"], columns["dense_total"]
        latency = columns["ms_total"][columns["held"] == 0]
        paths = (self.video_path, self.lines_path, self.table_path, self.plot_path)
        return {
            "frames": len(columns),
            "flushes": int(columns["flush"].sum()),
            "gmacs_per_frame": {"total": gmacs.mean(), "backbone": columns["gmacs_backbone"].mean()},
            "dense_gmacs_per_frame": {"total": dense.mean(), "backbone": columns["dense_backbone"].mean()},
            "share_of_dense": {
                "total": gmacs.sum() / dense.sum(),
                "backbone": columns["gmacs_backbone"].sum() / columns["dense_backbone"].sum(),
            },
            "latency_ms": {"median": float(np.median(latency)), "p95": float(np.percentile(latency, 95))},
            "files": [str(path) for path in paths],
        }


class Comparison:
    """The dense detector beside the stream, on the same frames."""

    def __init__(self, detector: Detector, show: float, **options: Any) -> None:
        self.show = show
        self.images: deque[Any] = deque()
        self.dense = detector.with_rule(None).stream(self._feed(), **options)
        self.both = self.ours = self.theirs = 0
        self.ratios: list[float] = []

    def _feed(self) -> Iterator[Any]:
        while True:
            yield self.images.popleft()

    def add(self, result: StreamResult) -> None:
        """Run the dense detector on a frame and compare."""
        self.images.append(result.image)
        dense = next(self.dense)
        ours, theirs = [d.scores >= self.show for d in (result.detections, dense.detections)]
        self.both += len(list(matches(select(result.detections, ours), select(dense.detections, theirs))))
        self.ours, self.theirs = self.ours + int(ours.sum()), self.theirs + int(theirs.sum())
        if result.cost.latency and not result.cost.flush:
            self.ratios.append(dense.cost.latency / result.cost.latency)

    def summary(self) -> dict[str, Any]:
        """F1 of our detections with the dense ones as truth; how many times faster a frame is, flushes excluded."""
        found = self.ours + self.theirs
        return {
            "agreement_f1": 2 * self.both / found if found else None,
            "detections": self.ours,
            "dense_detections": self.theirs,
            "times_faster_median": float(np.median(self.ratios)) if self.ratios else None,
        }


def select(detections: Detections, chosen: Any) -> Detections:
    """Some of the detections."""
    return detections.map(lambda values: values[chosen])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that every file holds the same frames."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def build_terms(config: DictConfig) -> Terms | None:
    """The terms of a budget; None where none are given."""
    given = {name: config[name] for name in ("max_age", "bank") if config[name] is not None}
    return Terms(**given) if given else None


def open_stream(config: DictConfig, source: VideoSource) -> tuple[Stream, Comparison | None]:
    """The stream of a config, and the dense one beside it when asked for."""
    weights = config.weights or (SYNTHETIC if str(config.source).startswith("synthetic") else None)
    device = choose_device(config.device)
    detector = load_detector(weights, config.labels).to(device).with_rule(build_rule(config.gate))
    if detector.rule is None and config.budget is not None:
        raise UserError("gate=dense recomputes everything; leave budget out, or choose gate=rows or gate=paper")
    sizes = {"short_side": config.short_side, "long_side": config.long_side}
    options = {"budget": parse_budget(config.budget), "scene_cuts": config.scene_cuts, "hold": config.hold}
    options |= {"shadow_every": config.shadow_every, "terms": build_terms(config)}
    stream = detector.stream(source, max_frames=config.max_frames, **options, **sizes)
    return stream, Comparison(detector, config.show, scene_cuts=False, **sizes) if config.compare else None


def run(stream: Iterator[StreamResult], outputs: Outputs, comparison: Comparison | None, total: int | None) -> None:
    """Carry every frame to the outputs."""
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task, began = progress.add_task("", total=total, rate=""), time.perf_counter()
        for count, result in enumerate(stream, start=1):
            with uninterrupted():
                outputs.write(result)
                if comparison is not None:
                    comparison.add(result)
            rate = count / (time.perf_counter() - began)
            progress.update(task, completed=count, rate=f"{rate:.1f} frames/s")


def demo(config: DictConfig) -> None:
    """Run, and write the results however the run ends."""
    if config.max_frames is not None and config.max_frames < 1:
        raise UserError(f"max_frames must be at least 1, got {config.max_frames}")
    directory, stopped = Path(config.output), None
    with open_source(config.source) as source:
        stream, comparison = open_stream(config, source)
        tracked = map(Tracker(source.fps), stream) if config.track else stream
        first = next(tracked)  # the outputs of an earlier run stay until the source has proved to work
        fps = source.fps if source.fps and 1 <= source.fps <= 240 else 25.0
        total = min((n for n in (source.frames, config.max_frames) if n), default=None)
        outputs = Outputs(directory, fps, config.show)
        began = time.perf_counter()
        try:
            run(itertools.chain([first], tracked), outputs, comparison, total)
        except BaseException as error:
            if outputs.rows is None:
                raise
            stopped = error
        seconds = time.perf_counter() - began
        with uninterrupted():
            results = {
                "command": " ".join(sys.argv),
                "source": source.name,
                "rule": str(stream.detector.rule or "dense"),
                **outputs.close(),
                "frames_per_second": (len(outputs) - 1) / seconds,
                "state_bytes": stream.state_bytes,
                "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 1e6),
                "skipped": source.skipped,
                "stopped": None if stopped is None else (str(stopped) or "interrupted"),
                **({"compare": comparison.summary()} if comparison else {}),
                **({"drift": stream.drift.summary()} if stream.drift else {}),
            }
            print_summary(results)
            write_results(directory, results)
    if stopped is not None:
        raise stopped


def print_summary(results: dict[str, Any]) -> None:
    """What was found out, and where it is."""
    gmacs, dense, share = (results[k]["total"] for k in ("gmacs_per_frame", "dense_gmacs_per_frame", "share_of_dense"))
    console.print(
        f"{results['frames']} frames, {gmacs:.2f} GMACs each: {share:.0%} of dense ({dense:.2f}); "
        f"median {results['latency_ms']['median']:.0f} ms; "
        f"{results['frames_per_second']:.1f} frames/s with decoding, drawing and encoding"
    )
    if results.get("drift", {}).get("frames"):
        drift = results["drift"]
        agreement = "none has a detection" if drift["agreement_f1"] is None else f"F1 {drift['agreement_f1']:.2f}"
        console.print(f"agreement with dense on {drift['frames']} frames: {agreement}")
    if results["skipped"]:
        console.print(f"{results['skipped']} pieces of the source could not be decoded")
    for path in results["files"]:
        console.print(path, soft_wrap=True)


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo")
@tool
def main(config: DictConfig) -> None:
    """Entry point."""
    demo(config)


if __name__ == "__main__":
    main()
