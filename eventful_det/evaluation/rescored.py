"""The results of an evaluation with steadier scores, as `eventful_det.runtime.rescoring` gives them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch

from eventful_det.evaluation.detection import Entry
from eventful_det.evaluation.runs import MethodRun, VideoRun
from eventful_det.models.roi_heads import Detections
from eventful_det.runtime.rescoring import Objects, Rescoring, rescore


def rescored(run: MethodRun, options: Rescoring) -> MethodRun:
    """The same run, the scores of each video worked over from its first frame to its last."""
    return dataclasses.replace(run, videos=[_rescored(video, options) for video in run.videos])


def _rescored(run: VideoRun, options: Rescoring) -> VideoRun:
    by_image: dict[int, list[Entry]] = defaultdict(list)
    for entry in run.results:
        by_image[entry["image_id"]].append(entry)
    results: list[Entry] = []
    objects: Objects | None = None
    scores: list[float] = []
    for frame, cost in zip(run.video.frames, run.costs, strict=True):
        entries = by_image[frame.image_id]
        if not cost.held:
            told, objects = rescore(_detections(entries), None if cost.flush else objects, options)
            scores = told.tolist()
        results += [entry | {"score": score} for entry, score in zip(entries, scores, strict=True)]
    return dataclasses.replace(run, results=results)


def _detections(entries: list[Entry]) -> Detections:
    """Entries of one frame; labels are their category ids."""
    x, y, w, h = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4).unbind(1)
    scores = torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)
    labels = torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64)
    return Detections(torch.stack([x, y, x + w, y + h], 1), scores, labels)
