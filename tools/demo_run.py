"""One source of `tools/demo.py`: what may be asked of it, and its way through the network into its files."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import actions
import torch
from common import (
    AnyDetector,
    Gate,
    Texts,
    as_list,
    at_least_one,
    build_gate,
    command,
    progress_bar,
    say,
    uninterrupted,
)
from demo_files import ActionOutputs, Outputs

from eventful_det.data.layouts.exports import VideoInfo
from eventful_det.data.video import VideoSource, open_source
from eventful_det.detectors.labels import relabel
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.evaluation.efficiency import peak_memory
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import Budget
from eventful_det.options import Count, Natural, NonNegative, Positive, Range
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.stream import RecognitionStream
from eventful_det.runtime.budget import BudgetOptions, parse_budget
from eventful_det.runtime.motion.key_frames import parse_hold
from eventful_det.runtime.rescoring import Rescorer
from eventful_det.runtime.stream import Stream
from eventful_det.runtime.tracking import Tracker
from eventful_det.viz import Caption, budget_text

Format = Literal["mot", "cvat", "yolo", "label_studio", "coco"]
AHEAD = 2  # frames that are decoded while the detector runs


@dataclass(frozen=True, kw_only=True)
class Options(actions.NetworkOptions):
    """What may be asked of the demo; configs/demo.yaml explains it."""

    aliases: ClassVar = {**actions.NetworkOptions.aliases, "show": "min_score"}
    boxes: ClassVar = [*actions.NetworkOptions.boxes, "classes", "shadow_every", "format", "compare"]

    source: Texts
    output: str
    classes: Texts | None
    max_frames: Count | None
    budget: float | int | str | None
    max_age: Natural
    bucket: NonNegative
    width: Annotated[int, Range(320, 7680)]
    scene_cuts: bool
    shadow_every: Natural
    format: Format | tuple[Format, ...] | None
    reconnect: NonNegative
    silence: Positive
    on: Literal["ray"] | None
    compare: bool

    @property
    def show(self) -> float:
        """The least score of what is drawn."""
        return 0.5 if self.min_score is None else self.min_score


def build(options: Options, sources: Sequence[str | Path]) -> AnyDetector | Recogniser:
    """The detector or recogniser that the options ask for."""
    network = actions.open_network("demo", options, sources)
    if options.classes is None or isinstance(network, Recogniser):
        return network
    return keep_classes(network, at_least_one(options.classes, "classes"))


def keep_classes(detector: AnyDetector, classes: Sequence[str]) -> AnyDetector:
    """The same detector, reporting some of its classes only."""
    unknown = sorted(set(classes) - set(detector.names))
    if unknown:
        raise UserError(f"classes: no class {', '.join(unknown)}; the weights know {', '.join(detector.names)}")
    labels = {name: None for name in detector.names if name not in classes}
    if isinstance(detector, EventfulRFDETR):
        detector.relabel(labels)
        return detector
    if not isinstance(detector, Detector):
        raise UserError("classes: a compiled engine reports all of its classes; leave classes out")
    kept = Detector(relabel(detector.config, labels))
    kept.load_state_dict(detector.state_dict())
    return kept.eval().to(detector.device)


def run_source(
    options: Options, known: AnyDetector | Recogniser, source: str | Path, directory: Path
) -> dict[str, Any]:
    """Run one source into its folder.

    Raises:
        UserError: the source or the files failed.
    """
    budget = parse_budget(options.budget)
    with open_source(source, ahead=AHEAD, reconnect=options.reconnect, silence=options.silence) as opened:
        kind = ActionRun if isinstance(known, Recogniser) else Run
        return kind(options, budget, known, opened, directory)()


class Run:
    """One source on its way through the detector into its files.

    Args:
        options: of the tool.
        budget: that they ask for.
        network: whose stream it is.
        source: open.
        directory: for the outputs.
    """

    def __init__(self, options: Options, budget: Budget, network: Any, source: VideoSource, directory: Path) -> None:
        self.options, self.source, self.directory, self.network = options, source, directory, network
        gate = self.gate()
        self.stream: Stream | RecognitionStream = self.open_stream(
            budget=gate.selector if budget is None else budget,
            options=BudgetOptions(max_age=options.max_age, bucket=options.bucket),
            rule=gate.rule,
            scene_cuts=options.scene_cuts,
            timing=True,
        )
        self._results = self.results()

    def gate(self) -> Gate:
        """How tokens are recomputed, and which."""
        return build_gate(self.options.gate)

    def open_stream(self, **how: Any) -> Stream | RecognitionStream:
        """The stream, with what options of detectors and recognisers have in common."""
        options = self.options
        return Stream(
            self.network,
            self.source,
            max_frames=options.max_frames,
            short_side=options.short_side,
            long_side=options.long_side,
            hold=parse_hold(options.hold),
            shadow_every=1 if options.compare else options.shadow_every,
            shadow_score=options.show,
            live=options.live,
            **how,
        )

    def results(self) -> Iterator[Any]:
        """The results of the stream, followed from frame to frame."""
        options: Options = self.options
        results: Iterator[Any] = self.stream
        if options.rescore:
            results = map(Rescorer(), results)
        if options.track:
            results = map(Tracker(self.source.fps), results)
        if options.min_score:
            results = (result.at_least(options.min_score) for result in results)
        return results

    def __call__(self) -> dict[str, Any]:
        """Run to the end, write the results however it ends, and return them.

        Raises:
            UserError: the source or the files failed.
            KeyboardInterrupt: someone wanted it to stop.
        """
        first = next(self._results, None)  # the outputs of an earlier run stay until the source has proved to work
        if first is None:
            raise UserError(f"{self.source.name}: too short; a step takes two or more frames of one scene")
        self._dense_seconds = self.time_dense(first)
        outputs = self.make_outputs()
        began, stopped = time.perf_counter() - first.cost.latency, None  # the first frame counts as well
        try:
            with uninterrupted():
                outputs.open()
            self._carry(itertools.chain([first], self._results), outputs, began)
        except BaseException as error:
            stopped = error
        seconds, source = time.perf_counter() - began, self.source
        counts = {"skipped": source.skipped, "dropped": source.dropped, "reconnects": source.reconnects}
        with uninterrupted():
            outputs.drain()
            if stopped is not None and not outputs.frames:
                outputs.discard()
                raise stopped
            results = self._finish(outputs, seconds, counts, stopped)
        print_summary(results)
        say(f"results: {self.directory / 'results.json'}")
        if stopped is not None:
            raise stopped
        return results

    def time_dense(self, first: Any) -> float:
        """Seconds that the dense network takes for such a frame: the median of as many runs as fit into a second."""
        runs = self.dense_stream(itertools.repeat(first.image))
        next(runs)  # warms up
        seconds = [next(runs).cost.latency]
        while sum(seconds) < 1 and len(seconds) < 9:
            seconds.append(next(runs).cost.latency)
        return statistics.median(seconds)

    def dense_stream(self, frames: Iterator[Any]) -> Iterator[Any]:
        """The same network on other frames, all of it on each."""
        sizes: dict[str, Any] = {"short_side": self.options.short_side, "long_side": self.options.long_side}
        return Stream(self.network, frames, rule=Dense(), scene_cuts=False, timing=True, **sizes)

    def make_outputs(self) -> Outputs:
        """The files, not yet open."""
        fps = self.source.fps if self.source.fps and 1 <= self.source.fps <= 240 else 25.0
        options = self.options
        info = VideoInfo(self.source.name, self.network.names, fps, options.show)
        exports = dict.fromkeys(as_list(options.format), info)
        still = self.source.frames == 1 and self.source.fps is None  # no clock: a picture
        return Outputs(self.directory, fps, show=options.show, width=options.width, still=still, exports=exports)

    def _carry(self, results: Iterator[Any], outputs: Outputs, began: float) -> None:
        """Take every frame to the files, and show how far they are."""
        total = min((n for n in (self.source.frames, self.options.max_frames) if n), default=None)
        with progress_bar() as progress:
            task = progress.add_task("", total=total)
            for count, result in enumerate(results, start=1):
                budget = "dense" if self.stream.rule == Dense() else budget_text(self.stream.budget)
                outputs.write(result, Caption(budget, self._dense_seconds))
                rate = count / (time.perf_counter() - began)
                progress.update(task, completed=count, description=f"{rate:.1f} frames/s")

    def _finish(
        self, outputs: Outputs, seconds: float, counts: dict[str, int], stopped: BaseException | None
    ) -> dict[str, Any]:
        summary = outputs.finish()
        results = {
            "command": command(),
            "source": self.source.name,
            "rule": str(self.stream.rule),
            **summary,
            "dense_latency_ms": 1e3 * self._dense_seconds,
            "frames_per_second": summary["frames"] / seconds,
            "state_bytes": self.stream.state_bytes,
            "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 1e6),
            **counts,
            "stopped": _ending(stopped),
            **({"drift": self.stream.drift.summary()} if isinstance(self.stream, Stream) and self.stream.drift else {}),
        }
        outputs.publish(results)
        return results


class ActionRun(Run):
    """One source on its way through a recogniser into its files; frames are tubelets."""

    def gate(self) -> Gate:
        """See `Run`."""
        return actions.own_gate(super().gate())

    def open_stream(self, **how: Any) -> RecognitionStream:
        """See `Run`."""
        return RecognitionStream(self.network, self.source, max_steps=self.options.max_frames, **how)

    def results(self) -> Iterator[Any]:
        """See `Run`."""
        return self.stream

    def dense_stream(self, frames: Iterator[Any]) -> Iterator[Any]:
        """See `Run`."""
        return RecognitionStream(self.network, frames, rule=Dense(), scene_cuts=False, timing=True)

    def make_outputs(self) -> Outputs:
        """See `Run`."""
        config = self.network.config
        steps_per_second = config.fps / (config.stride * config.tubelet[0])
        return ActionOutputs(self.directory, steps_per_second, show=self.options.show, width=self.options.width)


def _ending(stopped: BaseException | None) -> str | None:
    """What ended a run before its source did."""
    if stopped is None or isinstance(stopped, KeyboardInterrupt):
        return None if stopped is None else "interrupted"
    return str(stopped) or type(stopped).__name__


def print_summary(results: dict[str, Any]) -> None:
    """What was found out, and where it is."""
    for name, one in sorted(results["found"].items(), key=lambda item: -item[1]["frames"]):
        say(f"{name}: on {one['frames']} of {results['frames']} frames, at most {one['most']} at once")
    gmacs, dense, share = (results[k]["total"] for k in ("gmacs_per_frame", "dense_gmacs_per_frame", "share_of_dense"))
    say(
        f"{results['frames']} frame{'s' * (results['frames'] != 1)}, {gmacs:.2f} GMACs each: {share:.0%} of dense "
        f"({dense:.2f}); {results['latency_ms']['median']:.0f} ms where the network runs, in the median, "
        f"dense {results['dense_latency_ms']:.0f}; "
        f"{results['frames_per_second']:.1f} frames/s with decoding, drawing and encoding, "
        f"{results['detector_frames_per_second']:.1f} the detector alone"
    )
    if results.get("drift", {}).get("frames"):
        drift = results["drift"]
        agreement = "none has a detection" if drift["agreement_f1"] is None else f"F1 {drift['agreement_f1']:.2f}"
        say(f"agreement with dense on {drift['frames']} frames: {agreement}")
    if results["skipped"]:
        say(f"{results['skipped']} pieces of the source could not be decoded")
    if results["dropped"] or results["reconnects"]:
        say(f"{results['dropped']} frames were overtaken; {results['reconnects']} times lost and found again")
    for path in results["files"]:
        say(path)
