"""ImageNet VID, and any COCO-video file, in detectron2's catalogs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from eventful_det.data.coco_video import CocoVideo, Frame, load_coco_video
from eventful_det.data.imagenet_vid import find_tree

IMAGENET_VID_SETS = ("imagenet_vid_train", "imagenet_vid_val", "imagenet_det_train")


def register_imagenet_vid(root: str | os.PathLike[str]) -> None:
    """Register imagenet_vid_train, imagenet_vid_val and imagenet_det_train.

    Args:
        root: the folder of the tree, or its parent, prepared by datasets/prepare_imagenet_vid.py. It is looked at when
            a set is first used.
    """
    for name in IMAGENET_VID_SETS:
        _register(name, partial(_annotations, Path(root), name))


def register_coco_video(name: str, path: str | os.PathLike[str]) -> None:
    """Register a COCO-video file (see `eventful_det.data.coco_video`) under a name; it is read when first used."""
    _register(name, partial(Path, path))


def load_registered(name: str) -> CocoVideo:
    """The data set registered under a name, as our evaluation takes it.

    Raises:
        UserError: its file is missing or wrong.
    """
    return load_coco_video(MetadataCatalog.get(name).annotations())


def _register(name: str, annotations: partial[Path]) -> None:
    """Register a set; a former one of this name is replaced."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)
    DatasetCatalog.register(name, partial(_dicts, name))
    MetadataCatalog.get(name).set(annotations=annotations, evaluator_type="coco_video")


def _annotations(root: Path, name: str) -> Path:
    return find_tree(root) / "annotations" / f"{name}.json"


def _dicts(name: str) -> list[dict[str, Any]]:
    """detectron2's dataset dicts, with "video_id", "frame_id" (the place in the video, from 0) and "is_last_frame"."""
    data = load_registered(name)
    classes = {category: i for i, (category, _) in enumerate(data.categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[label for _, label in data.categories], thing_dataset_id_to_contiguous_id=classes
    )
    return [
        {
            **_frame(data, frame, classes),
            "video_id": video.id,
            "frame_id": place,
            "is_last_frame": place == len(video.frames) - 1,
        }
        for video in data.videos
        for place, frame in enumerate(video.frames)
    ]


def _frame(data: CocoVideo, frame: Frame, classes: dict[int, int]) -> dict[str, Any]:
    return {
        "file_name": str(data.image_path(frame)),
        "image_id": frame.image_id,
        "height": frame.height,
        "width": frame.width,
        "annotations": [
            {
                "bbox": list(annotation.box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": classes[annotation.category_id],
                "iscrowd": int(annotation.iscrowd),
            }
            for annotation in frame.annotations
        ],
    }
