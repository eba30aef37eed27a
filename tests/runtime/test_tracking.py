"""runtime/tracking.py: ids that stay with their objects."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.runtime.session import StreamResult
from eventful_det.runtime.tracking import Tracker

COST = FrameCost({"backbone": 1}, {"backbone": 1}, 1, 1, False)


def frame(index: int, *boxes: tuple[float, float], scores: tuple[float, ...] = ()) -> StreamResult:
    """A frame with objects of 20 x 20 pixels at the given corners."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2)
    found = Detections(
        torch.cat([corners, corners + 20], 1),
        torch.tensor(scores or [0.9] * len(boxes)),
        torch.zeros(len(boxes), dtype=torch.int64),
    )
    return StreamResult(
        detections=found,
        names=("thing",),
        frame_index=index,
        timestamp=index / 25,
        cost=COST,
        work=torch.ones(1, 1),
        token_size=(16, 16),
        image=np.zeros((9, 9, 3), np.uint8),
    )


def ids(result: StreamResult) -> list[int]:
    assert result.detections.tracks is not None
    return result.detections.tracks.tolist()


def test_ids_follow_their_objects() -> None:
    pytest.importorskip("trackers", reason="trackers is not installed")
    tracker = Tracker(fps=25)
    assert ids(tracker(frame(0, (0, 0), (100, 0)))) == [-1, -1]
    first, second = ids(tracker(frame(1, (2, 0), (98, 0))))
    assert len({first, second, -1}) == 3
    assert ids(tracker(frame(2, (96, 0), (4, 0)))) == [second, first]  # in the order of the detections, not the ids
    assert ids(tracker(frame(3, (6, 0), (94, 0), scores=(0.9, 0.2)))) == [first, second]  # unsure, but on its way
    assert ids(tracker(frame(4))) == []
    assert ids(tracker(frame(5, (10, 0), (300, 300)))) == [first, -1]
    late = [ids(tracker(frame(index, (10, 0)))) for index in (60, 61)]
    assert first not in late[1] and late[1] != [-1]  # forgotten after a second


def test_the_rest_of_a_result_is_untouched() -> None:
    pytest.importorskip("trackers", reason="trackers is not installed")
    before = frame(0, (5, 5))
    after = Tracker()(before)
    assert before.detections.tracks is None
    assert torch.equal(after.detections.boxes, before.detections.boxes) and after.image is before.image


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="pip install trackers"):
        Tracker()
