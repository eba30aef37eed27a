"""COCO-video JSON: the one data format of training, streaming evaluation and tools.

It is COCO's detection format plus ``videos``, so ``pycocotools`` reads it as it is::

    {"info":        {"image_root": ".."},               optional; relative to this file
     "categories":  [{"id": 1, "name": "airplane"}],
     "videos":      [{"id": 1, "name": "val/ILSVRC2015_val_00000000"}],
     "images":      [{"id": 1, "video_id": 1, "frame_id": 0, "file_name": "Data/...JPEG",
                      "width": 1280, "height": 720}],
     "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h,
                      "iscrowd": 0, "track_id": 0, "occluded": false, "generated": false}]}

``track_id`` is unique within its video. ``frame_id`` orders the frames of a video and may have gaps. An image
with ``"labelled": false`` is there to keep the stream whole, but nobody knows what is on it: do not train on it
and do not score it. An image with ``"labelled_category_ids": [1, 7]`` was searched for these categories alone: any
other may be on it without a box, so it is no negative for them, neither in training nor in scoring. A file without
``videos`` (plain COCO) holds still pictures: each is a video of one frame.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from eventful_det.errors import UserError

Box = tuple[float, float, float, float]


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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                _write(self, file, os.path.relpath(self.image_root, path.parent))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def load_coco_video(path: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> CocoVideo:
    """Read and check a COCO-video (or plain COCO) file.

    Args:
        path: of the JSON file.
        image_root: what file names are relative to. By default ``info.image_root`` of the file; failing that, the
            parent of the folder when that is called ``annotations``, else the folder of the file.

    Raises:
        UserError: saying which entry of which file is wrong and what was expected. Whether the images exist is
            not checked: that would cost minutes on large sets.
    """
    path = Path(path)
    data = read_json_object(path)
    if image_root is None:
        info = data.get("info")
        told = info.get("image_root") if isinstance(info, dict) else None
        image_root = path.parent / (told or (".." if path.resolve().parent.name == "annotations" else "."))
    return parse_coco_video(data, path, image_root)


def parse_coco_video(
    data: dict[str, Any], path: str | os.PathLike[str], image_root: str | os.PathLike[str]
) -> CocoVideo:
    """Check the content of a COCO-video file that is in memory; arguments and errors as of `load_coco_video`."""
    categories, videos = _Reader(Path(path), data).read()
    return CocoVideo(categories, videos, Path(os.path.normpath(image_root)))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise UserError(
            f"cannot read the data set {path}: {error.strerror}; expected a COCO-video JSON file, "
            "for example one made by datasets/prepare_imagenet_vid.py"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again, it may have been cut short") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with categories, images and annotations")
    return data


class _Reader:
    """Turns the JSON lists into videos, checking every reference on the way."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    def read(self) -> tuple[list[tuple[int, str]], list[Video]]:
        categories = {i: str(c["name"]) for i, c in self.entries("categories", "id", "name")}
        if not categories:
            raise self.error("categories", "is empty", "at least one category")
        stills = "videos" not in self.data
        videos: dict[int, Video] = {}
        if not stills:
            videos = {i: self.video(i, entry) for i, entry in self.entries("videos", "id")}
            self.settle_files(videos)
        frames: dict[int, Frame] = {}
        for i, image in self.entries("images", "id", "file_name", "width", "height"):
            frames[i] = self.frame(i, image, categories)
            if stills:
                videos[i] = Video(i, frames[i].file_name, [frames[i]])
            else:
                self.video_of(i, image, videos).frames.append(frames[i])
        for i, entry in self.entries("annotations", "id", "image_id", "category_id", "bbox"):
            frame = frames.get(entry["image_id"]) if isinstance(entry["image_id"], int) else None
            if frame is None:
                raise self.error(f"annotation {i}", f"has image_id {entry['image_id']!r}", "the id of an image")
            if entry["category_id"] not in categories:
                raise self.error(f"annotation {i}", f"has category_id {entry['category_id']!r}", "a listed category")
            frame.annotations.append(self.annotation(i, entry, frame))
        for video in videos.values():
            video.frames.sort(key=lambda f: f.frame_id)
            if len({f.frame_id for f in video.frames}) < len(video.frames):
                raise self.error(f"video {video.id} ({video.name})", "has a frame_id twice", "one image per frame_id")
        return sorted(categories.items()), list(videos.values())

    def entries(self, key: str, *required: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(id, entry) pairs of a list, each with the required fields and an id of its own."""
        rows = self.data.get(key)
        if not isinstance(rows, list):
            raise self.error(key, "is missing" if rows is None else "is no list", f"a list named '{key}'")
        seen: set[int] = set()
        for n, row in enumerate(rows):
            missing = [r for r in required if r not in row] if isinstance(row, dict) else required
            if missing:
                raise self.error(f"{key}[{n}]", f"lacks {', '.join(missing)}", f"an object with {', '.join(required)}")
            if not isinstance(row["id"], int) or row["id"] in seen:
                raise self.error(f"{key}[{n}]", f"has the id {row['id']!r}", "a whole number, each once")
            seen.add(row["id"])
            yield row["id"], row

    def video(self, i: int, entry: dict[str, Any]) -> Video:
        file_name = entry.get("file_name", "")
        if not isinstance(file_name, str):
            raise self.error(f"video {i}", f"has the file_name {file_name!r}", "the name of a video file")
        return Video(i, str(entry.get("name", file_name or i)), [], file_name)

    def settle_files(self, videos: dict[int, Video]) -> None:
        """Tell frames of video files from pictures, which have a file name of their own; complete the former."""
        rows = self.data.get("images")
        images = [image for image in rows if isinstance(image, dict)] if isinstance(rows, list) else []
        images = [image for image in images if isinstance(image.get("video_id"), int)]
        for pictured in {image["video_id"] for image in images if "file_name" in image} & set(videos):
            videos[pictured].file_name = ""
        entries = {entry["id"]: entry for entry in self.data["videos"] if videos[entry["id"]].file_name}
        for image in images:
            entry = entries.get(image["video_id"])
            if entry is not None:
                image["file_name"] = f"{entry['file_name']}#{image.get('frame_id')}"
                image.update({key: entry[key] for key in ("width", "height") if key in entry and key not in image})

    def frame(self, i: int, image: dict[str, Any], categories: Collection[int]) -> Frame:
        width, height, frame_id = image["width"], image["height"], image.get("frame_id", 0)
        if not all(isinstance(n, int) and n > 0 for n in (width, height)):
            raise self.error(f"image {i}", f"is {width!r} x {height!r}", "width and height in whole pixels")
        if not isinstance(frame_id, int):
            raise self.error(f"image {i}", f"has frame_id {frame_id!r}", "a whole number")
        exhaustive, labelled = image.get("labelled_category_ids"), bool(image.get("labelled", True))
        if exhaustive is not None:
            if not isinstance(exhaustive, list) or not all(c in categories for c in exhaustive):
                raise self.error(f"image {i}", f"has labelled_category_ids {exhaustive!r}", "a list of category ids")
            exhaustive = frozenset(exhaustive)
        return Frame(i, str(image["file_name"]), width, height, frame_id, [], labelled, exhaustive)

    def video_of(self, i: int, image: dict[str, Any], videos: dict[int, Video]) -> Video:
        told = image.get("video_id")
        video = videos.get(told) if isinstance(told, int) else None
        if video is None or "frame_id" not in image:
            found = f"has video_id {told!r} and frame_id {image.get('frame_id')!r}"
            raise self.error(f"image {i}", found, "the id of a video and the place in it")
        return video

    def annotation(self, i: int, entry: dict[str, Any], frame: Frame) -> Annotation:
        try:
            x, y, w, h = (float(v) for v in entry["bbox"])
        except (TypeError, ValueError):
            x = y = w = h = math.nan
        inside = x < frame.width and y < frame.height and x + w > 0 and y + h > 0
        if not (w > 0 and h > 0 and inside and math.isfinite(x + y + w + h)):
            expected = f"[x, y, width, height] in pixels that overlaps its {frame.width}x{frame.height} image"
            raise self.error(f"annotation {i}", f"has the bbox {entry['bbox']!r}", expected)
        return Annotation(
            category_id=entry["category_id"],
            box=(x, y, x + w, y + h),
            track_id=entry.get("track_id"),
            occluded=bool(entry.get("occluded", False)),
            generated=bool(entry.get("generated", False)),
            iscrowd=bool(entry.get("iscrowd", False)),
            area=float(entry.get("area", w * h)),
            id=i,
            score=float(entry.get("score", 1.0)),
        )

    def error(self, where: str, found: str, expected: str) -> UserError:
        return UserError(f"{self.path}: {where} {found}; expected {expected}. Correct the file or prepare it again")


def _write(data: CocoVideo, file: TextIO, image_root: str) -> None:
    """One entry per line, written as it goes: a million images need no second copy in memory."""

    def rows(key: str, entries: Iterable[dict[str, Any]]) -> None:
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


def _video(video: Video) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": video.id, "name": video.name}
    return entry | {"file_name": video.file_name} if video.file_name else entry


def _image(frame: Frame, video: Video) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": frame.image_id, "video_id": video.id, "frame_id": frame.frame_id}
    if not video.file_name:
        entry["file_name"] = frame.file_name
    entry |= {"width": frame.width, "height": frame.height}
    if frame.exhaustive is not None:
        entry["labelled_category_ids"] = sorted(frame.exhaustive)
    return entry if frame.labelled else entry | {"labelled": False}


def _annotation(a: Annotation, image_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = a.box
    entry: dict[str, Any] = {"id": a.id, "image_id": image_id, "category_id": a.category_id}
    entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": a.area, "iscrowd": int(a.iscrowd)}
    if a.track_id is not None:
        entry["track_id"] = a.track_id
    if a.score < 1:
        entry["score"] = a.score
    return entry | {"occluded": a.occluded, "generated": a.generated}
