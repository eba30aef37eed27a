"""Reading COCO-video files, checking every value and reference on the way."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eventful_det.data.coco_video.records import Annotation, Box, CocoVideo, Frame, Problem, Video
from eventful_det.errors import UserError
from eventful_det.files import JsonObject

_LOG = logging.getLogger(__name__)


def load_coco_video(path: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> CocoVideo:
    """Read and check a COCO-video (or plain COCO) file.

    Boxes without area or wholly outside of their image are left out, with a warning that names them.

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
        if not isinstance(told or "", str) or "\0" in (told or ""):
            raise UserError(f"{path}: info has image_root {reprlib.repr(told)}; expected the name of a folder")
        image_root = path.parent / (told or (".." if path.resolve().parent.name == "annotations" else "."))
    problems: list[Problem] = []
    loaded = parse_coco_video(data, path, image_root, problems)
    if problems:
        few = "; ".join(f"{problem.detail} ({problem.file})" for problem in problems[:3])
        more = ", ..." if len(problems) > 3 else ""
        _LOG.warning("%s: %d boxes that cannot be used are left out: %s%s", path, len(problems), few, more)
    return loaded


def parse_coco_video(
    data: JsonObject,
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    problems: list[Problem],
    lenient: bool = False,
) -> CocoVideo:
    """Check the content of a COCO-video file that is in memory; arguments and errors as of `load_coco_video`.

    Args:
        problems: gets a line for each box that is left out.
        lenient: whether a box of an image or a class that is not listed is left out, rather than an error.
    """
    categories, videos = _Reader(Path(path), data, problems, lenient).read()
    return CocoVideo(categories, videos, Path(os.path.normpath(image_root)))


def read_json_object(path: Path) -> JsonObject:
    """The object that a JSON file holds, in UTF-8 or, with a byte-order mark, UTF-16.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read the data set {path}: {error.strerror}; expected a COCO-video JSON file; "
            "`make data` makes the synthetic set, and datasets/README.md tells of others"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again, it may have been cut short") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with categories, images and annotations")
    return data


def json_rows(data: JsonObject, key: str, path: Path) -> list[JsonObject]:
    """A list of objects in a JSON object.

    Raises:
        UserError: it is missing or something else.
    """
    rows = data.get(key)
    if not isinstance(rows, list):
        found = "is missing" if rows is None else "is no list"
        raise UserError(f"{path}: {key} {found}; expected a list named '{key}'")
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: {key}[{n}] is {reprlib.repr(row)}; expected an object")
    return rows


def clip_box(box: Box, width: int, height: int) -> tuple[Box | None, str]:
    """The part of a box inside the image (None if there is none) and the name of what was wrong ("" if nothing).

    Args:
        box: x1, y1, x2, y2 in pixels.
        width, height: of the image.
    """
    x1, y1, x2, y2 = box
    if not (x2 > x1 and y2 > y1):
        return None, "box_degenerate"
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not (inside[2] > inside[0] and inside[3] > inside[1]):
        return None, "box_outside"
    return inside, "" if inside == box else "box_clipped"


def _whole(value: Any) -> int:
    number = value if type(value) is int else int(value)
    if (isinstance(value, float) and value != number) or abs(number) >= 1 << 53:
        raise ValueError
    return number


def _side(value: Any) -> int:
    number = _whole(value)
    if not 0 < number < 1 << 20:
        raise ValueError
    return number


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    """Also as spreadsheets and other programs write it."""
    if value is False or value is True:
        return value
    text = str(value).strip().lower()
    if text not in _FLAGS:
        raise ValueError
    return _FLAGS[text]


_FLAGS = dict.fromkeys(("true", "1", "1.0", "yes"), True) | dict.fromkeys(("false", "0", "0.0", "no", "", "-1"), False)


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float) or "\0" in str(value) or not str(value).strip():
        raise ValueError
    return str(value)


def _bbox(value: Any) -> Box:
    x, y, w, h = map(_number, value)
    return x, y, x + w, y + h


def _ids(value: Any) -> frozenset[int]:
    if not isinstance(value, list):
        raise ValueError
    return frozenset(map(_whole, value))


def _track(value: Any) -> int | str | None:
    """Numbers below 0 stand for "unknown" in some programs; others give objects names."""
    try:
        return number if (number := _whole(value)) >= 0 else None
    except ValueError:
        return _text(value)


class _Field(NamedTuple):
    """What a value must be: `convert` raises for anything else. `default` stands for absent and null; ... for none."""

    convert: Callable[[Any], Any]
    expected: str
    default: Any = ...


_FRAME = ("id", "file_name", "width", "height", "frame_id")
_ID, _YES_NO = _Field(_whole, "a whole number"), "true or false"
_SIDE = _Field(_side, "a number of whole pixels", 0)
_SCHEMA: dict[str, dict[str, _Field]] = {
    "categories": {"id": _ID, "name": _Field(_text, "a name")},
    "videos": {
        "id": _ID,
        "name": _Field(_text, "a name", ""),
        "file_name": _Field(_text, "the name of a video file", ""),
        "width": _SIDE,
        "height": _SIDE,
    },
    "images": {
        "id": _ID,
        "file_name": _Field(_text, "the name of a file", ""),
        "width": _SIDE,
        "height": _SIDE,
        "video_id": _Field(_whole, "the id of a video", None),
        "frame_id": _Field(_whole, "a whole number", None),
        "labelled": _Field(_flag, _YES_NO, True),
        "labelled_category_ids": _Field(_ids, "a list of category ids", None),
    },
    "annotations": {
        "id": _ID,
        "image_id": _Field(_whole, "the id of an image"),
        "category_id": _Field(_whole, "the id of a category"),
        "bbox": _Field(_bbox, "[x, y, width, height] in pixels"),
        "area": _Field(_number, "a number of square pixels", -1.0),
        "iscrowd": _Field(_flag, _YES_NO, False),
        "score": _Field(_share, "a number from 0 to 1", 1.0),
        "occluded": _Field(_flag, _YES_NO, False),
        "generated": _Field(_flag, _YES_NO, False),
        "track_id": _Field(_track, "a number or a name", None),
        "instance_id": _Field(_track, "a number or a name", None),  # mmtracking's name for it
    },
}
"""What a COCO-video file holds. Numbers and flags may be text; unknown fields are passed over."""


class _Reader:
    """Turns the JSON lists into videos, checking every value and reference on the way."""

    def __init__(self, path: Path, data: JsonObject, problems: list[Problem], lenient: bool) -> None:
        self.path, self.data, self.problems, self.lenient = path, data, problems, lenient

    def read(self) -> tuple[list[tuple[int, str]], list[Video]]:
        categories = {row["id"]: row["name"].strip() for _, row in self.entries("categories")}
        if not categories:
            raise UserError(f"{self.path}: categories is empty; expected at least one category")
        videos = self.videos(categories)
        frames = {frame.image_id: (video, frame) for video in videos for frame in video.frames}
        tracks: dict[tuple[int, str], int] = {}
        free = itertools.count(1 << 40)
        for where, row in self.entries("annotations"):
            if row["image_id"] not in frames:
                self.unknown(where, "image", row["image_id"])
            elif row["category_id"] not in categories:
                self.unknown(where, "category", row["category_id"])
            else:
                video, frame = frames[row["image_id"]]
                inside, fault = clip_box(row["bbox"], frame.width, frame.height)
                if inside is None:
                    self.problems.append(Problem(fault, frame.file_name, f"{where}, {_box_text(row['bbox'])}"))
                    continue
                track = row["instance_id"] if row["track_id"] is None else row["track_id"]
                if isinstance(track, str):
                    track = tracks.setdefault((video.id, track), next(free))
                more = (row["occluded"], row["generated"], row["iscrowd"], row["area"], row["id"], row["score"])
                frame.annotations.append(Annotation(row["category_id"], row["bbox"], track, *more))
        return self.merged(categories, videos), videos

    def entries(self, key: str) -> Iterator[tuple[str, JsonObject]]:
        """The entries of a list, converted, each with what to call it; they have ids of their own."""
        fields = _SCHEMA[key].items()
        seen: set[int] = set()
        for n, row in enumerate(json_rows(self.data, key, self.path)):
            where = f"{key}[{n}]"
            missing = [name for name, field in fields if field.default is ... and row.get(name) is None]
            if missing:
                raise UserError(f"{self.path}: {where} lacks {', '.join(missing)}; expected an object with it")
            try:
                values = {
                    name: field.default if row.get(name) is None else field.convert(row[name]) for name, field in fields
                }
            except (TypeError, ValueError, OverflowError):
                raise self.fault(where, row, key) from None
            if values["id"] in seen:
                raise self.error(where, f"the id {values['id']}", "every id once")
            seen.add(values["id"])
            yield f"{where} (id {values['id']})", values

    def videos(self, categories: Collection[int]) -> list[Video]:
        """The videos with their frames in order; every picture is a video of its own where the file has none."""
        stills = "videos" not in self.data
        rows = {} if stills else {row["id"]: row for _, row in self.entries("videos")}
        images = list(self.entries("images"))
        pictured = {image["video_id"] for _, image in images if image["file_name"]}
        videos = {
            i: Video(i, row["name"] or row["file_name"] or str(i), [], "" if i in pictured else row["file_name"])
            for i, row in rows.items()
        }
        for where, image in images:
            if stills:
                image["video_id"], image["frame_id"] = image["id"], 0
                videos[image["id"]] = Video(image["id"], image["file_name"], [])
            video = videos.get(image["video_id"])
            if video is None or image["frame_id"] is None:
                found = f"video_id {image['video_id']} and frame_id {image['frame_id']}"
                raise self.error(where, found, "the id of a video and the place in it")
            if video.file_name:
                image["file_name"] = f"{video.file_name}#{image['frame_id']}"
                image |= {side: image[side] or rows[video.id][side] for side in ("width", "height")}
            for name in ("file_name", "width", "height"):
                if not image[name]:
                    raise UserError(f"{self.path}: {where} lacks {name}; expected an object with it")
            exhaustive = image["labelled_category_ids"]
            if exhaustive is not None and not exhaustive <= set(categories):
                raise self.error(where, f"labelled_category_ids {sorted(exhaustive)}", "a list of category ids")
            i, file_name, width, height, frame_id = (image[name] for name in _FRAME)
            video.frames.append(Frame(i, file_name, width, height, frame_id, [], image["labelled"], exhaustive))
        for video in videos.values():
            video.frames.sort(key=lambda f: f.frame_id)
            for one, other in itertools.pairwise(video.frames):
                if one.frame_id == other.frame_id:
                    found = f"the frame_id {one.frame_id} twice"
                    raise self.error(f"video {video.id} ({video.name})", found, "one image per frame_id")
        return list(videos.values())

    def merged(self, categories: dict[int, str], videos: list[Video]) -> list[tuple[int, str]]:
        """The categories, each name once: of those with one name, only one may have boxes."""
        used = {a.category_id for video in videos for frame in video.frames for a in frame.annotations}
        kept: dict[str, int] = {}
        for i, name in sorted(categories.items()):
            other = kept.setdefault(name, i)
            if other in used and i in used and other != i:
                found = f"the ids {other} and {i}"
                raise self.error(f"the category '{name}'", found, "one id; give one of them another name")
            kept[name] = i if i in used else other
        for frame in (frame for video in videos for frame in video.frames if frame.exhaustive is not None):
            frame.exhaustive = frozenset(kept[categories[c]] for c in frame.exhaustive or ())
        return sorted((i, name) for name, i in kept.items())

    def unknown(self, where: str, what: str, i: int) -> None:
        """Note, or refuse, a box of an image or a class that is not listed."""
        if not self.lenient:
            raise self.error(where, f"{what}_id {i}", f"the id of a listed {what}")
        self.problems.append(Problem(f"unknown_{what}", where, f"{what}_id {i}"))

    def fault(self, where: str, row: JsonObject, key: str) -> UserError:
        """Which value of an entry cannot be converted."""
        for name, told in _SCHEMA[key].items():
            try:
                if row.get(name) is not None:
                    told.convert(row[name])
            except (TypeError, ValueError, OverflowError):
                break
        return self.error(where, f"{name} {reprlib.repr(row[name])}", told.expected)

    def error(self, where: str, found: str, expected: str) -> UserError:
        return UserError(f"{self.path}: {where} has {found}; expected {expected}. Correct the file or prepare it again")


def _box_text(box: Box) -> str:
    return f"[{box[0]:g}, {box[1]:g}, {box[2] - box[0]:g}, {box[3] - box[1]:g}]"
