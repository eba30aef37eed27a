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
``linked_folder``      a link to a folder that is in the tree already, perhaps in a circle: left out
``unreadable_folder``  left out
``irregular_file``     a pipe, socket or link to nowhere in place of a file: left out
``duplicate_frame``    two files for one frame (``1`` and ``000001``, .jpg and .JPEG): the first is taken
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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from eventful_det.data.classes import Category
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Problem, Video, clip_box
from eventful_det.data.layouts.sampling import evenly
from eventful_det.data.parallel import map_ordered
from eventful_det.data.video.pictures import picture_size
from eventful_det.errors import UserError

IMAGE_SUFFIXES = {".jpeg", ".jpg"}
TREE_NAMES = ("ILSVRC2015", "ILSVRC2017", "ILSVRC")


class Entry(NamedTuple):
    """The files of one frame: names within the folder, or None where there is none."""

    stem: str
    image: str | None
    xml: str | None


class Folder(NamedTuple):
    """One directory of frames; ``name`` is its path below ``Data/<subset>/<split>``.

    ``faults`` are those of the directory as such; one that cannot be used has faults and no entries.
    """

    name: str
    entries: list[Entry]
    faults: list[Problem] = []


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
    faults: dict[str, list[Problem]] = {}
    images = _files(source, source.images, IMAGE_SUFFIXES, faults)
    xmls = _files(source, source.annotations, {".xml"}, faults)
    names = sorted((xmls if source.subset == "DET" else images.keys() | xmls.keys()) | faults.keys())
    folders = []
    for name in names:
        pictures, labels = images.get(name, {}), xmls.get(name, {})
        # a DET image without annotation is a picture of none of its classes, not a fault
        stems = sorted(labels if source.subset == "DET" else pictures.keys() | labels.keys())
        if frames_per_video is not None:
            stems = evenly(stems, frames_per_video)
        folders.append(Folder(name, [Entry(s, pictures.get(s), labels.get(s)) for s in stems], faults.get(name, [])))
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
        problems += folder.faults + faults
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


def _files(
    source: Source, top: Path, suffixes: set[str], faults: dict[str, list[Problem]]
) -> dict[str, dict[str, str]]:
    """Folder below ``top`` -> stem -> file name, for the regular files with these suffixes, each frame once.

    Args:
        faults: gets those of each folder.
    """
    found: dict[str, dict[str, str]] = {}
    visited = set(map(str, Path(os.path.realpath(top)).parents))
    waiting, links = [top], deque[Path]()  # links come last, so that what they lead to is found in its own place
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        name = folder.relative_to(top).as_posix()

        def report(kind: str, path: str, detail: str, name: str = name) -> None:
            faults.setdefault(name, []).append(Problem(kind, os.path.relpath(path, source.tree), detail))

        real = os.path.realpath(folder)
        if real in visited:
            report("linked_folder", str(folder), f"leads to {real}, which holds it or is in the tree already")
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            report("unreadable_folder", str(folder), str(error.strerror))
            continue
        taken: dict[int | str, str] = {}
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if entry.is_dir() or suffix.lower() not in suffixes:
                continue
            frame = int(stem) if source.subset == "VID" and _is_number(stem) else stem
            if not entry.is_file():
                report("irregular_file", entry.path, "expected a regular file")
            elif frame in taken:
                report("duplicate_frame", entry.path, f"the same frame as {taken[frame]}")
            else:
                taken[frame] = entry.name
        if taken:
            found[name] = {os.path.splitext(file)[0]: file for file in taken.values()}
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(Path(entry.path))
    return found


def _is_number(stem: str) -> bool:
    return stem.isascii() and stem.isdecimal() and len(stem) < 16


def _read_folder(source: Source, folder: Folder) -> tuple[list[Frame], list[Problem]]:
    """Frames of one folder; their ``image_id`` is the position in ``folder.entries``."""
    frames: list[Frame] = []
    problems: list[Problem] = []
    numbered = all(_is_number(entry.stem) for entry in folder.entries)
    for i, entry in enumerate(folder.entries):
        frame = _read_frame(source, folder.name, entry, problems)
        if frame is not None:
            frame.image_id = i
            if source.subset == "VID":
                frame.frame_id = int(entry.stem) if numbered else i
            frames.append(frame)
    return frames, problems


def _read_frame(source: Source, folder: str, entry: Entry, problems: list[Problem]) -> Frame | None:
    image = source.images / folder / (entry.image or f"{entry.stem}.JPEG")
    xml = source.annotations / folder / (entry.xml or f"{entry.stem}.xml")

    def report(kind: str, file: Path, detail: str) -> None:
        problems.append(Problem(kind, file.relative_to(source.tree).as_posix(), detail))

    told: tuple[int, int] | None = None
    raw: list[RawObject] = []
    labelled = True
    try:
        told, raw = parse_xml(xml)
    except FileNotFoundError:
        labelled = False
        report("missing_xml", xml, "no annotation for this image")
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
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
        size = picture_size(image)  # of the header alone
    except (OSError, ValueError) as error:
        report("unreadable_image", image, str(error).replace(str(image), image.name))
        return None
    if not labelled and source.split == "train":
        return None
    if told is not None and told != size:
        report("size_mismatch", xml, f"says {told[0]}x{told[1]}, the image is {size[0]}x{size[1]}")
    frame = Frame(0, image.relative_to(source.tree).as_posix(), *size, labelled=labelled)
    faults = _annotate(frame, raw, known)
    if source.subset == "VID":
        faults += _untangle_tracks(frame)
    for fault, detail in faults:
        report(fault, xml, detail)
    return None if source.subset == "DET" and not frame.annotations else frame


def _annotate(frame: Frame, raw: Sequence[RawObject], known: dict[str, int]) -> list[tuple[str, str]]:
    """Give a frame its boxes; what was wrong with them, kind and detail."""
    faults = []
    for o in raw:
        if o.wnid not in known:
            faults.append(("unknown_class", f"{o.wnid!r} is none of the {len(known)} categories"))
            continue
        box, fault = clip_box(o.box, frame.width, frame.height)
        if fault:
            faults.append((fault, f"box {o.box} of {o.wnid} on a {frame.width}x{frame.height} image"))
        if box is not None:
            frame.annotations.append(Annotation(known[o.wnid], box, o.track_id, o.occluded, o.generated))
    return faults


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


class RawObject(NamedTuple):
    wnid: str
    box: tuple[float, float, float, float]
    track_id: int | None
    occluded: bool
    generated: bool


def parse_xml(path: Path) -> tuple[tuple[int, int], list[RawObject]]:
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
        if not abs(value) < 1e15:
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
        objects.append(RawObject(name.strip(), (x1, y1, x2, y2), track, occluded, generated))
    return size, objects
