"""Detections in the forms that other programs read: JSON records, COCO results, `supervision`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import coco_results
from eventful_det.files import JsonObject
from eventful_det.recognition.session import RecognitionResult
from eventful_det.runtime.session import StreamResult

if TYPE_CHECKING:
    import supervision


def to_supervision(detections: Detections, names: Sequence[str]) -> supervision.Detections:
    """Detections for the `supervision` library, to be drawn, counted, filtered, sliced or tracked there.

    Args:
        detections: of one frame.
        names: class names that the labels index, as in `StreamResult.names`.

    Returns:
        `supervision.Detections` with `xyxy` in the pixels of the detections, `confidence`, `class_id`, track ids if
        there are any, and `data["class_name"]`, which its annotators show.

    Raises:
        UserError: `supervision` is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise UserError(f"to_supervision needs supervision ({error}); pip install supervision") from error
    labels = detections.labels.cpu().numpy()
    return supervision.Detections(
        xyxy=detections.boxes.cpu().numpy(),
        confidence=detections.scores.cpu().numpy(),
        class_id=labels,
        tracker_id=None if detections.tracks is None else detections.tracks.cpu().numpy(),
        data={"class_name": np.array([names[label] for label in labels], dtype=str)},
    )


def to_coco(
    result: StreamResult, image_id: int | None = None, categories: Sequence[int] | None = None
) -> list[JsonObject]:
    """A frame as entries of a COCO results list, ready for JSON and `pycocotools`.

    Args:
        result: the frame.
        image_id: of the frame; by default its index, from 1 as COCO counts.
        categories: category id of each label; by default label + 1.

    Returns:
        Entries of image_id, category_id, bbox (x, y, width, height in pixels), score, and track_id if it has one.
    """
    image = result.frame_index + 1 if image_id is None else image_id
    ids = range(1, len(result.names) + 1) if categories is None else categories
    entries = coco_results({image: result.detections}, ids)
    for entry, track in zip(entries, _tracks(result.detections), strict=True):
        entry.update(track)
    return entries


def to_record(result: StreamResult | RecognitionResult) -> JsonObject:
    """A frame as one JSON object: what was found, and what it cost.

    Boxes are xyxy in pixels of the source; of recognisers, the likeliest classes of each head come in their place.
    """
    return {
        "frame_index": result.frame_index,
        "timestamp": result.timestamp,
        "size": {"height": result.image.shape[0], "width": result.image.shape[1]},
        **(_boxes(result) if isinstance(result, StreamResult) else _classes(result)),
        "cost": cost_record(result.cost),
        "held": result.held,
        "frame_age": result.frame_age,
        "dropped": result.dropped,
    }


def _boxes(result: StreamResult) -> JsonObject:
    found = result.detections
    zones = [{}] * len(found) if result.zones is None else [{"zones": list(names)} for names in result.zones]
    lists = (found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), _tracks(found), zones)
    return {
        "detections": [
            {
                "box": [round(v, 2) for v in box],
                "score": round(score, 4),
                "label": label,
                "name": result.names[label],
                **track,
                **places,
            }
            for box, score, label, track, places in zip(*lists, strict=True)
        ]
    }


def _classes(result: RecognitionResult) -> JsonObject:
    return {
        "classes": {
            head: [
                {"label": result.names[head].index(name), "name": name, "probability": round(value, 4)}
                for name, value in result.top(head=head)
            ]
            for head in result.names
        }
    }


def cost_record(cost: FrameCost) -> JsonObject:
    """What a frame cost, as one JSON object."""
    return {
        "macs": {**cost.macs, "total": cost.total},
        "dense": {**cost.dense, "total": cost.dense_total},
        "ms": {**{k: round(v * 1e3, 3) for k, v in cost.seconds.items()}, "total": round(cost.latency * 1e3, 3)},
        "recomputed": cost.recomputed,
        "tokens": cost.tokens,
        "flush": cost.flush,
    }


def _tracks(detections: Detections) -> list[dict[str, int]]:
    """The track id of each detection as an entry to add, empty where it has none."""
    if detections.tracks is None:
        return [{} for _ in range(len(detections))]
    return [{} if track < 0 else {"track_id": track} for track in detections.tracks.tolist()]
