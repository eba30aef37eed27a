"""Turn your own clips, with labels or without, into a data set for tools/eval_net.py.

    python datasets/prepare_clips.py a.mp4 b.avi --output .data/clips
    python datasets/prepare_clips.py path/to/annotations.json --output .data/mine \
        --videos dog horsejump --exhaustive dog:dog horsejump:horse

Video files are decoded once into OUTPUT/<clip>/000000.jpg, ... without labels: what gating changes is then judged
against the dense detector. Of a COCO-video JSON the chosen videos are taken with their labels; the images stay where
they are. --exhaustive says which classes were labelled on every object of a video ("dog:dog,cat"; "dog:" for none);
boxes of other classes are then neither right nor wrong. Writes OUTPUT/annotations/val.json. Exit status: 0 when done,
2 when the request cannot be met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import track

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.video import open_source
from eventful_det.errors import UserError

QUALITY = 95  # of the JPEG frames


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("sources", nargs="+", help="video files, or one COCO-video JSON file")
    add("--output", type=Path, required=True, help="folder of the data set")
    add("--videos", nargs="+", metavar="NAME", help="only these videos of the JSON file")
    add("--exhaustive", nargs="+", default=[], metavar="NAME:CLASSES", help="classes labelled in full, by video")
    add("--start", nargs="+", default=[], metavar="NAME:FRAME", help="first frame to take, from 0, by video")
    add("--max-frames", type=int, metavar="N", help="only N frames of each video")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console(soft_wrap=True)
    try:
        data = labelled(args) if args.sources[0].endswith(".json") else decoded(args, console)
        for video in data.videos:
            if not video.frames:
                raise UserError(f"{video.name} has no frame in the chosen range; see --start and --max-frames")
        path = args.output / "annotations" / "val.json"
        data.save(path)
        frames = sum(len(video.frames) for video in data.videos)
        console.print(f"{len(data.videos)} videos, {frames} frames: {path}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was recorded", file=sys.stderr)
        return 130
    return 2


def labelled(args: argparse.Namespace) -> CocoVideo:
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
    return CocoVideo(data.categories, videos, data.image_root)


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
    """The frames of video files, written as JPEG; nobody has labelled them."""
    if args.videos or args.exhaustive:
        raise UserError("--videos and --exhaustive choose from a JSON file; leave them out for video files")
    starts = first_frames(args.start, [Path(source).stem for source in args.sources])
    videos: list[Video] = []
    for number, source in enumerate(args.sources, start=1):
        name = Path(source).stem
        if name in {video.name for video in videos}:
            raise UserError(f"two clips are called {name}; rename one of them")
        video = Video(number, name)
        (args.output / name).mkdir(parents=True, exist_ok=True)
        with open_source(source) as clip:
            first, total = starts.get(name, 0), args.max_frames or clip.frames
            stop = None if args.max_frames is None else first + args.max_frames
            frames = track(islice(clip, first, stop), description=name, total=total, console=console)
            for index, frame in enumerate(frames, start=first):
                file, (height, width) = f"{name}/{index:06d}.jpg", frame.image.shape[:2]
                picture = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
                if not cv2.imwrite(str(args.output / file), picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
                    raise UserError(f"cannot write {args.output / file}; is the disk full?")
                image = number * 1_000_000 + index
                video.frames.append(Frame(image, file, width, height, index, labelled=False))
        videos.append(video)
    return CocoVideo([(category.id, category.name) for category in IMAGENET_VID], videos, args.output)


if __name__ == "__main__":
    sys.exit(main())
