"""Stills for training. What sample number n is depends on the seed and n alone, so that training resumes exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eventful_det.data.coco_video import CocoVideo, Frame
from eventful_det.data.transforms import Augmentation, Image
from eventful_det.errors import UserError

Target = dict[str, Tensor]


def read_image(path: str) -> Image:
    """Read a picture as `(h, w, 3)` uint8 RGB.

    Raises:
        UserError: the file is missing or no picture.
    """
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"cannot read the image {path}: it is missing, truncated or not a picture")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


class TrainingSet(Dataset[tuple[Tensor, Target]]):
    """An endless, shuffled, augmented sequence of labelled frames; sample n is the same whenever it is asked for.

    Args:
        data: the data set; frames that are not labelled are left out.
        augmentation: applied to every sample.
        seed: of the order and the augmentation.

    Raises:
        UserError: the data set has no labelled frame.
    """

    def __init__(self, data: CocoVideo, augmentation: Augmentation, seed: int = 0) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.frames = [frame for frame in data.frames if frame.labelled]
        self.label_of = {category: label for label, (category, _) in enumerate(data.categories)}
        if not self.frames:
            raise UserError(
                "the training set holds no labelled frame; prepare it with datasets/prepare_imagenet_vid.py"
            )

    def __getitem__(self, n: int) -> tuple[Tensor, Target]:
        """The n-th sample of the endless sequence: image `(3, h, w)` uint8 and its boxes and labels."""
        epoch, place = divmod(n, len(self.frames))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.frames))
        frame = self.frames[order[place]]
        image = read_image(str(self.data.image_path(frame)))
        boxes, labels = self._truth(frame)
        image, boxes, keep = self.augmentation(image, boxes, np.random.default_rng([self.seed, 2, n]))
        target = {"boxes": torch.from_numpy(boxes[keep]), "labels": torch.from_numpy(labels[keep])}
        return torch.from_numpy(image).permute(2, 0, 1), target

    def _truth(self, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        objects = [a for a in frame.annotations if not a.iscrowd]
        boxes = np.array([a.box for a in objects], np.float32).reshape(-1, 4)
        return boxes, np.array([self.label_of[a.category_id] for a in objects], np.int64)


class _Batches:
    """Numbers of the samples of each step of one rank, from `first_step` on, without end."""

    def __init__(self, batch: int, first_step: int, rank: int, ranks: int) -> None:
        self.batch, self.first_step, self.rank, self.ranks = batch, first_step, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            start = (step * self.ranks + self.rank) * self.batch
            yield list(range(start, start + self.batch))
            step += 1


def training_loader(
    data: TrainingSet, batch: int, first_step: int = 0, workers: int = 0, rank: int = 0, ranks: int = 1
) -> Iterable[tuple[Tensor, list[Target]]]:
    """Batches of images `(batch, 3, h, w)` uint8 with their targets, from step `first_step` on, without end."""
    return DataLoader(
        data,
        batch_sampler=_Batches(batch, first_step, rank, ranks),
        num_workers=workers,
        collate_fn=_collate,
        persistent_workers=workers > 0,
    )


def _collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)
