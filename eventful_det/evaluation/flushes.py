"""What remembering costs: average precision against the number of frames since everything was last recomputed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eventful_det.data.coco_video import CocoVideo, Frame, Video
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


@dataclass
class _Bin:
    frames: list[Frame] = field(default_factory=list)
    results: list[Entry] = field(default_factory=list)

    def score(self, data: CocoVideo, first: int, last: int | None) -> FlushBin:
        part = CocoVideo(data.categories, [Video(0, "", self.frames)], data.image_root)
        scores = evaluate(part, self.results)
        return FlushBin(first, last, scores.ap50, scores.images, scores.objects)


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
    bins = [_Bin() for _ in edges]
    place = {image: bins[bisect_right(edges, age) - 1] for image, age in ages.items()}
    for frame in data.frames:
        place[frame.image_id].frames.append(frame)
    for entry in results:
        if entry["image_id"] in place:
            place[entry["image_id"]].results.append(entry)
    lasts = [*(edge - 1 for edge in edges[1:]), None]
    return [part.score(data, first, last) for part, first, last in zip(bins, edges, lasts, strict=True)]
