"""A data set seen by a detector that knows other classes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from eventful_det.data.coco_video import CocoVideo, Frame
from eventful_det.errors import UserError


def for_classes(data: CocoVideo, names: Sequence[str]) -> CocoVideo:
    """A data set as seen by a detector of other classes.

    Objects of classes that the detector does not know are left out; classes that only the detector knows are listed,
    but were searched for on no image.

    Args:
        data: the data set; it is not changed.
        names: classes of the detector.

    Raises:
        UserError: no class is common to both.
    """
    ids = {name: category for category, name in data.categories}
    common = frozenset(ids[name] for name in names if name in ids)
    if not common:
        raise UserError(f"no class is common to the data set ({', '.join(ids)}) and the weights ({', '.join(names)})")
    free = itertools.count(max(ids.values()) + 1)
    categories = [(ids[name] if name in ids else next(free), name) for name in names]

    def seen(frame: Frame) -> Frame:
        known = [a for a in frame.annotations if a.category_id in common]
        exhaustive = common if frame.exhaustive is None else frame.exhaustive & common
        return dataclasses.replace(frame, annotations=known, exhaustive=exhaustive)

    videos = [dataclasses.replace(video, frames=[seen(frame) for frame in video.frames]) for video in data.videos]
    return CocoVideo(sorted(categories), videos, data.image_root)
