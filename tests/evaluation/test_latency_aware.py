"""Latency-aware precision: answers count from when they are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.detectors.results import Detections
from eventful_det.evaluation.latency_aware import LatencyRow, markdown, watch

Image = NDArray[np.uint8]


class Counting:
    """Answers with a box at the number of the frame, after so many seconds."""

    def __init__(self, images: list[Image], seconds: float) -> None:
        self.images, self.seconds, self.taken = images, seconds, list[int]()

    def __call__(self, image: Image) -> tuple[Detections, float]:
        number = next(i for i, one in enumerate(self.images) if one is image)
        self.taken.append(number)
        box = torch.tensor([[float(number), 0, number + 10, 10]])
        return Detections(box, torch.tensor([0.9]), torch.tensor([0])), self.seconds


def numbers(known: list[Detections | None]) -> list[int | None]:
    return [None if found is None else int(found.boxes[0, 0]) for found in known]


@pytest.mark.parametrize(
    ("seconds", "taken", "expected"),
    [
        (0.05, [0, 1, 2, 3, 4], [None, 0, 1, 2, 3, 4]),
        (0.1, [0, 1, 2, 3, 4], [None, 0, 1, 2, 3, 4]),  # just in time
        (0.16, [0, 1, 3, 4], [None, None, 0, 0, 1, 3]),  # takes the newest frame when it is idle
        (0.25, [0, 2, 4], [None, None, None, 0, 0, 2]),
    ],
)
def test_answers_count_when_they_are_there(seconds: float, taken: list[int], expected: list[int | None]) -> None:
    images = [np.zeros((48, 64, 3), np.uint8) for _ in range(6)]
    look = Counting(images, seconds)
    known, took = watch(images, 10.0, look, move=False)
    assert numbers(known) == expected
    assert took == [seconds] * len(look.taken) and look.taken[: len(taken)] == taken[: len(look.taken)]


def test_boxes_move_between_answers() -> None:
    rng = np.random.default_rng(0)
    wall = rng.integers(0, 255, (20, 60, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    images = [np.ascontiguousarray(wall[:, 4 * i : 4 * i + 400]) for i in range(12)]

    def look(image: Image) -> tuple[Detections, float]:
        box = torch.tensor([[200.0, 60, 300, 160]])
        return Detections(box, torch.tensor([0.9]), torch.tensor([0])), 0.5

    still, _ = watch(images, 10.0, look, move=False)
    moved, _ = watch(images, 10.0, look, move=True)
    assert still[4] is None and moved[4] is None and still[8] is not None and moved[8] is not None
    assert float(still[8].boxes[0, 0]) == 200
    assert float(moved[8].boxes[0, 0]) == pytest.approx(200 - 4 * 7, abs=6), "moved from the first frame to the eighth"


def test_the_table_names_what_it_holds() -> None:
    table = markdown([LatencyRow("dense", True, 30, 0.2, 0.5, 12.34, 0.25)])
    assert table.splitlines()[2] == "| dense, moved | 30 | 50.0 | 20.0 | 12.3 | 25 |"
