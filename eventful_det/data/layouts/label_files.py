"""What the label files of other programs say: YOLO, PASCAL VOC, MOTChallenge and CVAT's XML.

``yolo``
    A folder of ``<video>_<frame>.txt`` with lines ``class cx cy w h`` in shares of the frame, or polygons, with or
    without confidence and track; the classes in ``classes.txt``, ``obj.names`` or ``data.yaml`` there or above.
``voc``
    A folder of ``<frame>.xml`` of PASCAL VOC.
``mot``
    ``gt.txt`` of MOTChallenge: ``frame, track, x, y, w, h, considered, class, visibility``, frames and pixels from 1.
    Boxes that are not to be considered become crowds, which are not scored.
``cvat_xml``
    "CVAT for video 1.1" and "CVAT for images 1.1".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import yaml

from eventful_det.data.coco_video import Box, Problem
from eventful_det.data.layouts.imagenet_vid import parse_xml
from eventful_det.errors import UserError

_MOT17 = (
    "person", "person_on_vehicle", "car", "bicycle", "motorcycle", "non_motor_vehicle", "static_person", "distractor",
    "occluder", "occluder_on_ground", "occluder_full", "reflection", "crowd",
)  # fmt: skip
_CLASS_FILES = ("classes.txt", "obj.names", "labels.txt", "data.yaml", "dataset.yaml", "data.yml")


class Mark(NamedTuple):
    """One labelled object.

    Attributes:
        label: its class.
        box: x1, y1, x2, y2 in pixels, or in shares of the frame.
        track: of the same object on other frames.
        relative: whether the box is in shares.
        ignored: it is not to be scored.
    """

    label: str
    box: Box
    track: int | None = None
    relative: bool = False
    occluded: bool = False
    generated: bool = False
    ignored: bool = False


@dataclass
class VideoLabels:
    """What the label files say.

    Attributes:
        classes: their names, in order.
        marks: objects by name of the frame, which is that of its picture or ends in its number.
        first: number of the first frame, where frames have numbers alone; None = names are those of pictures.
        empty: whether a frame without an entry was searched, and has no object.
        searched: numbers of the frames that were; None = all.
    """

    classes: list[str]
    marks: dict[str, list[Mark]]
    first: int | None = None
    empty: bool = True
    searched: Container[int] | None = None
    problems: list[Problem] = field(default_factory=list)


def _read_yolo(path: Path, classes: Path | None) -> VideoLabels:
    file = classes or _class_file(path, path.parent, path.parent.parent)
    if file is None:
        raise UserError(f"{path}: no {', '.join(_CLASS_FILES)} there or above; name the classes with --classes FILE")
    labels = VideoLabels(_class_names(file), {})
    for text in sorted(path.glob("*.txt")):
        if text.name in _CLASS_FILES or not text.is_file():
            continue
        marks = labels.marks.setdefault(text.stem, [])
        for line, row in _rows(text):
            try:
                label, *values = [float(value) for value in row]
                name = labels.classes[_index(label)]
                marks.append(_yolo_mark(name, values, row[-1]))
            except (ValueError, IndexError, OverflowError):
                labels.problems.append(Problem("malformed_line", text.name, f"line {line}: {' '.join(row)[:80]}"))
    return labels


def _yolo_mark(name: str, values: list[float], last: str) -> Mark:
    """A box, perhaps with confidence and track, or a polygon."""
    track = int(last) if len(values) in (5, 6) and last.isdecimal() else None
    if len(values) >= 6 and len(values) % 2 == 0 and track is None:
        x, y = values[::2], values[1::2]
        return Mark(name, (min(x), min(y), max(x), max(y)), relative=True)
    cx, cy, w, h = values[:4]
    if len(values) > 6:
        raise ValueError
    return Mark(name, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), track, relative=True)


def _read_voc(path: Path, classes: Path | None) -> VideoLabels:
    labels = VideoLabels(_class_names(classes) if classes else [], {}, empty=False)
    for xml in filter(Path.is_file, sorted(path.glob("*.xml"))):  # a pipe would be waited for
        try:
            _, objects = parse_xml(xml)
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
            labels.problems.append(Problem("malformed_xml", xml.name, str(error)))
            continue
        labels.marks[xml.stem] = [
            Mark(o.wnid, o.box, o.track_id, occluded=o.occluded, generated=o.generated) for o in objects
        ]
    names = {mark.label for marks in labels.marks.values() for mark in marks}
    labels.classes += sorted(names - set(labels.classes))
    return labels


def _read_mot(path: Path, classes: Path | None) -> VideoLabels:
    file = classes or _class_file(path.parent)
    sequence = any((folder / "seqinfo.ini").is_file() for folder in (path.parent, path.parent.parent))
    names = _class_names(file) if file else list(_MOT17) if sequence else []
    labels, found = VideoLabels([], {}, first=1), []
    for line, row in _rows(path):
        try:
            number, identity, x, y, w, h, *more = [float(value) for value in row]
            index = _index(more[1]) if len(more) > 1 and more[1] > 0 else 1
            box = (x - 1, y - 1, x - 1 + w, y - 1 + h)
            track = _index(identity) if identity >= 0 else None
            found.append((index, f"{_index(number)}", box, track, bool(more) and more[0] == 0))
        except (ValueError, OverflowError):
            labels.problems.append(Problem("malformed_line", path.name, f"line {line}: {','.join(row)[:80]}"))
    if not names and {index for index, *_ in found} == {1}:
        names = ["person"]
    called = dict(enumerate(names, start=1))
    for index in sorted({index for index, *_ in found}):
        called.setdefault(index, f"class {index}")
    labels.classes = list(called.values())
    for index, frame, box, track, ignored in found:
        labels.marks.setdefault(frame, []).append(Mark(called[index], box, track, ignored=ignored))
    return labels


def _read_cvat(path: Path, _: Path | None) -> VideoLabels:
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotations":
            raise ValueError(f"its root is <{root.tag}>, expected <annotations>")
        labels = VideoLabels([e.text or "" for e in root.iterfind("meta//labels/label/name")], {})
        if root.find("image") is None:
            _read_tracks(root, labels)
        for image in root.iterfind("image"):
            marks = labels.marks.setdefault(Path(image.get("name", "")).stem, [])
            marks += (_cvat_mark(shape, shape.get("label", ""), None) for shape in image if shape.get("label"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is no XML file of CVAT ({error})") from None
    names = {mark.label for marks in labels.marks.values() for mark in marks}
    labels.classes += sorted(names - set(labels.classes))
    return labels


def _read_tracks(root: ElementTree.Element, labels: VideoLabels) -> None:
    """The tracks of "CVAT for video"; the frames of a task may begin late in the video and be some steps apart."""
    start = int(root.findtext("meta//start_frame") or 0)
    step = int((root.findtext("meta//frame_filter") or "").partition("step=")[2] or 1)
    size = root.findtext("meta//size")
    labels.first = 0
    labels.searched = None if size is None else range(start, start + step * int(size), step)
    for number, track in enumerate(root.iterfind("track")):
        for shape in track:
            if shape.get("outside") != "1":
                frame = str(start + step * int(shape.attrib["frame"]))
                mark = _cvat_mark(shape, track.attrib["label"], int(track.get("id", number)))
                labels.marks.setdefault(frame, []).append(mark)


def _cvat_mark(shape: ElementTree.Element, label: str, track: int | None) -> Mark:
    if "points" in shape.attrib:
        points = [pair.split(",") for pair in shape.attrib["points"].split(";")]
        x, y = [float(pair[0]) for pair in points], [float(pair[1]) for pair in points]
        box = (min(x), min(y), max(x), max(y))
    else:
        left, top, right, bottom = (float(shape.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
        box = (left, top, right, bottom)
    return Mark(label, box, track, occluded=shape.get("occluded") == "1", generated=shape.get("keyframe") == "0")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a text file that are not empty, with their numbers, split at blanks and commas."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows = ((n, line.replace(",", " ").split()) for n, line in enumerate(text.splitlines(), start=1))
    return ((n, row) for n, row in rows if row)


def _index(value: float) -> int:
    if value != int(value) or value < 0:
        raise ValueError
    return int(value)


def _class_file(*folders: Path) -> Path | None:
    places = (folder / name for folder in folders for name in _CLASS_FILES)
    return next((place for place in places if place.is_file()), None)


def _class_names(path: Path) -> list[str]:
    """Names of classes, in order.

    Raises:
        UserError: the file is missing or holds something else, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".yaml", ".yml"):
            names = yaml.safe_load(text)["names"]
            names = [names[i] for i in range(len(names))] if isinstance(names, Mapping) else list(names)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read the classes {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, yaml.YAMLError, RecursionError):
        raise UserError(f"{path}: expected a class on each line, or a YAML file with a list 'names'") from None
    names = [str(name) for name in names]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: expected at least one class, and each name once")
    return names


READERS: dict[str, Callable[[Path, Path | None], VideoLabels]] = {
    "yolo": _read_yolo,
    "voc": _read_voc,
    "mot": _read_mot,
    "cvat_xml": _read_cvat,
}
