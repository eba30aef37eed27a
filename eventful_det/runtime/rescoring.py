"""Steadier scores: a box is judged by what the detector thought of it on the last frames, not by one frame alone.

::

    for result in map(Rescorer(), detector.stream("video.mp4")):
        print(result.detections.scores)

Detectors blink: an object's score jumps above and below what counts as found, and its class changes for a frame.
Seq-NMS (Han et al., 2016) gives all boxes of an object their mean score over the whole video; this is the same for
video that has no end yet. No box is moved, added or dropped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from eventful_det.detectors.results import Detections
from eventful_det.errors import UserError
from eventful_det.runtime.session import StreamResult


@dataclass(frozen=True)
class Rescoring:
    """How scores follow what is seen.

    Attributes:
        rise: weight of the present frame where it scores more than the object had; 1 = at once.
        fall: the same where it scores less, 0 for an object that is not seen.
        memory: frames for which an object that is not seen is remembered.
        overlap: least intersection over union of a box and an object's last one, of the same class.
    """

    rise: float = 0.5
    fall: float = 0.2
    memory: int = 3
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in (self.rise, self.fall, self.overlap)) or self.memory < 0:
            raise UserError(f"rescoring: need 0 < rise, fall, overlap <= 1 and memory >= 0, got {self}")


@dataclass(frozen=True)
class Objects:
    """What is remembered of a stream: `boxes` (n, 4), mean `scores`, `labels` and frames since last seen, each (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    missed: Tensor


def rescore(found: Detections, before: Objects | None, options: Rescoring) -> tuple[Tensor, Objects]:
    """New scores of the detections of a frame.

    Args:
        found: on this frame.
        before: what the last frame left, None on the first.
        options: how.

    Returns:
        Scores `(n,)` in the order of the detections, and what the next frame has to be given.
    """
    unseen = torch.zeros_like(found.labels)
    if before is None:
        return found.scores, Objects(found.boxes, found.scores, found.labels, unseen)
    here, there = _pairs(found, before, options.overlap)
    change = found.scores[here] - before.scores[there]
    change *= torch.where(change > 0, options.rise, options.fall)
    scores = found.scores.index_copy(0, here, before.scores[there] + change)
    kept = (before.missed < options.memory).index_fill(0, there, False)
    return scores, Objects(
        torch.cat([found.boxes, before.boxes[kept]]),
        torch.cat([scores, (1 - options.fall) * before.scores[kept]]),
        torch.cat([found.labels, before.labels[kept]]),
        torch.cat([unseen, before.missed[kept] + 1]),
    )


def _pairs(found: Detections, before: Objects, overlap: float) -> tuple[Tensor, Tensor]:
    """Detections and objects that are each other's best match."""
    likeness = box_iou(found.boxes, before.boxes) * (found.labels[:, None] == before.labels)
    if not likeness.numel():
        nothing = found.labels.new_zeros(0)
        return nothing, nothing
    best, there = likeness.max(1)
    here = torch.arange(len(found), device=there.device)
    mutual = (best >= overlap) & (likeness.argmax(0)[there] == here)
    return here[mutual], there[mutual]


class Rescorer:
    """Rescores the results of one stream, which have to come in the order of their frames.

    A flush (a scene cut, another size, a camera that came back) begins anew.

    Args:
        options: how; None = as `Rescoring` says.
    """

    def __init__(self, options: Rescoring | None = None) -> None:
        self.options = options or Rescoring()
        self._objects: Objects | None = None
        self._shape: tuple[int, ...] = ()

    def __call__(self, result: StreamResult) -> StreamResult:
        """The same result with new scores, best first."""
        found = result.detections
        moved_on = result.cost.flush or result.image.shape != self._shape
        self._shape = result.image.shape
        scores, self._objects = rescore(found, None if moved_on else self._objects, self.options)
        order = scores.argsort(descending=True, stable=True)
        return dataclasses.replace(result, detections=dataclasses.replace(found, scores=scores)[order])
