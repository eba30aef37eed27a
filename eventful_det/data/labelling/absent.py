"""What common sense says of pictures that were not searched: there is no tiger in a car park."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from eventful_det.data.coco_video import CocoVideo, Frame
from eventful_det.errors import UserError


def assume_absent(data: CocoVideo, absent: Mapping[str, Sequence[str]]) -> CocoVideo:
    """A data set for training in which some classes count as searched for where nobody searched.

    A class whose every picture comes from a source of its own never is a negative, and is then seen in all backgrounds.
    Pictures that have a box of a class keep what the file says of it. Not for scoring: an assumption is no truth.

    Args:
        data: the data set; it is not changed.
        absent: names of classes that are on no picture whose file name, relative to the image root, fits a pattern
            (``*``, ``?``, ``[...]``; ``*`` also matches ``/``).

    Raises:
        UserError: a class that the data set does not have, or a pattern that no picture fits.
    """
    ids = data.category_ids({name for names in absent.values() for name in names}, "data.absent")
    assumed: defaultdict[int, set[int]] = defaultdict(set)
    for pattern, names in absent.items():
        fitting = [frame for frame in data.frames if fnmatchcase(frame.file_name, pattern)]
        if not fitting:
            example = next((frame.file_name for frame in data.frames), "")
            raise UserError(f"data.absent: no picture fits {pattern!r}; a file name is {example!r}")
        for frame in fitting:
            assumed[frame.image_id] |= {ids[name] for name in names}

    def seen(frame: Frame) -> Frame:
        if frame.exhaustive is None or frame.image_id not in assumed:
            return frame
        more = assumed[frame.image_id] - {a.category_id for a in frame.annotations}
        return dataclasses.replace(frame, exhaustive=frame.exhaustive | more)

    videos = [dataclasses.replace(video, frames=[seen(frame) for frame in video.frames]) for video in data.videos]
    return CocoVideo(data.categories, videos, data.image_root)
