"""Stills for training. What sample number n is depends on the seed and n alone, so that training resumes exactly."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.coco_video import CocoVideo, Frame
from eventful_det.data.frame_reader import first_readable, read_labelled
from eventful_det.data.video.transforms import Image
from eventful_det.errors import UserError

Target = dict[str, Tensor]
Labels = Target | list[Target]
"""What is on an image, or on each frame of a clip."""


class Samples(Protocol):
    """An endless sequence of training samples; what sample n is depends on n alone."""

    def __getitem__(self, key: tuple[int, int], /) -> tuple[Tensor, Labels]:
        """Sample n in the size of the given index: images as uint8, and what is on them."""

    def size_of_step(self, step: int) -> int:
        """The index of the size that all samples of a step have."""


class TrainingSet(Dataset[tuple[Tensor, Target]]):
    """An endless, shuffled, augmented sequence of labelled frames; sample n is the same whenever it is asked for.

    Args:
        data: the data set; frames that are not labelled are left out.
        augmentation: applied to every sample.
        seed: of the order and the augmentation.
        repeat_threshold: classes on less than this share of the frames are shown more often (repeat factor
            sampling, Gupta et al. 2019, LVIS); 0 = every frame once an epoch.
        emphasis: factors by which frames with a class are shown more often (or, below 1, less) than that.

    Raises:
        UserError: the data set has no labelled frame, or a class to emphasise is not of it.
    """

    def __init__(
        self,
        data: CocoVideo,
        augmentation: Augmentation,
        seed: int = 0,
        repeat_threshold: float = 0.0,
        emphasis: Mapping[str, float] | None = None,
    ) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.frames = [frame for frame in data.frames if frame.labelled]
        self.label_of = {category: label for label, (category, _) in enumerate(data.categories)}
        if not self.frames:
            raise UserError(
                "the training set holds no labelled frame; prepare it with datasets/prepare_imagenet_vid.py"
            )
        seen = [{a.category_id for a in frame.annotations} for frame in self.frames]
        # A class without a single box cannot be learnt; everything is a negative of it, so that it stays silent.
        self.silent = set(self.label_of) - set().union(*seen)
        emphasis = emphasis or {}
        weights = {id_: emphasis[name] for name, id_ in data.category_ids(emphasis, "emphasis").items()}
        self.repeats = np.cumsum(_repeat_factors(seen, repeat_threshold, weights))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Sample n of the endless sequence, in one of the sizes of the augmentation; the next if it cannot be read.

        Args:
            key: n, or (n, index of the size).

        Returns:
            The image `(3, h, w)` uint8, and its "boxes" `(n, 4)` xyxy in pixels, "labels" and "scores" `(n,)`, which
            say how much each counts; regions to "ignore" `(r, 4)`; further the "areas" `(a, 4)` of the pictures it is
            made of, and for each the classes of which every object has its box, "exhaustive" `(a, K)`.
        """
        n, size = key if isinstance(key, tuple) else (key, 0)
        height, width = self.augmentation.sizes[size]
        picture, target = first_readable(lambda m: self._sample(m, height, width), n)
        return torch.from_numpy(picture).permute(2, 0, 1), target

    def size_of_step(self, step: int) -> int:
        """The index of the size that all samples of a step have."""
        return int(np.random.default_rng([self.seed, 3, step]).integers(len(self.augmentation.sizes)))

    def _sample(self, n: int, height: int, width: int) -> tuple[Image, Target]:
        """Sample n as a picture `(height, width, 3)`, and its target."""
        rng = np.random.default_rng([self.seed, 2, n])
        canvas = np.empty((height, width, 3), np.uint8)
        boxes, labels, scores, ignore, areas, exhaustive = [], [], [], [], [], []
        for i, (top, left, bottom, right) in enumerate(self.augmentation.cells((height, width), rng)):
            frame = self.frame_of(n if i == 0 else int(rng.integers(n + 1, n + len(self.frames))))
            picture = read_labelled(self.data.image_path(frame), frame)
            box, label, score, crowd = self._truth(frame)
            picture, box, keep = self.augmentation(picture, box, (bottom - top, right - left), rng)
            canvas[top:bottom, left:right] = picture
            box = box + np.array([left, top, left, top], np.float32)
            boxes.append(box[keep & ~crowd])
            labels.append(label[keep & ~crowd])
            scores.append(score[keep & ~crowd])
            ignore.append(box[~keep | crowd])
            areas.append([left, top, right, bottom])
            exhaustive.append(self._exhaustive(frame))
        lists = {"boxes": boxes, "labels": labels, "scores": scores, "ignore": ignore}
        target = {name: torch.from_numpy(np.concatenate(values)) for name, values in lists.items()}
        target |= {"areas": torch.tensor(areas, dtype=torch.float32), "exhaustive": torch.tensor(exhaustive)}
        return canvas, target

    def frame_of(self, n: int) -> Frame:
        """The frame that sample n is made of.

        Each epoch draws every frame as often as its repeat factor says, rounded up or down at random.
        """
        epoch, place = divmod(n, len(self.frames))
        rng = np.random.default_rng([self.seed, 1, epoch])
        wanted = (np.arange(len(self.frames)) + rng.random()) / len(self.frames) * self.repeats[-1]
        drawn = np.minimum(np.searchsorted(self.repeats, wanted, side="right"), len(self.frames) - 1)
        return self.frames[rng.permutation(drawn)[place]]

    def _truth(self, frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Boxes `(n, 4)`, labels, scores and whether it is a crowd `(n,)`."""
        objects = frame.annotations
        boxes = np.array([a.box for a in objects], np.float32).reshape(-1, 4)
        labels = np.array([self.label_of[a.category_id] for a in objects], np.int64)
        scores = np.sqrt(np.array([a.score for a in objects], np.float32))  # teachers are less sure than they are right
        return boxes, labels, scores, np.array([a.iscrowd for a in objects], bool)

    def _exhaustive(self, frame: Frame) -> list[bool]:
        """For each class, whether every object of it on the frame has its box."""
        if not frame.labelled:
            return [False] * len(self.label_of)
        return [frame.exhaustive is None or c in frame.exhaustive | self.silent for c in self.label_of]


def _repeat_factors(seen: Sequence[set[int]], threshold: float, weights: Mapping[int, float]) -> NDArray[np.float64]:
    """How often each frame is shown: the largest factor of its classes, weight x max(1, sqrt(threshold / share))."""
    share = {c: n / len(seen) for c, n in Counter(c for classes in seen for c in classes).items()}
    factor = {c: weights.get(c, 1.0) * max(1.0, math.sqrt(threshold / share[c])) for c in share}
    return np.array([max((factor[c] for c in classes), default=1.0) for classes in seen])


class _Batches:
    """(sample, size) of each step of one rank, from `first_step` on, without end."""

    def __init__(self, data: Samples, batch: int, first_step: int, rank: int, ranks: int) -> None:
        self.data, self.batch, self.first_step, self.rank, self.ranks = data, batch, first_step, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            start, size = (step * self.ranks + self.rank) * self.batch, self.data.size_of_step(step)
            yield [(n, size) for n in range(start, start + self.batch)]
            step += 1


def training_loader(
    data: Samples, batch: int, first_step: int = 0, workers: int = 0, rank: int = 0, ranks: int = 1
) -> Iterable[tuple[Tensor, list[Labels]]]:
    """Batches of images `(batch, 3, h, w)` uint8 with their targets, from step `first_step` on, without end."""
    loader = DataLoader(
        cast(Dataset[tuple[Tensor, Labels]], data),
        batch_sampler=_Batches(data, batch, first_step, rank, ranks),
        num_workers=workers,
        collate_fn=_collate_bytes if workers else _collate,
        persistent_workers=workers > 0,
    )
    return map(pickle.loads, loader) if workers else loader


def _collate(samples: Sequence[tuple[Tensor, Labels]]) -> tuple[Tensor, list[Labels]]:
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


def _collate_bytes(samples: Sequence[tuple[Tensor, Labels]]) -> bytes:
    """A batch that comes through a pipe: tensors would take shared memory, of which containers have 64 MB."""
    return pickle.dumps(_collate(samples))
