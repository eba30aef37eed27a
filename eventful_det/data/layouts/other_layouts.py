"""COCO files of other programs to COCO-video.

``mmtracking``
    As mmtracking, mmdetection and TransVOD write ImageNet VID: ``videos``, ``frame_id``, tracks in ``instance_id``, the
    field's 15 training frames per video in ``is_vid_train_frame``. Images that belong to no video (DET) become stills;
    boxes of the catch-all class (``encode_name`` null) are left out.
``eventful``
    As in ``vid_data.tar`` of the official Eventful Transformers: no ``videos``, one folder for all frames of a split,
    named ``..._<video>_<frame>.JPEG``. Where a video lacks frames, its parts become videos of their own.
``cvat``
    "COCO 1.0" of CVAT, of a video: ``frame_000000.jpg``, tracks among the ``attributes`` of a box.
``folders``
    Plain COCO whose frames lie in a folder for each video, as for YOLOV: ``.../<video>/<frame>.JPEG``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import CocoVideo, Problem, clip_box, json_rows, parse_coco_video, read_json_object
from eventful_det.errors import UserError
from eventful_det.files import JsonObject

Place = tuple[str, int]  # name of the video, number of the frame
COCO_LAYOUTS = ("mmtracking", "eventful", "cvat", "folders")
_FLAT = re.compile(r"(?:.*_)?(\d{1,15})_(\d{1,15})$", re.ASCII)  # of the name without its suffix
_CVAT = re.compile(r"frame_\d{6,15}\.\w+$", re.ASCII)


def import_coco(
    path: Path, layout: str | None = None, images: Path | None = None, key_frames: bool = False
) -> tuple[CocoVideo, list[Problem]]:
    """Read a COCO file of another program.

    Args:
        path: of the JSON file.
        layout: one of `COCO_LAYOUTS`; None = tell by the content.
        images: folder that the file names are relative to; None = look where the layout has it.
        key_frames: only the frames that the field trains on (mmtracking's ``is_vid_train_frame``).

    Returns:
        The data set, and what was wrong with it; boxes are clipped to their image, those without area
        or of unknown images or classes are dropped.

    Raises:
        UserError: the file is of no known layout, or the images are not found.
    """
    data = read_json_object(path)
    data["categories"] = data.get("categories") or [{"id": c.id, "name": c.name} for c in IMAGENET_VID]
    lists = {key: json_rows(data, key, path) for key in ("categories", "images", "annotations")}
    if not lists["images"]:
        raise UserError(f"{path} holds no image; there is nothing to import")
    layout = layout or detect_coco_layout(data, path)
    if layout == "mmtracking":
        content = _from_mmtracking(lists, data.get("videos") or ())
    elif key_frames:
        raise UserError(f"{path} is of the layout {layout}, which does not say which frames are key frames")
    else:
        place_of = {"eventful": _flat, "cvat": _numbered(path.stem), "folders": _in_folder}[layout]
        content = _from_names(lists, path, place_of, layout == "eventful")
    problems: list[Problem] = []
    loaded = parse_coco_video(content, path, path.parent, problems, lenient=True)
    if key_frames:
        _keep_key_frames(loaded, lists["images"], path)
    loaded.image_root, name_of = _locate(next(loaded.frames).file_name, path, layout, images)
    for frame in loaded.frames:
        frame.file_name = name_of(frame.file_name)
    clip_boxes(loaded, problems)
    return loaded, problems


def clip_boxes(data: CocoVideo, problems: list[Problem]) -> None:
    """Clip boxes to their image, drop those without area in it, number the rest; `problems` gets what was wrong."""
    for frame in data.frames:
        kept = []
        for annotation in frame.annotations:
            box, fault = clip_box(annotation.box, frame.width, frame.height)
            if fault:
                problems.append(Problem(fault, frame.file_name, f"box {[round(v, 3) for v in annotation.box]}"))
            if box is not None:
                annotation.box, annotation.area = box, (box[2] - box[0]) * (box[3] - box[1])
                kept.append(annotation)
        frame.annotations = kept
    data.renumber()


def detect_coco_layout(data: JsonObject, path: Path) -> str:
    """Which of `COCO_LAYOUTS` a file is of.

    Raises:
        UserError: none.
    """
    images, annotations = data["images"][:100], data["annotations"]
    if "is_vid_train_frame" in images[0] or any("instance_id" in a for a in annotations[:1]):
        return "mmtracking"
    if "videos" in data:
        raise UserError(f"{path} has videos, but no instance_id; if it is COCO-video already, use it as it is")
    names = [str(image.get("file_name")) for image in images]
    tracked = any(isinstance(a.get("attributes"), dict) and "track_id" in a["attributes"] for a in annotations)
    if all(_CVAT.search(name) for name in names) or (tracked and all(map(_numbered(""), names))):
        return "cvat"
    for layout, place in (("eventful", _flat), ("folders", _in_folder)):
        if all(map(place, names)):
            return layout
    raise UserError(f"{path} is of no known layout ({', '.join(COCO_LAYOUTS)}): its file names tell no video and frame")


def _from_mmtracking(lists: dict[str, list[JsonObject]], videos: Iterable[JsonObject]) -> JsonObject:
    names = {video["id"]: str(video.get("name", video["id"])) for video in videos if isinstance(video.get("id"), int)}
    images: list[JsonObject] = []
    for image in lists["images"]:
        if not isinstance(image.get("video_id"), int) or image["video_id"] not in names:  # a still
            image = {**image, "video_id": max(names, default=0) + 1, "frame_id": 0}
            names[image["video_id"]] = str(image.get("file_name"))
        images.append(image)
    others = [category.get("id") for category in lists["categories"] if category.get("encode_name", "") is None]
    return {
        "categories": [category for category in lists["categories"] if category.get("id") not in others],
        "videos": [{"id": i, "name": name} for i, name in names.items()],
        "images": images,
        "annotations": [a for a in lists["annotations"] if a.get("category_id") not in others],
    }


def _keep_key_frames(data: CocoVideo, images: Sequence[JsonObject], path: Path) -> None:
    chosen = {int(image["id"]) for image in images if image.get("is_vid_train_frame")}
    for video in data.videos:
        video.frames = [frame for frame in video.frames if frame.image_id in chosen]
    data.videos = [video for video in data.videos if video.frames]
    if not data.videos:
        raise UserError(f"{path}: no image has is_vid_train_frame, so there are no key frames; take all frames")


def _from_names(
    lists: dict[str, list[JsonObject]], path: Path, place_of: Callable[[str], Place | None], split_gaps: bool
) -> JsonObject:
    """Videos, and the place of each image in them, from the file names."""
    places: dict[str, list[tuple[int, JsonObject]]] = {}
    for image in lists["images"]:
        place = place_of(str(image.get("file_name")))
        if place is None:
            raise UserError(f"{path}: the file name {image.get('file_name')!r} tells no video and frame")
        places.setdefault(place[0], []).append((place[1], image))
    videos: list[JsonObject] = []
    images: list[JsonObject] = []
    for name, frames in sorted(places.items()):
        for part in _parts(sorted(frames, key=lambda frame: frame[0]), split_gaps):
            whole = len(part) == len(frames)
            videos.append({"id": len(videos) + 1, "name": name if whole else f"{name}/{part[0][0]:06d}"})
            images += [{**image, "video_id": len(videos), "frame_id": number} for number, image in part]
    annotations = [_with_attributes(annotation) for annotation in lists["annotations"]]
    return {"categories": lists["categories"], "videos": videos, "images": images, "annotations": annotations}


def _with_attributes(annotation: JsonObject) -> JsonObject:
    """An annotation with what CVAT keeps in its attributes; boxes between its key frames are computed."""
    more = annotation.get("attributes")
    if not isinstance(more, dict):
        return annotation
    told = {key: more.get(key) for key in ("track_id", "occluded")} | {"generated": more.get("keyframe") is False}
    return told | annotation


def _parts(frames: Sequence[tuple[int, JsonObject]], split_gaps: bool) -> list[list[tuple[int, JsonObject]]]:
    """Runs of frames without a gap in their numbers; all frames unless `split_gaps`."""
    parts: list[list[tuple[int, JsonObject]]] = []
    for frame in frames:
        if not parts or (split_gaps and frame[0] > parts[-1][-1][0] + 1):
            parts.append([])
        parts[-1].append(frame)
    return parts


def _flat(file_name: str) -> Place | None:
    found = _FLAT.match(PurePosixPath(file_name).stem)
    return (found[1], int(found[2])) if found else None


def _in_folder(file_name: str) -> Place | None:
    return _numbered("")(file_name) if PurePosixPath(file_name).parent.name else None


def _numbered(video: str) -> Callable[[str], Place | None]:
    """The place of a frame whose name ends in its number, in its folder or, without one, in a given video."""

    def place(file_name: str) -> Place | None:
        file = PurePosixPath(file_name)
        digits = re.search(r"(?<!\d)\d{1,15}$", file.stem, re.ASCII)
        return (file.parent.name or video, int(digits[0])) if digits else None

    return place


def _locate(file_name: str, path: Path, layout: str, folder: Path | None) -> tuple[Path, Callable[[str], str]]:
    """The folder in which the images are, and what turns their file names into such relative to it.

    Raises:
        UserError: the first image is in none of the places where the layout has it.
    """
    looked = []
    for root, name_of in _places(path, layout, folder):
        place = root / name_of(file_name)
        if place.is_file():
            return root, name_of
        looked.append(str(place))
    raise UserError(
        f"{path}: cannot find the images: looked for {' and '.join(looked)}; say where they are with --images"
    )


def _places(path: Path, layout: str, folder: Path | None) -> Iterable[tuple[Path, Callable[[str], str]]]:
    """Folders in which the images may lie, each with what their names are there."""
    base = path.resolve().parent
    names: list[Callable[[str], str]] = [str]
    if layout == "eventful":
        split = path.stem.replace("minival", "val")
        names = [lambda name: PurePosixPath(name).name, _unpacked]
        folders = [base.parent / split, base / "frames"]
    elif layout == "cvat":
        images = base.parent / "images"
        folders = [images, images / path.stem.removeprefix("instances_"), base.parent, base]
    else:
        folders = [base.parent / "Data" / "VID", base.parent / "Data" / "DET", base.parent / "Data", base.parent, base]
    for root in [folder] if folder is not None else folders:
        for name_of in names:
            yield root, name_of


def _unpacked(file_name: str) -> str:
    """Where the official code moves an image of its archive."""
    video, frame = PurePosixPath(file_name).stem.split("_")[-2:]
    return f"{video}/{frame}.jpg"
