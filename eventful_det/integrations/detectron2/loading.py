"""Frames of videos for detectron2's loops: in order, whole videos to each process."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from eventful_det.data.streams import share_out
from eventful_det.data.transforms import fit_size, resize
from eventful_det.errors import UserError

Dicts = Sequence[dict[str, Any]]


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
    """`DatasetMapper` for frames of videos: RGB, resized as our tools do unless other augmentations are given.

    Args:
        is_train: keep the annotations.
        short_side, long_side: the short side of the network's input in pixels, unless its long side would exceed.
        augmentations: instead of this resizing.
    """

    def __init__(
        self,
        is_train: bool = False,
        short_side: int = 576,
        long_side: int = 1024,
        augmentations: Sequence[T.Augmentation] | None = None,
    ) -> None:
        chosen = [FitFrame(short_side, long_side)] if augmentations is None else list(augmentations)
        super().__init__(is_train, augmentations=chosen, image_format="RGB")

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """An input of `EventfulRCNN`.

        Raises:
            UserError: the frame does not know its video, or its place in it.
        """
        missing = [key for key in ("video_id", "frame_id") if key not in dataset_dict]
        if missing:
            raise UserError(
                f"{dataset_dict.get('file_name')} lacks {' and '.join(missing)}; register the data set with "
                "register_imagenet_vid or register_coco_video"
            )
        return super().__call__(dataset_dict)


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
        waiting = iter(self.videos)
        slots = deque(iter(video) for video in islice(waiting, self.streams))
        while slots:
            slot = slots.popleft()
            index = next(slot, None)
            if index is None:
                slot = iter(next(waiting, ()))
                index = next(slot, None)
            if index is not None:
                yield index
                slots.append(slot)


def build_vid_test_loader(
    names: str | Sequence[str], mapper: VIDMapper, streams: int = 1, num_workers: int = 4
) -> DataLoader[Any]:
    """A loader for `inference_on_dataset` over videos.

    Args:
        names: registered data sets.
        mapper: makes the inputs of the model.
        streams: videos that take turns; a batch holds the next frame of each. `EventfulRCNN` has to remember as many.
        num_workers: processes that read and resize.
    """
    dataset = get_detection_dataset_dicts(names, filter_empty=False)
    sampler = VideoSampler(dataset, streams)
    return build_detection_test_loader(
        dataset, mapper=mapper, sampler=sampler, batch_size=streams, num_workers=num_workers
    )
