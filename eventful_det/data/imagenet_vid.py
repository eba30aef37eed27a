"""ImageNet VID and DET trees (ILSVRC 2015 and 2017) to COCO-video.

::

    TREE/Data/VID/train/<folder>/<video>/000000.JPEG      TREE/Annotations/VID/train/<folder>/<video>/000000.xml
    TREE/Data/VID/val/<video>/000000.JPEG                 TREE/Annotations/VID/val/<video>/000000.xml
    TREE/Data/DET/train/<folder>/.../<image>.JPEG         TREE/Annotations/DET/train/<folder>/.../<image>.xml

Which frames there are is read from the tree itself; list files are not needed. Nothing that is wrong in it stops
the rest, and nothing is dropped silently: every fault becomes a ``Problem``.

=====================  =================================================================
problem                what happens to the frame or box
=====================  =================================================================
``missing_image``      the frame is dropped
``unreadable_image``   the frame is dropped
``missing_xml``        val: the frame stays, ``labelled`` is False; train: it is dropped
``malformed_xml``      the same
``size_mismatch``      the frame stays; the size of the image file counts
``unknown_class``      the box is dropped (VID; DET has 170 other classes on purpose)
``box_degenerate``     the box is dropped
``box_outside``        the box is dropped
``box_clipped``        the box is clipped to the image
``missing_track``      the box stays, but belongs to no track (VID)
``duplicate_track``    the same: its track has a box on this frame already
=====================  =================================================================

An unlabelled validation frame stays because a stream without it would be another stream. Boxes are taken as
(xmin, ymin, xmax, ymax) edges, as the field does. ``image_id`` of VID val is the frame index of the official
``ImageSets/VID/val.txt``: 1, 2, ... over all frames in order, dropped ones counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from eventful_det.data.classes import Category
from eventful_det.data.coco_video import Annotation, Box, CocoVideo, Frame, Video
from eventful_det.data.parallel import map_ordered
from eventful_det.data.sampling import evenly
from eventful_det.errors import UserError

IMAGE_SUFFIXES = {".jpeg", ".jpg"}
TREE_NAMES = ("ILSVRC2015", "ILSVRC2017", "ILSVRC")


class Problem(NamedTuple):
    """One fault of a tree: its kind (see the module), the file (relative to the tree) and what is wrong."""

    kind: str
    file: str
    detail: str


class Entry(NamedTuple):
    """The files of one frame: names within the folder, or None where there is none."""

    stem: str
    image: str | None
    xml: str | None


class Folder(NamedTuple):
    """One directory of frames; ``name`` is its path below ``Data/<subset>/<split>``."""

    name: str
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a set comes from: a subset (VID or DET) and split (train or val) of a tree, with its categories."""

    tree: Path
    subset: str
    split: str
    categories: tuple[Category, ...]

    @property
    def images(self) -> Path:
        return self.tree / "Data" / self.subset / self.split

    @property
    def annotations(self) -> Path:
        return self.tree / "Annotations" / self.subset / self.split


def find_tree(root: Path) -> Path:
    """The folder that holds ``Data`` and ``Annotations``: ``root`` itself or its ILSVRC folder.

    Raises:
        UserError: if there is none, or more than one.
    """
    found = [tree for tree in (root, *(root / name for name in TREE_NAMES)) if (tree / "Data").is_dir()]
    if not found:
        raise UserError(
            f"no ILSVRC tree in {root}: expected {root}/Data/VID or {root}/ILSVRC2015/Data/VID; "
            "give the folder that holds Data and Annotations"
        )
    if len(found) > 1:
        raise UserError(f"more than one ILSVRC tree: {', '.join(map(str, found))}; give the one to use")
    return found[0]


def list_folders(source: Source, frames_per_video: int | None = None) -> list[Folder]:
    """Directories of frames in order, each with its frames in order.

    Args:
        source: the set.
        frames_per_video: keep this many evenly spaced frames of each folder (the middles of equal parts: 15 of
            300 frames are 10, 30, ..., 290, as in the lists the field trains on); all if None.
    """
    if not source.annotations.is_dir():
        raise UserError(f"no annotations in {source.annotations}; unpack the annotation archive beside the images")
    images = _files(source.images, IMAGE_SUFFIXES)
    xmls = _files(source.annotations, {".xml"})
    names = sorted(xmls if source.subset == "DET" else images.keys() | xmls.keys())
    folders = []
    for name in names:
        pictures, labels = images.get(name, {}), xmls.get(name, {})
        # a DET image without annotation is a picture of none of its classes, not a fault
        stems = sorted(labels if source.subset == "DET" else pictures.keys() | labels.keys())
        if frames_per_video is not None:
            stems = evenly(stems, frames_per_video)
        folders.append(Folder(name, [Entry(s, pictures.get(s), labels.get(s)) for s in stems]))
    return folders


def convert(
    source: Source,
    folders: Sequence[Folder],
    workers: int = 1,
    progress: Callable[[int], None] = lambda frames: None,
) -> tuple[CocoVideo, list[Problem]]:
    """Read the annotations of a set.

    Args:
        source: the set.
        folders: from ``list_folders``.
        workers: processes; the result does not depend on it.
        progress: called with the number of frames just done.

    Returns:
        The data set and everything that was wrong with it.
    """
    videos: list[Video] = []
    problems: list[Problem] = []
    position = 0
    read = map_ordered(partial(_read_folder, source), folders, workers)
    for folder, (frames, faults) in zip(folders, read, strict=True):
        for frame in frames:
            frame.image_id += position + 1
        position += len(folder.entries)
        problems += faults
        if source.subset == "DET":
            videos += [Video(0, frame.file_name, [frame]) for frame in frames]
        elif frames:
            videos.append(Video(0, f"{source.split}/{folder.name}", frames))
        progress(len(folder.entries))
    for i, video in enumerate(videos, start=1):
        video.id = i
    data = CocoVideo([(c.id, c.name) for c in source.categories], videos, source.tree)
    data.renumber()
    return data, problems


def _files(top: Path, suffixes: set[str]) -> dict[str, dict[str, str]]:
    """Folder below ``top`` -> stem -> file name, for the files with these suffixes."""
    found: dict[str, dict[str, str]] = {}
    for folder, _, names in os.walk(top, followlinks=True):
        split = (os.path.splitext(name) for name in names)
        files = {stem: stem + suffix for stem, suffix in split if suffix.lower() in suffixes}
        if files:
            found[Path(folder).relative_to(top).as_posix()] = files
    return found


def _read_folder(source: Source, folder: Folder) -> tuple[list[Frame], list[Problem]]:
    """Frames of one folder; their ``image_id`` is the position in ``folder.entries``."""
    frames: list[Frame] = []
    problems: list[Problem] = []
    for i, entry in enumerate(folder.entries):
        frame = _read_frame(source, folder.name, entry, problems)
        if frame is not None:
            frame.image_id = i
            if source.subset == "VID":
                frame.frame_id = int(entry.stem) if entry.stem.isdigit() else i
            frames.append(frame)
    return frames, problems


def _read_frame(source: Source, folder: str, entry: Entry, problems: list[Problem]) -> Frame | None:
    image = source.images / folder / (entry.image or f"{entry.stem}.JPEG")
    xml = source.annotations / folder / (entry.xml or f"{entry.stem}.xml")

    def report(kind: str, file: Path, detail: str) -> None:
        problems.append(Problem(kind, file.relative_to(source.tree).as_posix(), detail))

    told: tuple[int, int] | None = None
    raw: list[_RawObject] = []
    labelled = True
    try:
        told, raw = _parse_xml(xml)
    except FileNotFoundError:
        labelled = False
        report("missing_xml", xml, "no annotation for this image")
    except (OSError, ElementTree.ParseError, ValueError) as error:
        labelled = False
        report("malformed_xml", xml, str(error))
    known = {c.wnid: c.id for c in source.categories}
    if source.subset == "DET":
        raw = [o for o in raw if o.wnid in known]
        if labelled and not raw:
            return None
    if entry.image is None:
        report("missing_image", image, f"named by {xml.name}, not in the tree")
        return None
    try:
        with Image.open(image) as opened:  # reads the header only
            size = opened.size
    except (OSError, ValueError, SyntaxError) as error:
        report("unreadable_image", image, str(error).replace(str(image), image.name))
        return None
    if not labelled and source.split == "train":
        return None
    if told is not None and told != size:
        report("size_mismatch", xml, f"says {told[0]}x{told[1]}, the image is {size[0]}x{size[1]}")
    frame = Frame(0, image.relative_to(source.tree).as_posix(), *size, labelled=labelled)
    for o in raw:
        if o.wnid not in known:
            report("unknown_class", xml, f"{o.wnid!r} is none of the {len(known)} categories")
            continue
        box, fault = clip_box(o.box, size)
        if fault:
            report(fault, xml, f"box {o.box} of {o.wnid} on a {size[0]}x{size[1]} image")
        if box is not None:
            frame.annotations.append(Annotation(known[o.wnid], box, o.track_id, o.occluded, o.generated))
    if source.subset == "VID":
        for fault, detail in _untangle_tracks(frame):
            report(fault, xml, detail)
    if source.subset == "DET" and not frame.annotations:
        return None
    return frame


def _untangle_tracks(frame: Frame) -> list[tuple[str, str]]:
    """Take the track from boxes that cannot belong to it; what was wrong, kind and detail."""
    faults, seen = [], set()
    for annotation in frame.annotations:
        if annotation.track_id is None:
            faults.append(("missing_track", f"no <trackid> for the box {annotation.box}"))
        elif annotation.track_id in seen:
            faults.append(("duplicate_track", f"track {annotation.track_id} is on this frame more than once"))
            annotation.track_id = None
        else:
            seen.add(annotation.track_id)
    return faults


class _RawObject(NamedTuple):
    wnid: str
    box: tuple[float, float, float, float]
    track_id: int | None
    occluded: bool
    generated: bool


def _parse_xml(path: Path) -> tuple[tuple[int, int], list[_RawObject]]:
    """(width, height) and the objects as written; ValueError where an element is missing or no number."""
    root = ElementTree.parse(path).getroot()

    def number(parent: ElementTree.Element, tag: str, default: str | None = None) -> float:
        text = parent.findtext(tag, default)
        if text is None:
            raise ValueError(f"<{parent.tag}> lacks <{tag}>")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"<{tag}> is {text!r}, expected a number")
        return value

    size = int(number(root, "size/width")), int(number(root, "size/height"))
    objects = []
    for element in root.iter("object"):
        name = element.findtext("name")
        if not name:
            raise ValueError("<object> lacks <name>")
        x1, y1, x2, y2 = (number(element, f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax"))
        track = int(number(element, "trackid")) if element.find("trackid") is not None else None
        occluded, generated = (bool(number(element, tag, "0")) for tag in ("occluded", "generated"))
        objects.append(_RawObject(name.strip(), (x1, y1, x2, y2), track, occluded, generated))
    return size, objects


def clip_box(box: Box, size: tuple[int, int]) -> tuple[Box | None, str]:
    """The part of a box inside the image (None if there is none) and the name of what was wrong ('' if nothing).

    Args:
        box: x1, y1, x2, y2 in pixels.
        size: width and height of the image.
    """
    x1, y1, x2, y2 = box
    if not (x2 > x1 and y2 > y1):
        return None, "box_degenerate"
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1])))
    if not (inside[2] > inside[0] and inside[3] > inside[1]):
        return None, "box_outside"
    return inside, "" if inside == box else "box_clipped"
