"""Make a data set for action recognition on the spot, in which the motion is the class.

    python datasets/make_synthetic_actions.py --output .data/synthetic_actions

Writes a folder per class, as Kinetics is kept: `<output>/<split>/<class>/<camera>/<index>.mp4`. The same options and
seed give the same clips. Files that are there already are kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated

from reporting import NATURAL, SEED, Parser, exit_status, number, plain_console
from rich.console import Console
from rich.progress import track

from eventful_det.data.video.writer import Rate, VideoWriter
from eventful_det.files import written_whole
from eventful_det.options import Range
from eventful_det.recognition.data.synthetic_actions import ACTIONS, ActionOptions, action_of, render_action


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = ActionOptions()
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder")
    add("--train-clips", type=NATURAL, default=1200)
    add("--val-clips", type=NATURAL, default=240)
    add("--width", type=int, default=options.width, help="pixels, even")
    add("--height", type=int, default=options.height, help="pixels, even")
    add("--frames", type=int, default=options.frames, help="of a clip")
    add("--object-size", type=float, nargs=2, metavar=("MIN", "MAX"), default=options.object_size, help="by short side")
    add("--noise", type=float, default=options.noise, help="sensor noise, standard deviation in grey levels")
    add("--camera", choices=("still", "pan", "both"), default=options.camera)
    add("--bystander", type=float, default=options.bystander, help="share of clips with a second, still object")
    add("--fps", type=number(Rate), default=25, help="of the mp4 files")
    add(
        "--quality",
        type=number(Annotated[int, Range(0, 51)]),
        default=16,
        help="x264's constant rate factor; 18 looks flawless, 28 is small",
    )
    add("--seed", type=SEED, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: make(args, console), args.output, "run the same command again to go on")


def make(args: argparse.Namespace, console: Console) -> int:
    options = ActionOptions(
        width=args.width,
        height=args.height,
        frames=args.frames,
        object_size=tuple(args.object_size),
        noise=args.noise,
        camera=args.camera,
        bystander=args.bystander,
    )
    clips = [(split, i) for split in ("train", "val") for i in range(getattr(args, f"{split}_clips"))]
    for split, index in track(clips, "rendering clips", console=console):
        label, camera = action_of(options, index)
        path = args.output / split / ACTIONS[label] / camera / f"{index:05d}.mp4"
        if path.is_file():
            continue
        clip = render_action(options, args.seed, index, split)
        with written_whole(path) as part, VideoWriter(part, args.fps, args.quality) as writer:
            for frame in clip.frames:
                writer.write(frame)
    console.print(f"{len(clips)} clips of {len(ACTIONS)} classes in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
