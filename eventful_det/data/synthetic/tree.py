"""Write synthetic videos to disk in exactly the ILSVRC VID layout.

::

    ROOT/Data/VID/train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000/000000.JPEG
    ROOT/Data/VID/val/ILSVRC2015_val_00000000/000000.JPEG
    ROOT/Data/VID/snippets/val/ILSVRC2015_val_00000000.mp4      (on request)
    ROOT/Annotations/VID/...                                    one .xml per .JPEG
    ROOT/ImageSets/VID/{train,val}.txt
    ROOT/classes.json  ROOT/synthetic.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import cv2

from eventful_det.data.classes import SYNTHETIC_SHAPES, classes_json
from eventful_det.data.parallel import map_ordered
from eventful_det.data.synthetic import SceneOptions, SyntheticFrame, SyntheticObject, render_video, video_facts
from eventful_det.data.synthetic.disturbances import DISTURBANCES, disturb
from eventful_det.data.video.writer import Rate, VideoWriter
from eventful_det.errors import UserError
from eventful_det.files import written_whole
from eventful_det.options import Count, Natural, Range, Seed, convert_fields, nearest
from eventful_det.outputs import LOCK, write_text

FACTS_FILE = "synthetic.json"
VIDEOS_PER_FOLDER = 1000  # ILSVRC keeps at most a thousand training videos in one folder


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What a synthetic data set holds; ``scene.frames`` is set per split, ``disturbance`` befalls all videos."""

    scene: SceneOptions = field(default_factory=SceneOptions)
    train_videos: Natural = 640
    val_videos: Natural = 16
    train_frames: Count = 6
    val_frames: Count = 60
    seed: Seed = 0
    fps: Rate = 25
    jpeg_quality: Annotated[int, Range(1, 100)] = 90
    mp4: bool = False
    disturbance: str = ""

    def __post_init__(self) -> None:
        convert_fields(self, "synthetic set")
        if self.disturbance and self.disturbance not in DISTURBANCES:
            raise UserError(
                f"synthetic set: no disturbance {self.disturbance!r}; {nearest(self.disturbance, DISTURBANCES)}"
            )
        if not self.train_videos + self.val_videos:
            raise UserError("synthetic set: no videos asked for; ask for at least one training or validation video")

    def videos(self, split: str) -> int:
        return self.train_videos if split == "train" else self.val_videos

    def of_split(self, split: str) -> SceneOptions:
        return replace(self.scene, frames=self.train_frames if split == "train" else self.val_frames)


def video_name(split: str, index: int) -> str:
    """Path of a video below ``Data/VID/<split>``."""
    name = f"ILSVRC2015_{split}_{index:08d}"
    return f"ILSVRC2015_VID_train_{index // VIDEOS_PER_FOLDER:04d}/{name}" if split == "train" else name


def make_tree(root: Path, options: TreeOptions, workers: int = 1) -> Iterator[tuple[str, int]]:
    """Write the data set, yielding (split, index) as videos get done.

    Videos that an interrupted run already finished are kept. The files do not depend on ``workers``.

    Raises:
        UserError: if ``root`` holds something else.
    """
    facts = _facts(options)
    _claim(root, facts)
    jobs = [(split, i) for split in ("train", "val") for i in range(options.videos(split))]
    _write_lists(root, options)
    yield from map_ordered(partial(write_video, root, options), jobs, workers)
    write_text(root / FACTS_FILE, json.dumps({**facts, "complete": True}, indent=1) + "\n")


def is_complete(root: Path, options: TreeOptions) -> bool:
    """Whether ``root`` already holds exactly this data set."""
    try:
        found = json.loads((root / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == {**_facts(options), "complete": True})


def write_video(root: Path, options: TreeOptions, job: tuple[str, int]) -> tuple[str, int]:
    """Render one video, ``job`` = (split, index), into the tree; does nothing when it is already there.

    The annotation folder appears last and at once, so its presence says that the video is whole.
    """
    split, index = job
    name = video_name(split, index)
    annotations = root / "Annotations/VID" / split / name
    snippet = root / "Data/VID/snippets" / split / f"{name}.mp4" if options.mp4 and split == "val" else None
    if annotations.is_dir() and (snippet is None or snippet.is_file()):
        return job
    images = root / "Data/VID" / split / name
    unfinished = annotations.with_name(annotations.name + ".part")
    for folder in (images, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality]
    scene = options.of_split(split)
    frames = render_video(scene, options.seed, index, split)
    if options.disturbance:
        frames = disturb(frames, options.disturbance, index)
    for i, frame in enumerate(frames if snippet is None else _also_to_mp4(frames, snippet, options.fps)):
        _, data = cv2.imencode(".jpg", frame.image[..., ::-1], quality)
        (images / f"{i:06d}.JPEG").write_bytes(data.tobytes())
        text = annotation_xml(name, f"{i:06d}", (scene.width, scene.height), frame.objects)
        (unfinished / f"{i:06d}.xml").write_text(text, encoding="utf-8")
    shutil.rmtree(annotations, ignore_errors=True)
    unfinished.rename(annotations)
    return job


def annotation_xml(folder: str, filename: str, size: tuple[int, int], objects: Sequence[SyntheticObject]) -> str:
    """One frame's annotation in the elements and the order of ILSVRC; ``size`` is (width, height)."""
    lines = [
        "<annotation>",
        f"\t<folder>{escape(folder)}</folder>",
        f"\t<filename>{escape(filename)}</filename>",
        "\t<source>\n\t\t<database>eventful_det synthetic</database>\n\t</source>",
        f"\t<size>\n\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t</size>",
    ]
    for o in objects:
        x1, y1, x2, y2 = (int(v) for v in o.box)
        lines += [
            "\t<object>",
            f"\t\t<trackid>{o.track_id}</trackid>",
            f"\t\t<name>{SYNTHETIC_SHAPES[o.category - 1].wnid}</name>",
            "\t\t<bndbox>",
            f"\t\t\t<xmax>{x2}</xmax>\n\t\t\t<xmin>{x1}</xmin>\n\t\t\t<ymax>{y2}</ymax>\n\t\t\t<ymin>{y1}</ymin>",
            "\t\t</bndbox>",
            f"\t\t<occluded>{int(o.occluded)}</occluded>",
            "\t\t<generated>0</generated>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>"]) + "\n"


def _also_to_mp4(frames: Iterator[SyntheticFrame], path: Path, fps: int) -> Iterator[SyntheticFrame]:
    """Pass frames through while encoding them as H.264."""
    with written_whole(path) as part, VideoWriter(part, fps, quality=18) as writer:
        for frame in frames:
            writer.write(frame.image)
            yield frame


def _claim(root: Path, facts: dict[str, object]) -> None:
    """Mark an empty folder as ours, or make sure that it is this very data set, unfinished."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; choose a folder as --output")
    if root.is_dir() and any(path.name != LOCK for path in root.iterdir()):
        try:
            found = json.loads((root / FACTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{root} is not empty and holds no {FACTS_FILE}; choose a new or empty --output") from None
        if not isinstance(found, dict) or {**found, "complete": False} != {**facts, "complete": False}:
            raise UserError(
                f"{root} holds a synthetic set made with other options (see {FACTS_FILE}); "
                "choose another --output or delete it"
            )
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / FACTS_FILE, json.dumps({**facts, "complete": False}, indent=1) + "\n")
    write_text(root / "classes.json", classes_json(SYNTHETIC_SHAPES))


def _facts(options: TreeOptions) -> dict[str, object]:
    videos = {
        f"{split}/{video_name(split, i)}": asdict(video_facts(options.of_split(split), options.seed, i, split))
        for split in ("train", "val")
        for i in range(options.videos(split))
    }
    told = json.loads(json.dumps(asdict(options)))  # tuples as lists, as they come back from the file
    del told["scene"]["frames"]
    if not options.disturbance:
        del told["disturbance"]
    return {"generator": "eventful_det.data.synthetic", "version": 1, "options": told, "videos": videos}


def _write_lists(root: Path, options: TreeOptions) -> None:
    """As in ILSVRC: the training list names videos ("<video> 1"), val.txt names frames and numbers them."""
    folder = root / "ImageSets/VID"
    folder.mkdir(parents=True, exist_ok=True)
    train = [video_name("train", i) for i in range(options.train_videos)]
    val = [video_name("val", i) for i in range(options.val_videos)]
    frames = [f"{video}/{i:06d}" for video in val for i in range(options.val_frames)]
    write_text(folder / "train.txt", "".join(f"{video} 1\n" for video in train))
    write_text(folder / "val.txt", "".join(f"{frame} {n}\n" for n, frame in enumerate(frames, start=1)))
