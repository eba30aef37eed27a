"""Make a video detection data set on the spot: nothing to download, exact boxes, ImageNet VID layout.

    python datasets/make_synthetic_vid.py --output .data/synthetic_vid
    python datasets/prepare_imagenet_vid.py .data/synthetic_vid

The same options and seed give the same bytes, whatever the number of workers. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from reporting import WORKERS, Parser, exit_status, plain_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventful_det.data.synthetic import SceneOptions
from eventful_det.data.synthetic.disturbances import DISTURBANCES
from eventful_det.data.synthetic.tree import TreeOptions, is_complete, make_tree


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    tree, scene = TreeOptions(), SceneOptions()
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="new, empty or unfinished folder")
    add("--train-videos", type=int, default=tree.train_videos)
    add("--val-videos", type=int, default=tree.val_videos)
    add("--train-frames", type=int, default=tree.train_frames, help="frames per training video")
    add("--val-frames", type=int, default=tree.val_frames, help="frames per validation video")
    add("--width", type=int, default=scene.width, help="pixels")
    add("--height", type=int, default=scene.height, help="pixels")
    add("--objects", type=int, nargs=2, metavar=("MIN", "MAX"), default=scene.objects, help="objects per shot")
    add("--object-size", type=float, nargs=2, metavar=("MIN", "MAX"), default=scene.object_size, help="by short side")
    add("--noise", type=float, default=scene.noise, help="sensor noise, standard deviation in grey levels")
    add("--exposure-drift", type=float, default=scene.exposure_drift, help="largest relative change of brightness")
    add("--static-fraction", type=float, default=scene.static_fraction, help="videos with a static camera")
    add("--cut-fraction", type=float, default=scene.cut_fraction, help="videos with scene cuts")
    add("--occluder-fraction", type=float, default=scene.occluder_fraction, help="videos with occluders")
    add("--min-visible", type=float, default=scene.min_visible, help="visible fraction below which nothing is labelled")
    add("--min-side", type=int, default=scene.min_side, help="shortest side of a labelled box in pixels")
    add("--seed", type=int, default=tree.seed)
    add("--fps", type=int, default=tree.fps, help="of the mp4 files")
    add("--jpeg-quality", type=int, default=tree.jpeg_quality)
    add("--mp4", action="store_true", help="also write each validation video as Data/VID/snippets/val/*.mp4")
    add(
        "--disturbance",
        choices=["", *DISTURBANCES],
        default=tree.disturbance,
        help="noise, light, weather; none if empty",
    )
    add("--workers", type=WORKERS, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: make(args, console), args.output, "run the same command again to go on")


def make(args: argparse.Namespace, console: Console) -> int:
    args.objects, args.object_size = tuple(args.objects), tuple(args.object_size)
    given = vars(args)
    scene = SceneOptions(**{f.name: given[f.name] for f in fields(SceneOptions) if f.name in given})
    options = TreeOptions(scene, **{f.name: given[f.name] for f in fields(TreeOptions) if f.name in given})
    if is_complete(args.output, options):
        console.print(f"{args.output} is complete already; nothing to do")
        return 0
    columns = (
        TextColumn("rendering videos"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.train_videos + options.val_videos)
        for _ in make_tree(args.output, options, args.workers):
            progress.advance(task)
    frames = options.train_videos * options.train_frames + options.val_videos * options.val_frames
    console.print(f"{frames} frames in {args.output}; next: python datasets/prepare_imagenet_vid.py {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
