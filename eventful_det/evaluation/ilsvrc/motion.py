"""How fast objects move: motion IoU from track ids, and the groups slow, medium and fast.

The motion IoU of an object on a frame is the mean overlap of its box with its own boxes on the other frames at most
ten frames away. It is the measure of Flow-Guided Feature Aggregation (Zhu et al., ICCV 2017, arXiv 1703.10025), whose
values for the validation set of ImageNet VID are published as ``imagenet_vid_groundtruth_motion_iou.mat`` with its
code (msracver/Flow-Guided-Feature-Aggregation, ``lib/dataset``) and with MEGA's (Scalsol/mega.pytorch). What that
file shows beyond the paper, and is done here too: the frame itself does not count, frames without the object do not
count, an object that is on no other frame nearby has motion IoU 1, and boxes are measured in inclusive pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from eventful_det.data.coco_video import Video
from eventful_det.evaluation.ilsvrc.boxes import Bools, Floats, pixel_overlap

REACH = 10  # frames before and after


def motion_iou(video: Video) -> dict[int, float]:
    """Motion IoU of every object of a video, by annotation id (see ``CocoVideo.renumber``).

    `nan` where it cannot be known: for objects without track id, and where no frame within reach is labelled (stills,
    sparsely labelled videos). Distances are those of ``frame_id``.
    """
    ids = [a.id for frame in video.frames for a in frame.annotations]
    return dict(zip(ids, motion_ious(video).tolist(), strict=True))


def motion_ious(video: Video) -> Floats:
    """The same as an array, frame by frame, in the order of the annotations. Shape (objects,)."""
    rows = [(frame, a) for frame in video.frames for a in frame.annotations]
    time = np.array([frame.frame_id for frame, _ in rows], dtype=np.int64)
    tracked = np.array([a.track_id is not None for _, a in rows], dtype=bool)
    track = np.array([a.track_id or 0 for _, a in rows], dtype=np.int64)
    boxes = np.array([a.box for _, a in rows], dtype=np.float64).reshape(-1, 4)
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    order = np.lexsort((time, track))
    order = order[tracked[order]]
    for step in range(1, len(order)):  # neighbours along the tracks, then second neighbours, ...
        i, j = order[:-step], order[step:]
        near = (track[i] == track[j]) & (time[j] - time[i] <= REACH)
        if not near.any():
            break
        near &= time[j] > time[i]  # a track id twice on one frame is no motion
        i, j = i[near], j[near]
        overlap = pixel_overlap(boxes[i], boxes[j])
        for side in (i, j):  # each index occurs at most once in it
            total[side] += overlap
            count[side] += 1
    mean = np.divide(total, count, out=np.ones_like(total), where=count > 0)
    compared = np.isin(time, list(_with_neighbours(video)))
    return np.where(tracked & compared, mean, math.nan)


def _with_neighbours(video: Video) -> set[int]:
    """Times of the labelled frames that have another one within reach."""
    times = sorted(frame.frame_id for frame in video.frames if frame.labelled)
    return {time for pair in pairwise(times) if pair[1] - pair[0] <= REACH for time in pair}


def motion_groups(iou: Floats) -> dict[str, Bools]:
    """Which objects are in which group. An unknown motion IoU (`nan`) is in none."""
    return {"slow": iou > 0.9, "medium": (iou >= 0.7) & (iou <= 0.9), "fast": iou < 0.7}
