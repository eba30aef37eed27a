"""What a data set is made of, and how it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from eventful_det.errors import UserError
from eventful_det.files import JsonObject, written_whole

Box = tuple[float, float, float, float]


class Problem(NamedTuple):
    """One fault of a data set that ends nothing: its kind, the file it is in or about, and what is wrong."""

    kind: str
    file: str
    detail: str


@dataclass(slots=True)
class Annotation:
    """One object on one frame.

    Attributes:
        category_id: id in ``CocoVideo.categories``.
        box: x1, y1, x2, y2 in pixels of the frame.
        track_id: the same object has the same id on all frames of its video; None for still pictures.
        occluded: partly hidden.
        generated: the box was interpolated by a program, not drawn by a person.
        iscrowd: the box holds a crowd; COCO does not score it, and training ignores the region.
        score: how sure a teacher was of it; 1 for what people drew.
        area: in square pixels; what COCO's small / medium / large go by.
        id: unique in the file; ``CocoVideo.renumber`` assigns it.
    """

    category_id: int
    box: Box
    track_id: int | None = None
    occluded: bool = False
    generated: bool = False
    iscrowd: bool = False
    area: float = -1.0
    id: int = 0
    score: float = 1.0

    def __post_init__(self) -> None:
        if self.area < 0:
            self.area = (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(slots=True)
class Frame:
    """One image.

    Attributes:
        file_name: relative to ``CocoVideo.image_root``; of a frame in a video file only its name for people.
        width, height: in pixels.
        frame_id: orders the frames of a video.
        annotations: the objects.
        labelled: False if nobody knows what is on it.
        exhaustive: ids of the categories of which every object has its box; None = all categories.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    frame_id: int = 0
    annotations: list[Annotation] = field(default_factory=list)
    labelled: bool = True
    exhaustive: frozenset[int] | None = None


@dataclass(slots=True)
class Video:
    """Frames in the order of time.

    Attributes:
        file_name: of the video file that holds the frames, relative to ``CocoVideo.image_root``; "" where every frame
            is a picture of its own.
    """

    id: int
    name: str
    frames: list[Frame] = field(default_factory=list)
    file_name: str = ""


@dataclass(slots=True)
class CocoVideo:
    """A data set.

    Attributes:
        categories: (id, name) pairs, by id.
        videos: in the order of the file, their frames in the order of ``frame_id``.
        image_root: the directory that file names are relative to.
    """

    categories: list[tuple[int, str]]
    videos: list[Video]
    image_root: Path

    @property
    def frames(self) -> Iterator[Frame]:
        """All frames, video by video."""
        return (frame for video in self.videos for frame in video.frames)

    def category_ids(self, names: Collection[str], option: str) -> dict[str, int]:
        """The ids of classes by their names.

        Args:
            names: of the classes.
            option: what names them, for the message.

        Raises:
            UserError: the data set lacks one of them.
        """
        ids = {name: category for category, name in self.categories}
        if unknown := set(names) - set(ids):
            raise UserError(f"{option}: no class {', '.join(sorted(unknown))}; there are {', '.join(ids)}")
        return {name: ids[name] for name in names}

    def image_path(self, frame: Frame) -> Path:
        return self.image_root / frame.file_name

    def renumber(self) -> None:
        """Give annotations the ids 1, 2, ... in order."""
        annotations = (a for frame in self.frames for a in frame.annotations)
        for i, annotation in enumerate(annotations, start=1):
            annotation.id = i

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file so that it is either there whole or not at all. The folder is made when needed."""
        root = os.path.relpath(self.image_root, Path(path).parent)
        with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
            _write(self, file, root)


def _write(data: CocoVideo, file: TextIO, image_root: str) -> None:
    """One entry per line, written as it goes: a million images need no second copy in memory."""

    def rows(key: str, entries: Iterable[JsonObject]) -> None:
        file.write(f',\n"{key}": [')
        lines = (json.dumps(entry, separators=(",", ":"), allow_nan=False) for entry in entries)
        file.writelines((",\n" if n else "\n") + line for n, line in enumerate(lines))
        file.write("]")

    file.write(f'{{"info": {json.dumps({"image_root": Path(image_root).as_posix()})}')
    rows("categories", ({"id": i, "name": name} for i, name in data.categories))
    rows("videos", (_video(video) for video in data.videos))
    rows("images", (_image(frame, video) for video in data.videos for frame in video.frames))
    rows("annotations", (_annotation(a, frame.image_id) for frame in data.frames for a in frame.annotations))
    file.write("}\n")


def _video(video: Video) -> JsonObject:
    entry: JsonObject = {"id": video.id, "name": video.name}
    return entry | {"file_name": video.file_name} if video.file_name else entry


def _image(frame: Frame, video: Video) -> JsonObject:
    entry: JsonObject = {"id": frame.image_id, "video_id": video.id, "frame_id": frame.frame_id}
    if not video.file_name:
        entry["file_name"] = frame.file_name
    entry |= {"width": frame.width, "height": frame.height}
    if frame.exhaustive is not None:
        entry["labelled_category_ids"] = sorted(frame.exhaustive)
    return entry if frame.labelled else entry | {"labelled": False}


def _annotation(a: Annotation, image_id: int) -> JsonObject:
    x1, y1, x2, y2 = a.box
    entry: JsonObject = {"id": a.id, "image_id": image_id, "category_id": a.category_id}
    entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": a.area, "iscrowd": int(a.iscrowd)}
    if a.track_id is not None:
        entry["track_id"] = a.track_id
    if a.score < 1:
        entry["score"] = a.score
    return entry | {"occluded": a.occluded, "generated": a.generated}
