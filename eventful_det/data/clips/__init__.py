"""Clips for temporal training: consecutive frames of videos, or stills set in motion. Sample n follows from n alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from eventful_det.data.augmentation import Augmentation, areas
from eventful_det.data.clips.motion import Camera, Sprite, camera_path
from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.frame_reader import first_readable, read_labelled
from eventful_det.data.training_set import Target, TrainingSet
from eventful_det.data.video.transforms import Image
from eventful_det.options import Count, Range, Share, convert_fields

_MARGIN = 1.25  # sides of the picture that a camera moves over, relative to those of a frame
_SPRITE = (0.003, 0.2)  # smallest and largest area of a pasted object, as a share of the frame


@dataclass(frozen=True)
class ClipOptions:
    """What clips are like. All but `length` and `stride` concern clips made of stills.

    Attributes:
        length: frames of a clip. A video that has fewer is set in motion like a still.
        stride: largest distance between the frames taken of a video; drawn for every clip.
        static: share of the clips whose camera stands still.
        pan, zoom: fastest motion of the others, see `camera_path`.
        sprites: largest number of objects, cut out of other pictures, that fly through.
        speed: their fastest motion per frame, as a share of the frame's width.
        noise: largest standard deviation of sensor noise, drawn for every clip, in grey levels.
    """

    length: Annotated[int, Range(2, 1000)] = 6
    stride: Count = 1
    static: Share = 0.5
    pan: Share = 0.02
    zoom: Share = 0.01
    sprites: Annotated[int, Range(0, 100)] = 2
    speed: Share = 0.03
    noise: Annotated[float, Range(0, 255)] = 3.0

    def __post_init__(self) -> None:
        convert_fields(self, "clips")


class ClipSet(TrainingSet):
    """An endless, shuffled, augmented sequence of labelled clips; sample n is the same whenever it is asked for.

    A clip has one augmentation for all its frames. On frames that are not labelled nothing counts as background.

    Args:
        data: videos, stills, or both.
        augmentation: of every clip; mosaics are made of stills only.
        options: what clips are like.
        seed, repeat_threshold, emphasis: as of `TrainingSet`, whose frames tell which clips are shown.

    Raises:
        UserError: the data set has no labelled frame.
    """

    def __init__(
        self,
        data: CocoVideo,
        augmentation: Augmentation,
        options: ClipOptions,
        seed: int = 0,
        repeat_threshold: float = 0.0,
        emphasis: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(data, augmentation, seed, repeat_threshold, emphasis)
        self.options = options
        self.places = {
            frame.image_id: (video, place) for video in data.videos for place, frame in enumerate(video.frames)
        }

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, list[Target]]:  # type: ignore[override]
        """Sample n of the endless sequence: frames `(T, 3, h, w)` uint8, and a target as of `TrainingSet` for each."""
        n, size = key if isinstance(key, tuple) else (key, 0)
        height, width = self.augmentation.sizes[size]
        frames, targets = first_readable(lambda m: self._clip(m, height, width), n)
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), targets

    def _clip(self, n: int, height: int, width: int) -> tuple[list[Image], list[Target]]:
        """Sample n: an excerpt of a video, or a still in motion."""
        video, place = self.places[self.frame_of(n).image_id]
        if len(video.frames) < self.options.length:
            return self._moving_still(n, height, width)
        return self._excerpt(n, video, place, height, width)

    def _excerpt(self, n: int, video: Video, place: int, height: int, width: int) -> tuple[list[Image], list[Target]]:
        """Frames of a video around a place in it."""
        rng = np.random.default_rng([self.seed, 4, n])
        length = self.options.length
        longest = min(self.options.stride, (len(video.frames) - 1) // (length - 1))
        stride = int(rng.integers(1, longest, endpoint=True))
        reach = (length - 1) * stride
        start = int(np.clip(place - rng.integers(0, reach, endpoint=True), 0, len(video.frames) - 1 - reach))
        chosen = video.frames[start : start + reach + 1 : stride]
        pictures, targets = zip(*(self._augmented(n, frame, height, width) for frame in chosen), strict=True)
        return list(pictures), list(targets)

    def _augmented(self, n: int, frame: Frame, height: int, width: int) -> tuple[Image, Target]:
        """A frame of clip n; all its frames draw the same random numbers."""
        rng = np.random.default_rng([self.seed, 2, n])
        boxes, labels, scores, crowd = self._truth(frame)
        picture = read_labelled(self.data.image_path(frame), frame)
        picture, boxes, keep = self.augmentation(picture, boxes, (height, width), rng)
        lists = {"boxes": boxes, "labels": labels, "scores": scores}
        target = {name: torch.from_numpy(values[keep & ~crowd]) for name, values in lists.items()}
        target["ignore"] = torch.from_numpy(boxes[~keep | crowd])
        whole = torch.tensor([[0.0, 0.0, width, height]])
        return picture, target | {"areas": whole, "exhaustive": torch.tensor([self._exhaustive(frame)])}

    def _moving_still(self, n: int, height: int, width: int) -> tuple[list[Image], list[Target]]:
        """A clip that a moving camera takes of sample n of the stills, while objects of others fly through."""
        rng, options = np.random.default_rng([self.seed, 4, n]), self.options
        canvas = (round(height * _MARGIN), round(width * _MARGIN))
        still, target = self._sample(n, *canvas)
        moving = float(rng.random() >= options.static)
        cameras = camera_path(options.length, canvas, (height, width), moving * options.pan, moving * options.zoom, rng)
        sprites = self._sprites(n, canvas, rng)
        sigma = float(rng.uniform(0, options.noise))
        frames, targets = [], []
        for t, camera in enumerate(cameras):
            picture = still.copy()
            for sprite, _ in sprites:
                sprite.paste(picture, t)
            view = camera.picture(picture, height, width)
            noise = rng.standard_normal(view.shape, np.float32) * np.float32(sigma)
            frames.append(np.asarray(np.clip(view + noise + np.float32(0.5), 0, 255), np.uint8))
            targets.append(self._seen(target, sprites, t, camera, (height, width)))
        return frames, targets

    def _sprites(self, n: int, canvas: tuple[int, int], rng: np.random.Generator) -> list[tuple[Sprite, int]]:
        """Objects that fly over the canvas, with their labels."""
        sprites = []
        for _ in range(int(rng.integers(self.options.sprites, endpoint=True))):
            picture, target = self._sample(int(rng.integers(n + 1, n + 1 + len(self.frames))), *canvas)
            boxes = target["boxes"].numpy()
            share = areas(boxes) / (canvas[0] * canvas[1])
            fitting = np.flatnonzero((share > _SPRITE[0]) & (share < _SPRITE[1]))
            if len(fitting):
                i = int(rng.choice(fitting))
                x1, y1, x2, y2 = boxes[i].round().astype(int)
                start = rng.uniform(0, 1, 2) * (canvas[1] - (x2 - x1), canvas[0] - (y2 - y1))
                way = rng.uniform(-1, 1, 2) * self.options.speed * canvas[1]
                sprite = Sprite(picture[y1:y2, x1:x2], (float(start[0]), float(start[1])), (way[0], way[1]))
                sprites.append((sprite, int(target["labels"][i])))
        return sprites

    def _seen(
        self, target: Target, sprites: list[tuple[Sprite, int]], t: int, camera: Camera, size: tuple[int, int]
    ) -> Target:
        """What a camera sees on frame t of a still and of the objects that fly over it, later ones in front."""
        flying = np.stack([sprite.box(t) for sprite, _ in sprites]) if sprites else np.zeros((0, 4), np.float32)
        boxes = np.concatenate([target["boxes"].numpy(), flying])
        labels = np.concatenate([target["labels"].numpy(), np.array([label for _, label in sprites], np.int64)])
        scores = np.concatenate([target["scores"].numpy(), np.ones(len(sprites), np.float32)])
        hidden = np.zeros(len(boxes), bool)
        for i in range(len(boxes) - len(flying), len(boxes)):
            hidden[:i] |= _covered(boxes[:i], boxes[i]) > 1 - self.augmentation.min_visible
        boxes = camera.boxes(boxes)
        whole = areas(boxes)
        limits = [size[1], size[0]] * 2
        boxes = np.clip(boxes, 0, limits).astype(np.float32)
        keep = (areas(boxes) > self.augmentation.min_visible * whole) & (areas(boxes) > 1) & ~hidden
        seen = {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}
        for name in ("ignore", "areas"):
            seen[name] = np.clip(camera.boxes(target[name].numpy()), 0, limits).astype(np.float32)
        return {name: torch.from_numpy(value) for name, value in seen.items()} | {"exhaustive": target["exhaustive"]}


def _covered(boxes: np.ndarray, front: np.ndarray) -> np.ndarray:
    """The share of each box `(n, 4)` that another one covers."""
    corners = np.concatenate([np.maximum(boxes[:, :2], front[:2]), np.minimum(boxes[:, 2:], front[2:])], axis=1)
    sides = np.clip(corners[:, 2:] - corners[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1] / areas(boxes)
