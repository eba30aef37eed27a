"""Boxes at constant velocity, a baseline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eventful_det.detectors.results import Detections
from eventful_det.evaluation.kalman import KalmanMover

IMAGE = np.zeros((200, 400, 3), np.uint8)


def test_boxes_go_on_as_they_went() -> None:
    """Seen on every fourth frame, right after the third time. What is missed goes on, too."""
    mover = KalmanMover()
    errors = []
    for frame in range(24):
        mover.move(IMAGE)
        truth = torch.tensor([[20.0 + 6 * frame, 50, 80.0 + 6 * frame, 110]])
        if frame % 4 == 0 and frame != 16:
            moved = mover.key(Detections(truth, torch.ones(1), torch.zeros(1, dtype=torch.int64)))
        elif frame == 16:
            moved = mover.key(Detections(truth[:0], torch.ones(0), torch.zeros(0, dtype=torch.int64)))
        else:
            moved = mover.boxes()
        assert len(moved) == 1 and moved.tracks is not None and moved.tracks.tolist() == [0]
        errors.append(float((moved.boxes - truth).abs().max()))
    assert errors[3] == pytest.approx(18), "nothing is known of a new box"
    assert max(errors[12:]) < 3
    mover.forget()
    mover.move(IMAGE)
    assert len(mover.key(Detections(truth, torch.ones(1), torch.zeros(1, dtype=torch.int64)))) == 1
