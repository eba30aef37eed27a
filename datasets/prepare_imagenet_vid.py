"""Make COCO-video annotation files from an ImageNet VID (and DET) tree.

    python datasets/prepare_imagenet_vid.py /data/ILSVRC2015 --frames-per-video 15 --det-per-class 2000

Writes imagenet_vid_train.json, imagenet_vid_val.json and, where the tree has DET, imagenet_det_train.json
(the categories of VID only), each with a .report.json that lists everything that was wrong. Exit status: 0 when
done (faults of the data are warnings), 1 when a set came out empty or, with --strict, at any fault, 2 when the
request itself cannot be met.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from reporting import COUNT, NATURAL, WORKERS, Parser, exit_status, plain_console, save_report, show, summary
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eventful_det.data.classes import IMAGENET_VID, Category, load_classes
from eventful_det.data.coco_video import CocoVideo, Problem
from eventful_det.data.layouts.imagenet_vid import Source, convert, find_tree, list_folders
from eventful_det.data.layouts.sampling import at_most_per_class, what_is_missing
from eventful_det.errors import UserError, printable
from eventful_det.outputs import print_error

SETS = {"vid_train": ("VID", "train"), "vid_val": ("VID", "val"), "det_train": ("DET", "train")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("root", type=Path, help="the folder that holds Data and Annotations, or its parent")
    add("--sets", nargs="+", choices=SETS, help="what to prepare (default: all that the tree holds)")
    add("--output", type=Path, help="folder of the JSON files (default: <tree>/annotations)")
    add(
        "--frames-per-video",
        type=COUNT,
        metavar="K",
        help="of VID train: K evenly spaced frames (default: all)",
    )
    add(
        "--det-per-class",
        type=COUNT,
        metavar="K",
        help="of DET train: at most K images for each class (default: all)",
    )
    add("--classes", type=Path, help="category table (default: <tree>/classes.json if there, else ImageNet VID)")
    add("--strict", action="store_true", help="exit 1 at any fault of the data")
    add(
        "--show",
        type=NATURAL,
        default=10,
        metavar="N",
        help="faults to print per set (default: 10; all are in the report)",
    )
    add("--workers", type=WORKERS, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: prepare(args, console), args.root, owner=False)


def prepare(args: argparse.Namespace, console: Console) -> int:
    tree = find_tree(args.root)
    table = categories(args.classes, tree)
    output: Path = args.output or tree / "annotations"
    present = [name for name, (subset, split) in SETS.items() if (tree / "Data" / subset / split).is_dir()]
    absent = [name for name in args.sets or () if name not in present]
    if absent or not present:
        missing = [f"Data/{'/'.join(SETS[name])}" for name in absent or SETS]
        raise UserError(f"{tree} lacks {' and '.join(missing)}; unpack the image archives there")

    empty, faults = False, 0
    for name in args.sets or present:
        source = Source(tree, *SETS[name], table)
        per_video = args.frames_per_video if name == "vid_train" else None
        data, problems, lack = read(source, per_video, args.workers, console)
        faults += len(problems)
        if name == "det_train" and args.det_per_class is not None:
            data = at_most_per_class(data, args.det_per_class)
            data.renumber()
        path = output / f"imagenet_{name}.json"
        boxes = sum(len(frame.annotations) for frame in data.frames)
        if boxes:
            data.save(path)
        save_report(path.with_suffix(".report.json"), data, problems)
        console.print(summary(name, data))
        if lack:
            console.print(f"warning: {lack}", style="yellow")
        show(console, problems, args.show, path.with_suffix(".report.json"))
        if boxes:
            console.print(printable(f"wrote {path}") + "\n")
        else:
            empty = True
            print_error(f"{name}: no usable box in {source.annotations}; nothing written")
    return int(empty or (args.strict and faults > 0))


def categories(path: Path | None, tree: Path) -> tuple[Category, ...]:
    if path is None and (tree / "classes.json").is_file():
        path = tree / "classes.json"
    return IMAGENET_VID if path is None else load_classes(path)


def read(
    source: Source, frames_per_video: int | None, workers: int, console: Console
) -> tuple[CocoVideo, list[Problem], str]:
    """A set of the tree, what is wrong with its files, and what it lacks as a whole ("" if nothing is known to)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"listing {source.subset} {source.split}", total=None)
        folders = list_folders(source, frames_per_video)
        total = sum(len(folder.entries) for folder in folders)
        progress.update(task, description=f"reading {source.subset} {source.split}", total=total)
        data, problems = convert(source, folders, workers, lambda frames: progress.advance(task, frames))
    lack = ""
    if source.categories == IMAGENET_VID:
        counted = total if frames_per_video is None else None
        filled = sum(1 for folder in folders if folder.entries)
        lack = what_is_missing(source.subset, source.split, filled, counted)
    return data, problems, lack


if __name__ == "__main__":
    sys.exit(main())
