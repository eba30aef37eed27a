"""Parts of data sets that the field trains on, and the sizes of complete ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from eventful_det.data.coco_video import CocoVideo, Video

T = TypeVar("T")

COMPLETE = {("VID", "train"): (3_862, 1_122_397), ("VID", "val"): (555, 176_126)}
"""Videos and frames of ImageNet VID by subset and split (ILSVRC 2015; the same in 2017)."""


def evenly(items: Sequence[T], count: int) -> list[T]:
    """The middles of `count` equal parts, in order; 15 of 300 are number 10, 30, ..., 290. All if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def at_most_per_class(data: CocoVideo, count: int) -> CocoVideo:
    """Stills of which every class has at most `count`, evenly spaced over the set, as far as they can be told apart.

    Classes choose one after the other, the rarest first. What an image shows besides counts for its other classes too,
    so that these choose fewer; a class that the others bring along has more.
    """
    shows: dict[int, list[Video]] = defaultdict(list)
    classes = {video.id: {a.category_id for f in video.frames for a in f.annotations} for video in data.videos}
    for video in data.videos:
        for category in classes[video.id]:
            shows[category].append(video)
    taken: set[int] = set()
    for _, videos in sorted(shows.items(), key=lambda item: (len(item[1]), item[0])):
        free = [video for video in videos if video.id not in taken]
        there = len(videos) - len(free)
        taken |= {video.id for video in evenly(free, max(0, count - there))}
    return CocoVideo(data.categories, [video for video in data.videos if video.id in taken], data.image_root)


def what_is_missing(subset: str, split: str, videos: int, frames: int | None) -> str:
    """How a set of ImageNet VID differs from the complete one, as text; "" if it does not, or nobody knows.

    Args:
        subset, split: such as "VID" and "val".
        videos, frames: what there is; frames None = not counted.
    """
    if (subset, split) not in COMPLETE:
        return ""
    there = {"videos": (videos, COMPLETE[subset, split][0]), "frames": (frames, COMPLETE[subset, split][1])}
    wrong = [f"{have:,} of {full:,} {what}" for what, (have, full) in there.items() if have not in (full, None)]
    return f"the tree holds {' and '.join(wrong)}; is every archive unpacked in full?" if wrong else ""
