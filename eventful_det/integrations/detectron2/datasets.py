"""ImageNet VID, and any COCO-video file, in detectron2's catalogs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from eventful_det.data.coco_video import CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.layouts.imagenet_vid import find_tree
from eventful_det.errors import UserError
from eventful_det.files import JsonObject

IMAGENET_VID_SETS = ("imagenet_vid_train", "imagenet_vid_val", "imagenet_det_train")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoSet:
    """What stands in detectron2's catalog for a COCO-video file; the file is read when it is called.

    Attributes:
        name: in the catalog.
        path: of the file, or of the ILSVRC tree that holds it.
        in_tree: whether it is a tree.
    """

    name: str
    path: Path
    in_tree: bool = False

    def load(self) -> CocoVideo:
        """The data set, as our evaluation takes it.

        Raises:
            UserError: its file is missing or wrong.
        """
        return load_coco_video(
            find_tree(self.path) / "annotations" / f"{self.name}.json" if self.in_tree else self.path
        )

    def __call__(self) -> list[JsonObject]:
        """detectron2's dataset dicts, with "video_id", "frame_id" (the place in the video, from 0), "is_last_frame".

        Frames that lie in a video file have its path as "video_file", and their number there as "file_frame".
        """
        data = self.load()
        classes = {category: i for i, (category, _) in enumerate(data.categories)}
        MetadataCatalog.get(self.name).set(
            thing_classes=[label for _, label in data.categories], thing_dataset_id_to_contiguous_id=classes
        )
        return [
            {
                **_frame(data, video, frame, classes),
                "video_id": video.id,
                "frame_id": place,
                "is_last_frame": place == len(video.frames) - 1,
            }
            for video in data.videos
            for place, frame in enumerate(video.frames)
        ]


def register_imagenet_vid(root: str | os.PathLike[str]) -> None:
    """Register imagenet_vid_train, imagenet_vid_val and imagenet_det_train; what is yours under a name stays.

    Args:
        root: the folder of the tree, or its parent, prepared by datasets/prepare_imagenet_vid.py. It is looked at when
            a set is first used.
    """
    for name in IMAGENET_VID_SETS:
        try:
            _register(VideoSet(name, Path(root), in_tree=True))
        except UserError as error:
            logger.warning("%s", error)


def register_coco_video(name: str, path: str | os.PathLike[str]) -> None:
    """Register a COCO-video file (see `eventful_det.data.coco_video`) under a name; it is read when first used.

    Its frames are pictures or lie in video files; `VIDMapper` reads both.

    Raises:
        UserError: another data set than one of ours has the name.
    """
    _register(VideoSet(name, Path(path)))


def load_registered(name: str) -> CocoVideo:
    """The data set registered under a name, as our evaluation takes it.

    Raises:
        UserError: its file is missing or wrong, or it is not of `register_coco_video` or `register_imagenet_vid`.
    """
    known = DatasetCatalog.data.get(name)
    if not isinstance(known, VideoSet):
        raise UserError(f"the data set {name!r} was not registered by register_coco_video or register_imagenet_vid")
    return known.load()


def _register(videos: VideoSet) -> None:
    """Register a set; it replaces one of ours, and no other."""
    name, known = videos.name, DatasetCatalog.data.get(videos.name)
    if isinstance(known, VideoSet):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    elif known is not None:
        raise UserError(f"a data set {name!r} of your own is registered already, and stays; choose another name")
    DatasetCatalog.register(name, videos)
    MetadataCatalog.get(name).set(evaluator_type="coco_video")


def _frame(data: CocoVideo, video: Video, frame: Frame, classes: dict[int, int]) -> JsonObject:
    inside = {"video_file": str(data.image_root / video.file_name), "file_frame": frame.frame_id}
    return {
        "file_name": str(data.image_path(frame)),
        **(inside if video.file_name else {}),
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
