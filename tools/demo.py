"""Detect in videos and show what was found, which tokens were recomputed, and what every frame cost.

    python tools/demo.py                                          # a synthetic clip
    python tools/demo.py source=clip.mp4 budget=0.25 max_frames=300
    python tools/demo.py source=clip.mp4 budget=50ms shadow_every=30   # or budget=40GMACs; how far it drifts from dense
    python tools/demo.py source=0 output=outputs/webcam           # until Ctrl-C
    python tools/demo.py source=rtsp://camera/stream              # its newest frames; called again when it is lost
    python tools/demo.py source=pictures/ gate/policy=threshold gate.policy.threshold=2
    python tools/demo.py 'source=clips/*.mp4' classes=[person,dog]  # a folder of outputs for each video

Writes annotated.mp4, detections.jsonl (a line per frame), cost.csv, cost.png and results.json. Whatever ends the
run, the files hold all frames until then. docs/demo.md tells more.
"""

from __future__ import annotations

import glob
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from common import build_gate, console, open_detector, tool, uninterrupted, write_results
from demo_files import Outputs
from omegaconf import DictConfig, ListConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventful_det.data.video import VIDEO_SUFFIXES, VideoSource, open_source
from eventful_det.errors import UserError
from eventful_det.evaluation.efficiency import peak_memory
from eventful_det.gating.dense import Dense
from eventful_det.models.detector import Detector
from eventful_det.models.labels import relabel
from eventful_det.runtime.budget import BudgetOptions, parse_budget
from eventful_det.runtime.rescoring import Rescorer
from eventful_det.runtime.session import StreamResult
from eventful_det.runtime.stream import Stream
from eventful_det.runtime.tracking import Tracker
from eventful_det.viz import Caption, budget_text

AHEAD = 2  # frames that are decoded while the detector runs


def find_sources(source: Any) -> list[Any]:
    """The sources that a config names: those of a list, the videos of a folder or glob, or one of any other kind."""
    if isinstance(source, ListConfig):
        return [found for one in source for found in find_sources(one)]
    if isinstance(source, str) and "://" not in source:
        inside = f"{glob.escape(source)}/*" if Path(source).is_dir() else source
        videos = sorted(path for path in glob.glob(inside) if Path(path).suffix.lower() in VIDEO_SUFFIXES)
        if videos and not Path(source).is_file():
            return videos
    return [source]


def name_folders(output: Path, sources: Sequence[Any]) -> list[Path]:
    """A folder for the outputs of each source: the only one's is `output`, others are named after their source."""
    if len(sources) == 1:
        return [output]
    folders: list[Path] = []
    for source in sources:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(str(source)).stem) or "source"
        numbered = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        folders.append(next(output / n for n in numbered if output / n not in folders))
    return folders


def build_detector(config: DictConfig, sources: Sequence[Any]) -> Detector:
    """The detector of a config, with the classes that it asks for."""
    detector = open_detector(config, sources)
    if config.gate.rule == "dense" and config.budget is not None:
        raise UserError("gate=dense recomputes everything; leave budget out, or choose gate=rows or gate=paper")
    if config.classes is None:
        return detector
    return keep_classes(detector, [config.classes] if isinstance(config.classes, str) else config.classes)


def keep_classes(detector: Detector, classes: Sequence[str]) -> Detector:
    """The same detector, reporting some of its classes only."""
    unknown = sorted(set(classes) - set(detector.names))
    if unknown:
        raise UserError(f"classes: no class {', '.join(unknown)}; the weights know {', '.join(detector.names)}")
    kept = Detector(relabel(detector.config, {name: None for name in detector.names if name not in classes}))
    kept.load_state_dict(detector.state_dict())
    return kept.eval().to(detector.device)


def build_options(config: DictConfig) -> BudgetOptions:
    """What is made of a budget."""
    return BudgetOptions(max_age=config.max_age, bucket=config.bucket)


def time_dense(detector: Detector, first: StreamResult, sizes: dict[str, Any]) -> float:
    """Seconds that the dense detector takes for such a frame: the median of as many runs as fit into a second."""
    runs = detector.stream(itertools.repeat(first.image), rule=Dense(), scene_cuts=False, timing=True, **sizes)
    next(runs)  # warms up
    seconds = [next(runs).cost.latency]
    while sum(seconds) < 1 and len(seconds) < 9:
        seconds.append(next(runs).cost.latency)
    return statistics.median(seconds)


class Run:
    """One source on its way through the detector into its files.

    Args:
        config: of the tool.
        detector: whose stream it is.
        source: open.
        directory: for the outputs.
    """

    def __init__(self, config: DictConfig, detector: Detector, source: VideoSource, directory: Path) -> None:
        self.source, self.directory, self.detector = source, directory, detector
        self._sizes = {"short_side": config.short_side, "long_side": config.long_side}
        gate, budget = build_gate(config.gate), parse_budget(config.budget)
        self.stream: Stream = detector.stream(
            source,
            budget=gate.selector if budget is None else budget,
            options=build_options(config),
            rule=gate.rule,
            max_frames=config.max_frames,
            scene_cuts=config.scene_cuts,
            hold=config.hold,
            shadow_every=1 if config.compare else config.shadow_every,
            shadow_score=config.show,
            timing=True,
            **self._sizes,
        )
        self._look = {"show": config.show, "width": config.width}
        self._limit = config.max_frames
        self._results: Iterator[StreamResult] = map(Rescorer(), self.stream) if config.rescore else self.stream
        if config.track:
            self._results = map(Tracker(source.fps), self._results)

    def __call__(self) -> dict[str, Any]:
        """Run to the end, write the results however it ends, and return them.

        Raises:
            UserError: the source or the files failed.
            KeyboardInterrupt: someone wanted it to stop.
        """
        first = next(self._results)  # the outputs of an earlier run stay until the source has proved to work
        self._dense_seconds = time_dense(self.detector, first, self._sizes)
        began, stopped, outputs = time.perf_counter(), None, None
        try:
            with uninterrupted():
                fps = self.source.fps if self.source.fps and 1 <= self.source.fps <= 240 else 25.0
                outputs = Outputs(self.directory, fps, **self._look)
            self._carry(itertools.chain([first], self._results), outputs)
        except BaseException as error:
            if outputs is None:
                raise
            stopped = error
        with uninterrupted():
            results = self._finish(outputs, began, stopped)
        if stopped is not None:
            raise stopped
        return results

    def _carry(self, results: Iterator[StreamResult], outputs: Outputs) -> None:
        """Take every frame to the files, and show how far they are."""
        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
        total = min((n for n in (self.source.frames, self._limit) if n), default=None)
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            task, began = progress.add_task("", total=total, rate=""), time.perf_counter()
            for count, result in enumerate(results, start=1):
                budget = "dense" if self.stream.rule == Dense() else budget_text(self.stream.budget)
                outputs.write(result, Caption(budget, self._dense_seconds))
                rate = count / (time.perf_counter() - began)
                progress.update(task, completed=count, rate=f"{rate:.1f} frames/s")

    def _finish(self, outputs: Outputs, began: float, stopped: BaseException | None) -> dict[str, Any]:
        outputs.drain()
        seconds = time.perf_counter() - began
        summary = outputs.finish()
        results = {
            "command": " ".join(sys.argv),
            "source": self.source.name,
            "rule": str(self.stream.rule),
            **summary,
            "dense_latency_ms": 1e3 * self._dense_seconds,
            "frames_per_second": summary["frames"] / seconds,
            "state_bytes": self.stream.state_bytes,
            "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 1e6),
            "skipped": self.source.skipped,
            "dropped": self.source.dropped,
            "reconnects": self.source.reconnects,
            "stopped": _ending(stopped),
            **({"drift": self.stream.drift.summary()} if self.stream.drift else {}),
        }
        print_summary(results)
        outputs.publish(results)
        return results


def _ending(stopped: BaseException | None) -> str | None:
    """What ended a run before its source did."""
    if stopped is None or isinstance(stopped, KeyboardInterrupt):
        return None if stopped is None else "interrupted"
    return str(stopped) or type(stopped).__name__


def print_summary(results: dict[str, Any]) -> None:
    """What was found out, and where it is."""
    gmacs, dense, share = (results[k]["total"] for k in ("gmacs_per_frame", "dense_gmacs_per_frame", "share_of_dense"))
    console.print(
        f"{results['frames']} frames, {gmacs:.2f} GMACs each: {share:.0%} of dense ({dense:.2f}); "
        f"median {results['latency_ms']['median']:.0f} ms, dense {results['dense_latency_ms']:.0f}; "
        f"{results['frames_per_second']:.1f} frames/s with decoding, drawing and encoding, "
        f"{results['detector_frames_per_second']:.1f} the detector alone"
    )
    if results.get("drift", {}).get("frames"):
        drift = results["drift"]
        agreement = "none has a detection" if drift["agreement_f1"] is None else f"F1 {drift['agreement_f1']:.2f}"
        console.print(f"agreement with dense on {drift['frames']} frames: {agreement}")
    if results["skipped"]:
        console.print(f"{results['skipped']} pieces of the source could not be decoded")
    if results["dropped"] or results["reconnects"]:
        console.print(f"{results['dropped']} frames were overtaken; {results['reconnects']} times lost and found again")
    for path in results["files"]:
        console.print(path, soft_wrap=True)


def demo(config: DictConfig) -> None:
    """Run every source. One that fails does not keep the others from running."""
    if config.max_frames is not None and config.max_frames < 1:
        raise UserError(f"max_frames must be at least 1, got {config.max_frames}")
    sources, output = find_sources(config.source), Path(config.output)
    detector = build_detector(config, sources)
    runs: dict[str, Any] = {}
    failed: list[str] = []
    for source, directory in zip(sources, name_folders(output, sources), strict=True):
        try:
            with open_source(source, ahead=AHEAD, reconnect=config.reconnect, silence=config.silence) as opened:
                runs[directory.name] = Run(config, detector, opened, directory)()
        except UserError as error:
            if len(sources) == 1:
                raise
            console.print(f"failed: {error}", soft_wrap=True, markup=False)
            failed.append(str(source))
    if len(sources) > 1:
        write_results(output, {"command": " ".join(sys.argv), "runs": runs, "failed": failed})
    if failed:
        raise UserError(f"{len(failed)} of {len(sources)} sources failed: {', '.join(failed)}")


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo")
@tool
def main(config: DictConfig) -> None:
    """Entry point."""
    demo(config)


if __name__ == "__main__":
    main()
