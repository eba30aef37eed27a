"""Set labelled stills in motion: clips with a moving camera and labels on every frame, to measure AP under gates.

    python datasets/prepare_motion.py .data/stills/annotations/val.json --output .data/motion --clips 100

Real video with a moving camera and complete labels is rare. Here a camera drifts evenly over each picture and zooms,
and objects cut out of other pictures fly through. The pictures are real, the motion is not: nothing turns or blurs, and
all of a picture moves alike. Classes that a picture was not searched for are neither right nor wrong on its frames.

The same options and seed give the same clips. Writes OUTPUT/<clip>/000000.jpg, ... and OUTPUT/annotations/val.json.
Exit status: 0 when done, 2 when the request cannot be met.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from prepare_clips import write_picture
from reporting import COUNT, SEED, Parser, exit_status, plain_console
from rich.console import Console
from rich.progress import track

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.clips import ClipOptions, ClipSet
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.training_set import Target
from eventful_det.errors import UserError

SHAPES = ((320, 320), (320, 448), (320, 576), (448, 320))  # (height, width) of frames; a picture takes the likest


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("stills", help="COCO (or COCO-video) JSON file with labels")
    add("--output", type=Path, required=True, help="folder of the data set")
    add(
        "--clips",
        type=COUNT,
        default=100,
        help="number of clips; each picture is used once before any is used again",
    )
    add("--frames", type=COUNT, default=16, help="frames of a clip")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), default=(1.15, 1.5), help="1 = pictures fit in")
    add("--static", type=float, default=0.0, help="share of the clips whose camera stands still")
    add("--pan", type=float, default=0.03, help="fastest way of the camera per frame, as a share of the frame")
    add("--zoom", type=float, default=0.01, help="fastest relative growth per frame")
    add("--sprites", type=int, default=1, help="most objects of other pictures that fly through a clip")
    add("--speed", type=float, default=0.03, help="their fastest way per frame, as a share of the width")
    add("--noise", type=float, default=3.0, help="largest standard deviation of sensor noise in grey levels")
    add("--seed", type=SEED, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: prepare(args, console), args.output, "nothing was recorded")


def prepare(args: argparse.Namespace, console: Console) -> int:
    names = ("static", "pan", "zoom", "sprites", "speed", "noise")
    options = ClipOptions(length=args.frames, **{name: getattr(args, name) for name in names})
    plain = Augmentation(SHAPES, tuple(args.scale), flip=0.0, colour=0.0)
    stills = load_coco_video(args.stills)
    if any(len(video.frames) > 1 for video in stills.videos):
        raise UserError(f"{args.stills} holds videos, which move already; expected stills: a COCO file without videos")
    clips = ClipSet(stills, plain, options, args.seed)
    path = args.output / "annotations" / "val.json"
    if path.resolve() == Path(args.stills).resolve():
        raise UserError(f"{path} would take the place of the stills; choose another --output")
    path.unlink(missing_ok=True)  # a run that is stopped must not leave labels of an earlier one beside its pictures
    numbers = track(range(args.clips), description="clips", console=console)
    videos = [written(n, clips, args.output) for n in numbers]
    data = CocoVideo(stills.categories, videos, args.output)
    data.renumber()
    data.save(path)
    console.print(f"{args.clips} clips, {args.clips * args.frames} frames: {path}")
    return 0


def written(n: int, clips: ClipSet, output: Path) -> Video:
    """Clip n, its frames as pictures."""
    still = clips.frame_of(n)
    unlike = [abs(math.log(still.width / still.height * height / width)) for height, width in SHAPES]
    pictures, targets = clips[n, unlike.index(min(unlike))]
    video = Video(n + 1, f"{n:05d}")
    categories = [category for category, _ in clips.data.categories]
    for i, (picture, target) in enumerate(zip(pictures, targets, strict=True)):
        file, (height, width) = f"{video.name}/{i:06d}.jpg", picture.shape[1:]
        write_picture(output / file, picture.permute(1, 2, 0).numpy())
        objects = objects_of(target, categories)
        frame = Frame(video.id * 1_000_000 + i, file, width, height, i, objects, exhaustive=still.exhaustive)
        video.frames.append(frame)
    return video


def objects_of(target: Target, categories: Sequence[int]) -> list[Annotation]:
    """The objects of a frame."""
    found = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
    return [Annotation(categories[label], (x1, y1, x2, y2)) for (x1, y1, x2, y2), label in found]


if __name__ == "__main__":
    sys.exit(main())
