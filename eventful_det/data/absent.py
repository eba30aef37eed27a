"""What common sense says of pictures that were not searched: there is no tiger in a car park."""

from __future__ import annotations

import dataclasses
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
    ids = {name: category for category, name in data.categories}
    if unknown := {name for names in absent.values() for name in names} - set(ids):
        raise UserError(f"data.absent: no class {', '.join(sorted(unknown))}; there are {', '.join(ids)}")
    frames = [frame for video in data.videos for frame in video.frames]
    for pattern in absent:
        if not any(fnmatchcase(frame.file_name, pattern) for frame in frames):
            raise UserError(f"data.absent: no picture fits {pattern!r}; a file name is {frames[0].file_name!r}")

    def seen(frame: Frame) -> Frame:
        if frame.exhaustive is None:
            return frame
        assumed = {ids[n] for pattern, names in absent.items() if fnmatchcase(frame.file_name, pattern) for n in names}
        return dataclasses.replace(
            frame, exhaustive=frame.exhaustive | (assumed - {a.category_id for a in frame.annotations})
        )

    videos = [dataclasses.replace(video, frames=[seen(frame) for frame in video.frames]) for video in data.videos]
    return CocoVideo(data.categories, videos, data.image_root)
