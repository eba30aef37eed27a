"""Detect in videos and show what was found, which tokens were recomputed, and what every frame cost.

    python tools/demo.py                                          # a synthetic clip
    python tools/demo.py source=clip.mp4 budget=0.25 max_frames=300
    python tools/demo.py source=clip.mp4 budget=50ms shadow_every=30   # or budget=40GMACs; how far it drifts from dense
    python tools/demo.py source=0 output=outputs/webcam           # until Ctrl-C
    python tools/demo.py source=rtsp://camera/stream live=true    # boxes on every frame at once, detector in a thread
    python tools/demo.py source=pictures/ gate/policy=threshold gate.policy.threshold=2
    python tools/demo.py source=kitchen.mp4 weights=vivit_tiny_synthetic   # recognise actions
    python tools/demo.py source=clip.mp4 track=true format=[mot,cvat]   # tracks for other programs
    python tools/demo.py 'source=clips/*.mp4' classes=[person,dog]  # a folder of outputs for each video

Writes annotated.mp4, detections.jsonl (a line per frame), cost.csv, cost.png and results.json. Whatever ends the
run, the files hold all frames until then. docs/demo.md tells more.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import AnyDetector, at_least_one, command, say, write_results
from demo_run import Options, build, run_source

from eventful_det.data.video import VIDEO_SUFFIXES, home_path
from eventful_det.errors import UserError, printable
from eventful_det.outputs import file_names, owned
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.runtime.budget import parse_budget
from eventful_det.runtime.tracking import Tracker


class Outcome(NamedTuple):
    """What became of a source: the results of its run, or what was wrong."""

    directory: Path
    source: str | Path
    result: dict[str, Any] | UserError


def run(options: Options) -> None:
    """Run every source. One that fails does not keep the others from running."""
    parse_budget(options.budget)
    if options.track:
        Tracker()  # tells now what is missing
    sources, output = find_sources(at_least_one(options.source, "source")), Path(options.output)
    named = dict(zip(name_folders(output, sources), sources, strict=True))
    if options.on is None:
        outcomes = run_here(options, build(options, sources), named)
    else:
        from archive import run_on_ray

        outcomes = run_on_ray(options, named)
    with owned(output):
        finish(options, outcomes, len(sources))


def find_sources(sources: Sequence[str]) -> list[str | Path]:
    """The sources that a config names: those of a list, the videos of a folder or glob, or one of any other kind.

    What is there is a path, whatever its name means otherwise.
    """
    return [found for source in sources for found in _find(source)]


def _find(source: str) -> list[str | Path]:
    if "://" in source:
        return [source]
    path = home_path(source)
    if path.is_file():
        return [path]
    inside = f"{glob.escape(str(path))}/*" if path.is_dir() else str(path)
    videos = sorted(path for path in map(Path, glob.glob(inside)) if path.suffix.lower() in VIDEO_SUFFIXES)
    if videos:
        return list(videos)
    camera = re.fullmatch(r"[0-9]|[1-9][0-9]{1,2}", source)
    return [path if path.exists() or (source.isdigit() and not camera) else source]


def name_folders(output: Path, sources: Sequence[str | Path]) -> list[Path]:
    """A folder for the outputs of each source: the only one's is `output`, others are named after their source."""
    if len(sources) == 1:
        return [output]
    return [output / name for name in file_names((Path(printable(str(s))).stem for s in sources), {"results.json"})]


def run_here(
    options: Options, known: AnyDetector | Recogniser, sources: Mapping[Path, str | Path]
) -> Iterator[Outcome]:
    """Run one source after the other."""
    for directory, source in sources.items():
        try:
            yield Outcome(directory, source, run_source(options, known, source, directory))
        except UserError as error:
            yield Outcome(directory, source, error)


def finish(options: Options, outcomes: Iterable[Outcome], total: int) -> None:
    """Say what became of each source, and sum up several of them.

    Raises:
        UserError: some failed.
    """
    runs: dict[str, Any] = {}
    failed: list[str] = []
    for directory, source, result in outcomes:
        if not isinstance(result, UserError):
            runs[directory.name] = result
            continue
        if total == 1:
            raise result
        say(f"failed: {result}")
        failed.append(printable(str(source)))
    if total > 1:
        write_results(Path(options.output), {"command": command(), "runs": runs, "failed": failed})
    if failed:
        raise UserError(f"{len(failed)} of {total} sources failed: {', '.join(failed)}")


if __name__ == "__main__":
    from command_line import start

    start("demo")
