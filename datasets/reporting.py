"""What the scripts of this folder say: tables and faults of a data set, errors in one line."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eventful_det.data.coco_video import CocoVideo, Problem
from eventful_det.errors import UserError, printable


def plain_console() -> Console:
    """A console that prints names as they are: brackets in them are no markup."""
    return Console(soft_wrap=True, markup=False, highlight=False)


def exit_status(
    work: Callable[[], int], place: Path, stopped: str = "finished files are whole, the others untouched"
) -> int:
    """Do the work of a script; what ends it early is said in one line.

    Args:
        work: returns the exit status.
        place: where the work is, for errors of the disk that do not tell.
        stopped: what is left when somebody stops it.
    """
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(printable(f"error: {error.filename or place}: {error.strerror or error}"), file=sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return 130
    return 2


def save_report(path: Path, data: CocoVideo, problems: Sequence[Problem]) -> None:
    """Write what a data set holds and everything that was wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "videos": len(data.videos),
        "frames": sum(len(video.frames) for video in data.videos),
        "boxes": sum(len(frame.annotations) for frame in data.frames),
        "problem_counts": dict(sorted(Counter(p.kind for p in problems).items())),
        "problems": [p._asdict() for p in problems],
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


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
