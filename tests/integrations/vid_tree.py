"""A small data set in the layout of ImageNet VID."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video


def make_set(root: Path, name: str, videos: int, frames: int) -> None:
    """Write pictures of noise and the annotations of a set: ten classes, two objects on each frame."""
    rng = np.random.default_rng(0)
    (root / "Data" / name).mkdir(parents=True)
    data = CocoVideo([(i, f"class{i}") for i in range(1, 11)], [Video(i, f"video{i}") for i in range(videos)], root)
    for video in data.videos:
        for n in range(frames):
            number = video.id * frames + n
            file = f"Data/{name}/{number}.png"
            cv2.imwrite(str(root / file), rng.integers(0, 255, (96, 128, 3), np.uint8))
            boxes = [(8.0 + 3 * n, 10.0, 58.0 + 3 * n, 70.0), (60.0 - 6 * n * video.id, 30.0, 110.0, 90.0)]
            objects = [Annotation(1 + (video.id + i) % 10, box, i) for i, box in enumerate(boxes)]
            video.frames.append(Frame(number + 1, file, 128, 96, 10 * n, objects))
    data.renumber()
    data.save(root / "annotations" / f"{name}.json")
