"""What the scripts of this folder say: tables and faults of a data set, errors in one line."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

from rich.console import Console
from rich.table import Table

from eventful_det.data.coco_video import CocoVideo, Problem
from eventful_det.errors import UserError, printable
from eventful_det.options import Count, Natural, Range, Seed, convert
from eventful_det.outputs import Stdout, owned, print_error, write_json


def plain_console() -> Console:
    """A console that prints names as they are: brackets in them are no markup. No pipe or disk behind it fails."""
    return Console(file=Stdout(), soft_wrap=True, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see --help")
        self.exit(2)


def number(hint: Any) -> Callable[[str], Any]:
    """What reads a number from a command line, and holds it to its annotation; see `eventful_det.options`."""

    def parse(text: str) -> Any:
        value: Any = text
        with suppress(ValueError):
            value = (int if text.lstrip("+-").isdecimal() else float)(text)
        try:
            return convert(value, hint, "it")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


NATURAL, COUNT, SEED = number(Natural), number(Count), number(Seed)
WORKERS = number(Annotated[int, Range(0, 256)])


def exit_status(
    work: Callable[[], int],
    place: Path,
    stopped: str = "finished files are whole, the others untouched",
    owner: bool = True,
) -> int:
    """Do the work of a script; what ends it early is said in one line.

    Args:
        work: returns the exit status.
        place: where the work is, for errors of the disk that do not tell.
        stopped: what is left when somebody stops it.
        owner: `place` is a folder that no other process may write to meanwhile.
    """
    try:
        with owned(place) if owner else nullcontext():
            return work()
    except UserError as error:
        print_error(str(error))
    except OSError as error:
        print_error(f"{error.filename or place}: {error.strerror or error}")
    except KeyboardInterrupt:
        print_error(f"stopped; {stopped}", kind="")
        return 130
    return 2


def save_report(path: Path, data: CocoVideo, problems: Sequence[Problem]) -> None:
    """Write what a data set holds and everything that was wrong."""
    report = {
        "videos": len(data.videos),
        "frames": sum(len(video.frames) for video in data.videos),
        "boxes": sum(len(frame.annotations) for frame in data.frames),
        "problem_counts": dict(sorted(Counter(p.kind for p in problems).items())),
        "problems": [p._asdict() for p in problems],
    }
    write_json(path, report)


def summary(name: str, data: CocoVideo) -> Table:
    """Videos, frames and boxes of each category."""
    boxes: Counter[int] = Counter()
    frames: Counter[int] = Counter()
    videos: Counter[int] = Counter()
    for video in data.videos:
        seen: set[int] = set()
        for frame in video.frames:
            ids = [a.category_id for a in frame.annotations]
            boxes.update(ids)
            frames.update(set(ids))
            seen.update(ids)
        videos.update(seen)
    table = Table(title=name, show_footer=True)
    table.add_column("category", footer="all")
    for title, total in (
        ("videos", len(data.videos)),
        ("frames", sum(len(video.frames) for video in data.videos)),
        ("boxes", boxes.total()),
    ):
        table.add_column(title, footer=str(total), justify="right")
    for i, category in data.categories:
        table.add_row(printable(category), str(videos[i]), str(frames[i]), str(boxes[i]))
    return table


def show(console: Console, problems: Sequence[Problem], limit: int, report: Path) -> None:
    """Print how many faults of which kind there are, and the first of them."""
    if not problems:
        return
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
    console.print(f"warning: {len(problems)} faults in the data: {counts}", style="yellow")
    for problem in problems[: max(limit, 0)]:
        console.print(printable(f"  {problem.kind}  {problem.file}: {problem.detail}"))
    if len(problems) > limit:
        console.print(printable(f"  ... all of them in {report}"))
