"""adapters.py: the same objects in every form."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from eventful_det.adapters import to_coco, to_record, to_supervision
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.runtime.session import StreamResult

NAMES = ("cat", "dog")
FOUND = Detections(
    torch.tensor([[10.0, 20, 40, 80], [0, 0, 5, 5]]),
    torch.tensor([0.9, 0.25]),
    torch.tensor([1, 0]),
    torch.tensor([7, -1]),
)


def result(detections: Detections) -> StreamResult:
    cost = FrameCost({"backbone": 4}, {"backbone": 9}, 2, 6, False, {"backbone": 0.5})
    image = np.zeros((90, 120, 3), np.uint8)
    return StreamResult(
        detections=detections,
        names=NAMES,
        frame_index=4,
        timestamp=0.16,
        cost=cost,
        work=torch.ones(2, 3),
        token_size=(45.0, 40.0),
        image=image,
    )


def test_some_of_the_detections() -> None:
    sure = FOUND[FOUND.scores > 0.5]
    assert len(sure) == 1 and sure.labels.tolist() == [1] and sure.tracks is not None and sure.tracks.tolist() == [7]
    assert FOUND[[1, 0]].scores.tolist() == FOUND.scores.tolist()[::-1]
    assert [one.boxes.tolist() for one in FOUND] == [[box] for box in FOUND.boxes.tolist()]
    assert len(FOUND[-1]) == 1 and len(FOUND[:0]) == 0 and list(FOUND[:0]) == []
    with pytest.raises(IndexError):
        FOUND[2]


def test_a_result_prints_without_its_pixels() -> None:
    text = repr(result(FOUND))
    assert str(result(FOUND)) == "frame 4: dog 0.90; 0.00 of 0.00 GMACs"
    assert "frame_index=4" in text and "scores" in text and "uint8" not in text and "work" not in text


def test_coco_entries() -> None:
    first, second = to_coco(result(FOUND))
    assert first == {"image_id": 5, "category_id": 2, "bbox": [10, 20, 30, 60], "score": 0.9, "track_id": 7}
    assert second == {"image_id": 5, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.25}
    own = to_coco(result(dataclasses.replace(FOUND, tracks=None)), image_id=31, categories=(18, 17))
    assert [(e["image_id"], e["category_id"], "track_id" in e) for e in own] == [(31, 17, False), (31, 18, False)]
    pytest.importorskip("pycocotools")
    json.dumps(own)


def test_record_is_json() -> None:
    record = json.loads(json.dumps(to_record(result(FOUND))))
    assert record["detections"][0] == {"box": [10, 20, 40, 80], "score": 0.9, "label": 1, "name": "dog", "track_id": 7}
    assert "track_id" not in record["detections"][1]
    assert record["cost"]["macs"]["total"] == 4 and record["cost"]["ms"]["total"] == 500
    assert record["size"] == {"height": 90, "width": 120}


@pytest.mark.parametrize("tracks", [None, FOUND.tracks])
def test_supervision(tracks: torch.Tensor | None) -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = dataclasses.replace(FOUND, tracks=tracks)
    ours = to_supervision(found, NAMES)
    assert ours.xyxy.tolist() == found.boxes.tolist() and ours.class_id.tolist() == [1, 0]
    assert list(ours.data["class_name"]) == ["dog", "cat"]
    assert (ours.tracker_id is None) == (tracks is None)
    assert len(ours[ours.confidence > 0.5]) == 1
    canvas = np.zeros((90, 120, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(canvas.copy(), ours).any()
    nothing = to_supervision(found.map(lambda values: values[:0]), NAMES)
    assert len(nothing) == 0


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        to_supervision(FOUND, NAMES)
