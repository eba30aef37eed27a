"""Turn labels that other programs wrote into COCO-video.

    python datasets/import_annotations.py data/ILSVRC/annotations/imagenet_vid_val.json --output .data/vid/val.json
    python datasets/import_annotations.py yard/labels --images yard.mp4 --output .data/yard.json    # YOLO
    python datasets/import_annotations.py MOT17-02/gt/gt.txt --output .data/mot.json

Knows COCO files (ImageNet VID and DET as mmtracking writes them, the archive of the official Eventful Transformers,
where videos with gaps become one video for each part, CVAT's of a video, plain COCO whose frames lie in a folder for
each video) and labels of a video in YOLO, PASCAL VOC, MOTChallenge and CVAT's XML. Pictures and videos stay where they
are. Writes the file and beside it a .report.json that lists everything that was wrong. Exit status: 0 when
done (faults of the data are warnings), 1 with --strict at any fault, 2 when the request cannot be met.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reporting import NATURAL, Parser, exit_status, plain_console, save_report, show, summary
from rich.console import Console

from eventful_det.data.layouts.video_labels import LAYOUTS, import_annotations
from eventful_det.errors import printable


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("file", type=Path, help="the file, or the folder of files (YOLO, VOC)")
    add("--output", type=Path, required=True, help="the COCO-video JSON file to write")
    add("--layout", choices=LAYOUTS, help="of the file (default: told by its content)")
    add("--images", type=Path, help="the video, or the folder of pictures (default: where the layout has it)")
    add("--classes", type=Path, help="names of the classes, a line each (default: where the layout has it)")
    add("--key-frames", action="store_true", help="only the frames that the field trains on (mmtracking)")
    add("--strict", action="store_true", help="exit 1 at any fault of the data")
    add(
        "--show",
        type=NATURAL,
        default=10,
        metavar="N",
        help="faults to print (default: 10; all are in the report)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: convert(args, console), args.output, owner=False)


def convert(args: argparse.Namespace, console: Console) -> int:
    data, problems = import_annotations(args.file, args.layout, args.images, args.key_frames, args.classes)
    data.save(args.output)
    report = args.output.with_suffix(".report.json")
    save_report(report, data, problems)
    console.print(summary(args.output.stem, data))
    show(console, problems, args.show, report)
    console.print(printable(f"wrote {args.output}"))
    return int(args.strict and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
