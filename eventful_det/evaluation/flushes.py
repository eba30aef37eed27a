"""What remembering costs: average precision against the number of frames since everything was last recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eventful_det.data.coco_video import CocoVideo, Video
from eventful_det.evaluation.detection import Entry, evaluate

EDGES = (0, 1, 4, 16, 64)


@dataclass(frozen=True)
class FlushBin:
    """Frames of like age.

    Attributes:
        first, last: frames since the flush, both included; the last bin is open (None).
        ap50: as `DetectionScores.ap50`, over these frames alone; `nan` where nothing was to be found.
        images: labelled frames.
        objects: on them, crowds excluded.
    """

    first: int
    last: int | None
    ap50: float
    images: int
    objects: int


def frames_since_flush(flushes: Iterable[bool]) -> list[int]:
    """Ages of the frames of one stream: 0 on a flush and on the first frame, else one more than the frame before."""
    ages: list[int] = []
    for flush in flushes:
        ages.append(0 if flush or not ages else ages[-1] + 1)
    return ages


def ap50_since_flush(
    data: CocoVideo, results: Iterable[Entry], ages: Mapping[int, int], edges: Sequence[int] = EDGES
) -> list[FlushBin]:
    """Score frames of different age apart.

    The bins hold different frames, with other objects and classes on them, so compare methods within a bin (with the
    dense detector in the same bins, say) rather than the bins of one method.

    Args:
        data: the truth.
        results: COCO results.
        ages: frames since the last flush by image id, of every frame of `data`.
        edges: the first age of each bin, rising from 0.
    """
    results, bins = list(results), []
    for first, after in zip(edges, [*edges[1:], math.inf], strict=True):
        frames = [frame for frame in data.frames if first <= ages[frame.image_id] < after]
        images = {frame.image_id for frame in frames}
        part = CocoVideo(data.categories, [Video(0, "", frames)], data.image_root)
        scores = evaluate(part, [entry for entry in results if entry["image_id"] in images])
        last = None if after == math.inf else int(after) - 1
        bins.append(FlushBin(first, last, scores.ap50, scores.images, scores.objects))
    return bins
