"""Labels of videos that are no COCO, to COCO-video; `label_files` reads the files.

The frames are pictures in a folder or lie in a video file. supervision's readers are of no use here: they know neither
video files nor the order of frames nor tracks, and hold all pictures in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Problem, Video
from eventful_det.data.layouts.label_files import READERS, VideoLabels
from eventful_det.data.layouts.other_layouts import COCO_LAYOUTS, clip_boxes, import_coco
from eventful_det.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, open_source
from eventful_det.data.video.pictures import picture_size
from eventful_det.errors import UserError

_NUMBER = re.compile(r"(.*?)(\d{1,15})$", re.ASCII)


LAYOUTS = (*COCO_LAYOUTS, *READERS)
_INSIDE = (  # folders: a layout and a file in it, the most telling first
    ("mot", "gt/gt.txt"), ("mot", "gt.txt"), ("cvat_xml", "annotations.xml"), ("voc", "*.xml"),
    ("voc", "Annotations/*.xml"), ("yolo", "labels/*.txt"), ("yolo", "*.txt"),
)  # fmt: skip


def import_annotations(
    path: Path,
    layout: str | None = None,
    media: Path | None = None,
    key_frames: bool = False,
    classes: Path | None = None,
) -> tuple[CocoVideo, list[Problem]]:
    """Read labels that another program wrote.

    Args:
        path: of the file, of the folder with a file for each frame, or of the one above.
        layout: one of `LAYOUTS`; None = tell by the content.
        media: the video file, or the folder of pictures; None = look where the layout has it.
        key_frames: see `import_coco`.
        classes: a text file with a class on each line, or a YAML file with ``names``; None = look for one.

    Returns:
        The data set, and what was wrong with it; boxes are clipped to their frame.

    Raises:
        UserError: the files are of no known layout, or the frames or classes are not found.
    """
    layout, path = _detect(path, layout)
    if layout not in READERS:
        return import_coco(path, None if layout == "coco" else layout, media, key_frames)
    if key_frames:
        raise UserError(f"{path} is of the layout {layout}, which does not say which frames are key frames")
    labels = READERS[layout](path, classes)
    if not labels.classes or not (labels.marks or (labels.first is not None and not labels.problems)):
        raise UserError(
            f"{path} holds no labels of the layout {layout}, or no object and no name of a class (--classes)"
        )
    place = _find_media(path, labels) if media is None else media
    if place.is_dir():
        videos, root = _with_pictures(labels, place), place
    else:
        videos, root = [_with_video(labels, place)], place.parent
    data = CocoVideo(list(enumerate(labels.classes, start=1)), videos, root.resolve())
    clip_boxes(data, labels.problems)
    return data, labels.problems


def _detect(path: Path, wanted: str | None) -> tuple[str, Path]:
    """The layout, unless it is known, and the file or folder that is to be read."""
    if path.is_dir() and wanted not in COCO_LAYOUTS:
        for layout, pattern in _INSIDE:
            found = next(path.glob(pattern), None)
            if found is not None and wanted in (layout, None):
                return layout, found.parent if "*" in pattern else found
        raise UserError(f"{path} holds no files of {wanted or 'a known layout'}; known are {', '.join(LAYOUTS)}")
    layouts = {".txt": "mot", ".csv": "mot", ".xml": "cvat_xml"}
    return wanted or layouts.get(path.suffix.lower(), "coco"), path


def _with_pictures(labels: VideoLabels, folder: Path) -> list[Video]:
    """Videos of pictures: all of them in order, or those whose names are alike but for their number."""
    pictures = sorted(_files(folder, IMAGE_SUFFIXES), key=_place)
    if labels.first is not None:
        names = {path: str(i) for i, path in enumerate(pictures, start=labels.first)}
    else:
        names = {path: path.stem for path in pictures}
    _report_missing(labels, names.values())
    videos: dict[str, Video] = {}
    for image, (path, name) in enumerate(names.items(), start=1):
        try:
            size = picture_size(path)
        except (OSError, ValueError) as error:
            labels.problems.append(Problem("unreadable_image", path.name, str(error)))
            continue
        prefix, number = (folder.name, int(name)) if labels.first is not None else _place(path)
        title = prefix.rstrip("_-. ") or folder.name
        video = videos.setdefault(prefix, Video(len(videos) + 1, title))
        if video.frames and video.frames[-1].frame_id == number:
            detail = f"the same frame as {video.frames[-1].file_name}"
            labels.problems.append(Problem("duplicate_frame", path.name, detail))
            continue
        video.frames.append(_frame(labels, image, path.name, size, number, name))
    if not videos:
        raise UserError(f"{folder} holds no picture that can be read; say where the frames are with --images")
    return list(videos.values())


def _with_video(labels: VideoLabels, path: Path) -> Video:
    """The frames of a video file; it is decoded once, since its header may not tell how many there are."""
    numbers = {_split(name)[1]: name for name in labels.marks}
    if len({_split(name)[0] for name in labels.marks}) > 1:
        raise UserError(f"the labels belong to several videos; expected those of {path} alone")
    size, count = (0, 0), 0
    with open_source(path) as source:
        for frame in source:
            size, count = (frame.image.shape[1], frame.image.shape[0]), count + 1
    first = labels.first
    if first is None:  # ultralytics counts from 1, without zeros in front; CVAT from 0
        padded = any(re.search(r"(?<!\d)0\d+$", name) for name in labels.marks)
        first = int(min(numbers) > 0 and (max(numbers) >= count or not padded))
    names = {number: numbers.get(number + first, "") for number in range(count)}
    _report_missing(labels, names.values())
    video = Video(1, path.stem, [], path.name)
    for number, name in names.items():
        video.frames.append(_frame(labels, number + 1, f"{path.name}#{number}", size, number, name))
    return video


def _frame(labels: VideoLabels, image: int, file_name: str, size: tuple[int, int], number: int, name: str) -> Frame:
    """A frame with its objects, if it has an entry of that name."""
    known = name in labels.marks
    searched = labels.searched is None or number in labels.searched
    frame = Frame(image, file_name, *size, number, labelled=known or (labels.empty and searched))
    for mark in labels.marks.get(name, ()):
        scale = size * 2 if mark.relative else (1, 1, 1, 1)
        x1, y1, x2, y2 = (value * side for value, side in zip(mark.box, scale, strict=True))
        category = labels.classes.index(mark.label) + 1
        flags = (mark.track, mark.occluded, mark.generated, mark.ignored)
        frame.annotations.append(Annotation(category, (x1, y1, x2, y2), *flags))
    return frame


def _report_missing(labels: VideoLabels, names: Iterable[str]) -> None:
    there = set(names)
    lost = [name for name in labels.marks if name not in there]
    labels.problems += (Problem("missing_image", name, "there is no such frame") for name in lost)


def _find_media(path: Path, labels: VideoLabels) -> Path:
    """The folder of pictures, or the video file, where the layouts have them.

    Raises:
        UserError: there are none, or several videos.
    """
    base = path.resolve() if path.is_dir() else path.resolve().parent
    twin = Path(*("images" if part == "labels" else part for part in base.parts))
    up = base.parent
    folders = [twin, base / "img1", base / "images", up / "img1", up / "images", up / "JPEGImages", base, up]
    for folder in folders:
        numbered = labels.first is not None and folder not in (base, up)  # any picture may lie beside the labels
        if any(numbered or picture.stem in labels.marks for picture in _files(folder, IMAGE_SUFFIXES)):
            return folder
    for folder in (base, up):
        videos = [video for video in _files(folder, VIDEO_SUFFIXES) if video.name != "annotated.mp4"]  # has boxes in it
        named = [video for video in videos if any(name.startswith(video.stem) for name in (base.name, *labels.marks))]
        if len(videos) == 1 or len(named) == 1:
            return (named or videos)[0]
        if videos:
            told = ", ".join(sorted(video.name for video in videos)[:5])
            raise UserError(f"{path}: which video is it of ({told}, ...)? Say so with --images FILE")
    raise UserError(f"{path}: no pictures and no video beside the labels; say where they are with --images")


def _files(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    found = folder.iterdir() if folder.is_dir() else iter(())
    return (path for path in found if path.suffix.lower() in suffixes and path.is_file())


def _place(path: Path) -> tuple[str, int]:
    return _split(path.stem)


def _split(name: str) -> tuple[str, int]:
    """The name of a frame without its number, and the number; 0 if it has none."""
    found = _NUMBER.match(name)
    return (found[1], int(found[2])) if found else (name, 0)
