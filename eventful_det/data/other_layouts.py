"""COCO files of other programs to COCO-video.

``mmtracking``
    As mmtracking, mmdetection and TransVOD write ImageNet VID: ``videos``, ``frame_id``, tracks in ``instance_id``, the
    field's 15 training frames per video in ``is_vid_train_frame``. Images that belong to no video (DET) become stills;
    boxes of the catch-all class (``encode_name`` null) are left out.
``eventful``
    As in ``vid_data.tar`` of the official Eventful Transformers: no ``videos``, one folder for all frames of a split,
    named ``..._<video>_<frame>.JPEG``. Where a video lacks frames, its parts become videos of their own.
``folders``
    Plain COCO whose frames lie in a folder for each video, as for YOLOV: ``.../<video>/<frame>.JPEG``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eventful_det.data.classes import IMAGENET_VID
from eventful_det.data.coco_video import Box, CocoVideo, parse_coco_video, read_json_object
from eventful_det.data.imagenet_vid import Problem, clip_box
from eventful_det.errors import UserError

Json = dict[str, Any]
Place = tuple[str, int]  # name of the video, number of the frame
LAYOUTS = ("mmtracking", "eventful", "folders")
_FLAT = re.compile(r"(?:.*_)?(\d+)_(\d+)$")  # of the name without its suffix


def import_annotations(
    path: Path, layout: str | None = None, images: Path | None = None, key_frames: bool = False
) -> tuple[CocoVideo, list[Problem]]:
    """Read a COCO file of another program.

    Args:
        path: of the JSON file.
        layout: one of `LAYOUTS`; None = tell by the content.
        images: folder that the file names are relative to; None = look where the layout has it.
        key_frames: only the frames that the field trains on (mmtracking's ``is_vid_train_frame``).

    Returns:
        The data set, and what was wrong with it; boxes are clipped to their image, those without area
        or of unknown classes are dropped.

    Raises:
        UserError: the file is of no known layout, or the images are not found.
    """
    data = _checked(read_json_object(path), path)
    layout = layout or detect_layout(data, path)
    if layout == "mmtracking":
        content = _from_mmtracking(data, path, key_frames)
    elif key_frames:
        raise UserError(f"{path} is of the layout {layout}, which does not say which frames are key frames")
    else:
        content = _from_names(data, path, _flat if layout == "eventful" else _in_folder, layout == "eventful")
    root, content["images"] = _locate(content["images"], path, layout, images)
    problems = _mend_boxes(content, {image["id"] for image in data["images"]})
    return parse_coco_video(content, path, root), problems


def _checked(data: Json, path: Path) -> Json:
    """The lists of a COCO file, each of objects with what is needed of them."""
    data = {**data, "categories": data.get("categories") or _vid_categories()}
    needed = {"categories": ("id", "name"), "images": ("id", "file_name", "width", "height"), "annotations": ()}
    for key, fields in needed.items():
        rows = data.get(key)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a COCO file with a list named '{key}'")
        for n, row in enumerate(rows):
            missing = [field for field in fields if field not in row] if isinstance(row, dict) else ["everything"]
            if missing:
                raise UserError(f"{path}: {key}[{n}] lacks {', '.join(missing)}; expected an object of COCO")
    if not data["images"]:
        raise UserError(f"{path} holds no image; there is nothing to import")
    return data


def detect_layout(data: Json, path: Path) -> str:
    """Which of `LAYOUTS` a file is of.

    Raises:
        UserError: none.
    """
    images, annotations = data["images"], data["annotations"]
    if any("is_vid_train_frame" in i for i in images[:1]) or any("instance_id" in a for a in annotations[:1]):
        return "mmtracking"
    if "videos" in data:
        raise UserError(f"{path} has videos, but no instance_id; if it is COCO-video already, use it as it is")
    for layout, place in (("eventful", _flat), ("folders", _in_folder)):
        if images and all(place(str(image.get("file_name"))) for image in images[:100]):
            return layout
    raise UserError(f"{path} is of no known layout ({', '.join(LAYOUTS)}): its file names tell no video and frame")


def _vid_categories() -> list[Json]:
    return [{"id": category.id, "name": category.name} for category in IMAGENET_VID]


def _from_mmtracking(data: Json, path: Path, key_frames: bool) -> Json:
    names = {video["id"]: str(video.get("name", video["id"])) for video in data.get("videos") or ()}
    images: list[Json] = []
    for image in data["images"]:
        if key_frames and not image.get("is_vid_train_frame"):
            continue
        if image.get("video_id") not in names:  # a still
            image = {**image, "video_id": max(names, default=0) + 1, "frame_id": 0}
            names[image["video_id"]] = str(image["file_name"])
        images.append(image)
    if not images:
        raise UserError(f"{path}: no image has is_vid_train_frame, so there are no key frames; take all frames")
    used = {image["video_id"] for image in images}
    others = {c["id"] for c in data["categories"] if c.get("encode_name", "") is None}
    return {
        "categories": [c for c in data["categories"] if c["id"] not in others],
        "videos": [{"id": i, "name": name} for i, name in names.items() if i in used],
        "images": images,
        "annotations": [_tracked(a) for a in data["annotations"] if a.get("category_id") not in others],
    }


def _tracked(annotation: Json) -> Json:
    """An annotation with our names; -1 says "unknown" there."""
    flags = {key: annotation.get(key) in (True, 1) for key in ("occluded", "generated")}
    instance = annotation.get("instance_id", -1)
    return {**annotation, **flags, "track_id": instance if isinstance(instance, int) and instance >= 0 else None}


def _from_names(data: Json, path: Path, place_of: Callable[[str], Place | None], split_gaps: bool) -> Json:
    """Videos, and the place of each image in them, from the file names."""
    places: dict[str, list[tuple[int, Json]]] = {}
    for image in data["images"]:
        place = place_of(str(image.get("file_name")))
        if place is None:
            raise UserError(f"{path}: the file name {image.get('file_name')!r} tells no video and frame")
        places.setdefault(place[0], []).append((place[1], image))
    videos: list[Json] = []
    images: list[Json] = []
    for name, frames in sorted(places.items()):
        for part in _parts(sorted(frames, key=lambda frame: frame[0]), split_gaps):
            whole = len(part) == len(frames)
            videos.append({"id": len(videos) + 1, "name": name if whole else f"{name}/{part[0][0]:06d}"})
            images += [{**image, "video_id": len(videos), "frame_id": number} for number, image in part]
    return {"videos": videos, "images": images, **{key: data[key] for key in ("categories", "annotations")}}


def _parts(frames: Sequence[tuple[int, Json]], split_gaps: bool) -> list[list[tuple[int, Json]]]:
    """Runs of frames without a gap in their numbers; all frames unless `split_gaps`."""
    parts: list[list[tuple[int, Json]]] = []
    for frame in frames:
        if not parts or (split_gaps and frame[0] > parts[-1][-1][0] + 1):
            parts.append([])
        parts[-1].append(frame)
    return parts


def _flat(file_name: str) -> Place | None:
    found = _FLAT.match(PurePosixPath(file_name).stem)
    return (found[1], int(found[2])) if found else None


def _in_folder(file_name: str) -> Place | None:
    file = PurePosixPath(file_name)
    digits = re.search(r"\d+$", file.stem)
    return (file.parent.name, int(digits[0])) if digits and file.parent.name else None


def _locate(images: list[Json], path: Path, layout: str, folder: Path | None) -> tuple[Path, list[Json]]:
    """The folder in which the images are, and the images with file names relative to it.

    Raises:
        UserError: the first image is in none of the places where the layout has it.
    """
    looked = []
    for root, name_of in _places(path, layout, folder):
        place = root / name_of(str(images[0]["file_name"]))
        if place.is_file():
            return root, [{**image, "file_name": name_of(str(image["file_name"]))} for image in images]
        looked.append(str(place))
    told = f"looked for {' and '.join(looked)}; say where they are with --images"
    raise UserError(f"{path}: cannot find the images: {told}")


def _places(path: Path, layout: str, folder: Path | None) -> Iterable[tuple[Path, Callable[[str], str]]]:
    """Folders in which the images may lie, each with what their names are there."""
    base = path.resolve().parent
    names: list[Callable[[str], str]] = [str]
    if layout == "eventful":
        split = path.stem.replace("minival", "val")
        names = [lambda name: PurePosixPath(name).name, _unpacked]
        folders = [base.parent / split, base / "frames"]
    else:
        folders = [base.parent / "Data" / "VID", base.parent / "Data" / "DET", base.parent / "Data", base.parent, base]
    for root in [folder] if folder is not None else folders:
        for name_of in names:
            yield root, name_of


def _unpacked(file_name: str) -> str:
    """Where the official code moves an image of its archive."""
    video, frame = PurePosixPath(file_name).stem.split("_")[-2:]
    return f"{video}/{frame}.jpg"


def _mend_boxes(content: Json, known: set[int]) -> list[Problem]:
    """Clip boxes to their image, drop those that cannot be used; what was wrong.

    Args:
        content: COCO-video lists; its annotations are replaced.
        known: ids of all images of the file, also of those that were left out.
    """
    images = {image["id"]: image for image in content["images"]}
    classes = {category["id"] for category in content["categories"]}
    kept: list[Json] = []
    problems: list[Problem] = []
    for annotation in content["annotations"]:
        image = images.get(annotation.get("image_id"))
        told = f"annotation {annotation.get('id')}"
        if image is None:
            if annotation.get("image_id") not in known:
                problems.append(Problem("unknown_image", told, f"image_id {annotation.get('image_id')!r}"))
            continue
        file = str(image["file_name"])
        if annotation.get("category_id") not in classes:
            problems.append(Problem("unknown_class", file, f"{told}: category_id {annotation.get('category_id')!r}"))
            continue
        box, fault = _clipped(annotation.get("bbox"), (image["width"], image["height"]))
        if fault:
            problems.append(Problem(fault, file, f"{told}: bbox {annotation.get('bbox')!r}"))
        if box is not None:
            x1, y1, x2, y2 = box
            size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            kept.append({**annotation, **size, "id": len(kept) + 1})
    content["annotations"] = kept
    return problems


def _clipped(bbox: Any, size: tuple[int, int]) -> tuple[Box | None, str]:
    try:
        x, y, w, h = (float(value) for value in bbox)
    except (TypeError, ValueError):
        return None, "box_degenerate"
    return clip_box((x, y, x + w, y + h), size)
