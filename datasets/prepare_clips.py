"""Turn your own clips, with labels or without, into a data set for tools/eval_net.py.

    python datasets/prepare_clips.py a.mp4 b.avi --output .data/clips
    python datasets/prepare_clips.py path/to/annotations.json --output .data/mine \
        --videos dog horsejump --exhaustive dog:dog horsejump:horse

Video files are decoded once into OUTPUT/<clip>/000000.jpg, ... without labels: what gating changes is then judged
against the dense detector. With --in-place they stay what they are and are decoded whenever they are read.
Of a COCO-video JSON the chosen videos are taken with their labels; pictures and video files stay where they are, but
with --extract the frames of video files are decoded into OUTPUT, so that tools/train_net.py can read them in any order.
--exhaustive says which classes were labelled on every object of a video ("dog:dog,cat"; "dog:" for none); boxes of
other classes are then neither right nor wrong. Writes OUTPUT/annotations/val.json. Exit status: 0 when done, 2 when
the request cannot be met.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import cv2
from reporting import COUNT, Parser, exit_status, plain_console
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.video import open_source
from eventful_det.data.video.transforms import Image
from eventful_det.errors import UserError, printable

QUALITY = 95  # of the JPEG frames


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("sources", nargs="+", help="video files, or one COCO-video JSON file")
    add("--output", type=Path, required=True, help="folder of the data set")
    add("--videos", nargs="+", metavar="NAME", help="only these videos of the JSON file")
    add("--exhaustive", nargs="+", default=[], metavar="NAME:CLASSES", help="classes labelled in full, by video")
    add("--in-place", action="store_true", help="leave video files as they are")
    add("--extract", action="store_true", help="decode the video files of the JSON file")
    add("--start", nargs="+", default=[], metavar="NAME:FRAME", help="first frame to take, from 0, by video")
    add("--max-frames", type=COUNT, metavar="N", help="only N frames of each video")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), plain_console()
    return exit_status(lambda: prepare(args, console), args.output, "nothing was recorded")


def prepare(args: argparse.Namespace, console: Console) -> int:
    data = labelled(args, console) if args.sources[0].endswith(".json") else decoded(args, console)
    for video in data.videos:
        if not video.frames:
            raise UserError(f"{video.name} has no frame in the chosen range; see --start and --max-frames")
    path = args.output / "annotations" / "val.json"
    data.save(path)
    frames = sum(len(video.frames) for video in data.videos)
    console.print(printable(f"{len(data.videos)} videos, {frames} frames: {path}"))
    return 0


def labelled(args: argparse.Namespace, console: Console) -> CocoVideo:
    """The chosen videos of a COCO-video file."""
    if len(args.sources) > 1:
        raise UserError(f"give one JSON file, or video files; got {', '.join(args.sources)}")
    data = load_coco_video(args.sources[0])
    names = args.videos or [video.name for video in data.videos]
    by_name = {video.name: video for video in data.videos}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"{args.sources[0]} has no video {', '.join(missing)}; it has {', '.join(sorted(by_name))}")
    for name, classes in exhaustive(args.exhaustive, data).items():
        if name not in names:
            raise UserError(f"--exhaustive {name}: no such video is taken; taken are {', '.join(names)}")
        for frame in by_name[name].frames:
            frame.exhaustive = classes
    videos, starts = [by_name[name] for name in names], first_frames(args.start, names)
    for video in videos:
        video.frames = video.frames[starts.get(video.name, 0) :][: args.max_frames]
    chosen = CocoVideo(data.categories, videos, data.image_root)
    return extracted(chosen, args.output, console) if args.extract else chosen


def extracted(data: CocoVideo, output: Path, console: Console) -> CocoVideo:
    """A data set whose video files are decoded into pictures."""
    for video in data.videos:
        with FrameReader(data) as reader:
            for frame in track(
                video.frames, description=title(video.name), console=console, disable=not video.file_name
            ):
                if video.file_name:
                    picture = output / video.name / f"{frame.frame_id:06d}.jpg"
                    write_picture(picture, reader.read(video, frame))
                else:
                    picture = data.image_path(frame)
                frame.file_name = Path(os.path.relpath(picture, output)).as_posix()
        video.file_name = ""
    return CocoVideo(data.categories, data.videos, output)


def first_frames(entries: list[str], names: Iterable[str]) -> dict[str, int]:
    """The first frame to take by video name, from NAME:FRAME."""
    starts = {}
    for entry in entries:
        name, _, frame = entry.rpartition(":")
        if name not in names or not frame.isdecimal():
            raise UserError(f"--start {entry}: expected NAME:FRAME, with NAME one of {', '.join(names)}")
        starts[name] = int(frame)
    return starts


def exhaustive(entries: list[str], data: CocoVideo) -> dict[str, frozenset[int]]:
    """Category ids by video name, from NAME:CLASS,CLASS."""
    ids, chosen = {name: category for category, name in data.categories}, {}
    for entry in entries:
        video, colon, classes = entry.partition(":")
        names = [name for name in classes.split(",") if name]
        unknown = [name for name in names if name not in ids]
        if not colon or unknown:
            raise UserError(f"--exhaustive {entry}: expected NAME:CLASS,CLASS with classes of {', '.join(ids)}")
        chosen[video] = frozenset(ids[name] for name in names)
    return chosen


def decoded(args: argparse.Namespace, console: Console) -> CocoVideo:
    """The frames of video files, written as JPEG or left there; nobody has labelled them."""
    if args.videos or args.exhaustive or args.extract:
        raise UserError("--videos, --exhaustive and --extract are for a JSON file; leave them out for video files")
    starts = first_frames(args.start, [Path(source).stem for source in args.sources])
    videos: list[Video] = []
    for number, source in enumerate(args.sources, start=1):
        name = Path(source).stem
        if name in {video.name for video in videos}:
            raise UserError(f"two clips are called {name}; rename one of them")
        video = Video(number, name, [], Path(os.path.relpath(source, args.output)).as_posix() if args.in_place else "")
        with open_source(source) as clip:
            first, total = starts.get(name, 0), args.max_frames or clip.frames
            stop = None if args.max_frames is None else first + args.max_frames
            frames = track(islice(clip, first, stop), description=title(name), total=total, console=console)
            for index, frame in enumerate(frames, start=first):
                file, (height, width) = f"{name}/{index:06d}.jpg", frame.image.shape[:2]
                if not args.in_place:
                    write_picture(args.output / file, frame.image)
                image = number * 1_000_000 + index
                video.frames.append(Frame(image, file, width, height, index, labelled=False))
        videos.append(video)
    return CocoVideo([(category.id, category.name) for category in IMAGENET_VID], videos, args.output)


def title(name: str) -> str:
    """A name for a progress bar, which takes brackets for markup."""
    return escape(printable(name))


def write_picture(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
        raise UserError(f"cannot write {path}; is the disk full?")


if __name__ == "__main__":
    sys.exit(main())
