"""Frames of videos for detectron2's loops: in order, whole videos to each process."""

from __future__ import annotations

import copy
import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from eventful_det.data.frame_reader import ForwardReader
from eventful_det.data.streams import plan, share_out
from eventful_det.data.video.pictures import UnreadablePicture, read_image
from eventful_det.data.video.transforms import Image, fit_size, resize
from eventful_det.errors import UserError
from eventful_det.files import JsonObject

Dicts = Sequence[JsonObject]
Mapper = Callable[[JsonObject], JsonObject | None]

logger = logging.getLogger(__name__)
_OPEN_VIDEOS = 16  # files that a process has open at once


class FitFrame(T.Augmentation):
    """Resize a frame as the tools of eventful_det do: its short side to `short_side`, unless the long side exceeds."""

    def __init__(self, short_side: int, long_side: int) -> None:
        super().__init__()
        self.short_side, self.long_side = short_side, long_side

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return _Resize(height, width, *fit_size(height, width, self.short_side, self.long_side))


class _Resize(T.ResizeTransform):
    """As detectron2's, by area when shrinking."""

    def apply_image(self, img: np.ndarray, interp: Any = None) -> np.ndarray:
        return resize(img, self.new_h, self.new_w) if interp is None else super().apply_image(img, interp)


class VIDMapper(DatasetMapper):
    """A `DatasetMapper` for frames of videos, which are pictures or lie in video files; boxes only.

    `VIDMapper(cfg, is_train)` takes augmentations, sizes and `INPUT.FORMAT` from a yacs config, as `DatasetMapper`
    does. For testing, frames are resized as the tools of eventful_det do.

    Args:
        is_train: keep the annotations.
        short_side, long_side: the short side of the network's input in pixels, unless its long side would exceed.
        augmentations: instead of this resizing.
        image_format: "RGB" or "BGR".
    """

    @configurable
    def __init__(
        self,
        is_train: bool = False,
        *,
        short_side: int = 576,
        long_side: int = 1024,
        augmentations: Sequence[T.Augmentation | T.Transform] | None = None,
        image_format: str = "RGB",
    ) -> None:
        chosen = [FitFrame(short_side, long_side)] if augmentations is None else list(augmentations)
        super().__init__(is_train, augmentations=chosen, image_format=image_format)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> JsonObject:
        """Arguments from a yacs config."""
        told = super().from_config(cfg, is_train)
        sizes = {"short_side": cfg.INPUT.MIN_SIZE_TEST, "long_side": cfg.INPUT.MAX_SIZE_TEST}
        pixels = {"augmentations": told["augmentations"]} if is_train else sizes
        return {"is_train": is_train, "image_format": told["image_format"], **pixels}

    def __call__(self, dataset_dict: JsonObject) -> JsonObject | None:
        """An input of `EventfulRCNN`; in training None in place of a frame that cannot be read: another is taken.

        Raises:
            UnreadablePicture: the frame cannot be read, or has another size than the data set says.
            UserError: it does not know its video, or its place in it.
        """
        missing = [key for key in ("video_id", "frame_id") if key not in dataset_dict]
        if missing and not self.is_train:
            raise UserError(
                f"{dataset_dict.get('file_name')} lacks {' and '.join(missing)}; register the data set with "
                "register_imagenet_vid or register_coco_video"
            )
        entry = copy.deepcopy(dataset_dict)
        try:
            image = _read(entry)
        except UnreadablePicture as error:
            if not self.is_train:
                raise
            logger.warning("left out: %s", error)
            return None
        picture = T.AugInput(image if self.image_format == "RGB" else image[..., ::-1])
        transforms = self.augmentations(picture)
        entry["image"] = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
        if self.is_train:
            self._transform_annotations(entry, transforms, picture.image.shape[:2])
        else:
            entry.pop("annotations", None)
        return entry


def _read(entry: JsonObject) -> Image:
    """The picture `(h, w, 3)` uint8 RGB of a dataset dict, which may hold it as "frame"; the dict is given its size."""
    name = str(entry["file_name"])
    try:
        if "frame" in entry:
            image = entry["frame"]
        elif "video_file" in entry:
            image = _read_video(entry["video_file"], entry["file_frame"])
        else:
            image = read_image(name)
    except UserError as error:
        raise UnreadablePicture(str(error)) from None
    height, width = image.shape[:2]
    told = (entry.setdefault("width", width), entry.setdefault("height", height))
    if told != (width, height):
        raise UnreadablePicture(
            f"{name} is {width}x{height}, but the data set says {told[0]}x{told[1]}; prepare it again"
        )
    return image


_open_videos: dict[int, OrderedDict[str, ForwardReader]] = {}  # by process, so that forked ones open their own


def _read_video(path: str, number: int) -> Image:
    """A frame of a video file: quick in the order of frames, from the start again where an earlier one is asked for."""
    files = _open_videos.setdefault(os.getpid(), OrderedDict())
    file = files.pop(path, None)
    if file is not None and file.next > number:
        file.close()
        file = None
    files[path] = file = file or ForwardReader(path)
    if len(files) > _OPEN_VIDEOS:
        files.popitem(last=False)[1].close()
    return next(islice(file, number - file.next, None))


class VideoSampler(Sampler[int]):
    """Indices of the frames of this process: whole videos, each in the order of its frames.

    detectron2's `InferenceSampler` cuts videos between processes. Videos are shared out so that all processes have
    about as many frames.

    Args:
        dataset: dataset dicts with "video_id".
        streams: so many videos take turns, frame by frame; with a batch of the same size, a batch holds the next
            frame of each.
    """

    def __init__(self, dataset: Dicts, streams: int = 1) -> None:
        if streams < 1:
            raise UserError(f"streams must be at least 1, got {streams}")
        self.streams = streams
        frames: dict[Hashable, list[int]] = {}
        for i, entry in enumerate(dataset):
            frames.setdefault(entry["video_id"], []).append(i)
        videos = list(frames.values())
        mine = share_out([len(video) for video in videos], comm.get_world_size())[comm.get_rank()]
        self.videos = [videos[i] for i in sorted(mine)]

    def __len__(self) -> int:
        return sum(len(video) for video in self.videos)

    def __iter__(self) -> Iterator[int]:
        for step in plan([len(video) for video in self.videos], self.streams):
            for _, video, place in step:
                yield self.videos[video][place]


class VideoLoader(DataLoader[Any]):
    """Batches of frames; those that cannot be read are named and left out, as `tools/eval_net.py` does."""

    def __iter__(self) -> Iterator[list[JsonObject]]:  # type: ignore[override]
        # A forked worker that collects a dropped decoder of this process would wait for ever for the decoder's threads.
        gc.collect()
        for batch in super().__iter__():
            for entry in batch:
                if "fault" in entry:
                    logger.warning("left out: %s", entry["fault"])
            if readable := [entry for entry in batch if "fault" not in entry]:
                yield readable


def build_vid_test_loader(
    names: str | Sequence[str], mapper: Mapper, streams: int = 1, num_workers: int = 4
) -> VideoLoader:
    """A loader for `inference_on_dataset` over videos.

    Args:
        names: registered data sets.
        mapper: makes the inputs of the model, for example a `VIDMapper`.
        streams: videos that take turns; a batch holds the next frame of each. `EventfulRCNN` has to remember as many.
        num_workers: processes that read and resize; of a video file, each decodes all frames.
    """
    dataset = get_detection_dataset_dicts(names, filter_empty=False)
    return VideoLoader(
        MapDataset(DatasetFromList(dataset, copy=False), partial(_mapped, mapper)),
        sampler=VideoSampler(dataset, streams),
        batch_size=streams,
        num_workers=num_workers,
        collate_fn=list,
    )


def _mapped(mapper: Mapper, entry: JsonObject) -> JsonObject | None:
    try:
        return mapper(entry)
    except UnreadablePicture as error:
        return {"fault": str(error)}
