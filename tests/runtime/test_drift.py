"""The drift report: by hand, and on streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.results import Detections
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.selector import EVERYTHING
from eventful_det.runtime.drift import Drift, compare
from eventful_det.runtime.stream import Stream


def found(*objects: tuple[list[float], float, int]) -> Detections:
    boxes = torch.tensor([box for box, _, _ in objects]).reshape(-1, 4)
    return Detections(boxes, torch.tensor([s for _, s, _ in objects]), torch.tensor([k for _, _, k in objects]).long())


def test_by_hand() -> None:
    ours = found(([0.0, 0, 10, 10], 0.9, 1), ([20.0, 0, 30, 10], 0.8, 1), ([0.0, 0, 10, 10], 0.7, 2))
    dense = found(([0.0, 0, 10, 8], 0.9, 1), ([50.0, 0, 60, 10], 0.6, 1), ([20.0, 0, 30, 10], 0.4, 1))
    one = compare(ours, dense, 0.5)
    assert one == Drift(frames=1, ours=3, dense=2, both=1, overlap=pytest.approx(0.8))
    assert one.agreement == pytest.approx(2 / 5)
    assert one.lost == pytest.approx(1 / 2) and one.spurious == pytest.approx(2 / 3)
    both = one + compare(dense, dense, 0.5)
    assert (both.frames, both.ours, both.dense, both.both) == (2, 5, 4, 3)
    assert both.mean_overlap == pytest.approx(2.8 / 3)
    timed = Drift(timed=2, seconds=0.2, dense_seconds=0.5).summary()
    assert timed["dense_ms"] == pytest.approx(250) and timed["times_faster"] == pytest.approx(2.5)


def test_one_detection_is_matched_once() -> None:
    twice = found(([0.0, 0, 10, 10], 0.9, 1), ([0.0, 0, 10, 9], 0.8, 1))
    assert compare(twice, found(([0.0, 0, 10, 10], 0.9, 1)), 0.5).both == 1


def test_nothing_found_is_no_agreement() -> None:
    nothing = compare(found(), found(), 0.5)
    assert nothing.agreement is nothing.lost is nothing.spurious is nothing.mean_overlap is None
    assert Drift().summary()["dense_ms"] is None
    assert compare(found(), found(([0.0, 0, 9, 9], 0.9, 0)), 0.5).agreement == 0


@pytest.fixture
def images() -> list[NDArray[np.uint8]]:
    options = SceneOptions(width=144, height=96, frames=9, cut_fraction=0)
    return [frame.image for frame in render_video(options, index=4)]


def test_on_a_stream(tiny_detector: Detector, images: list[NDArray[np.uint8]]) -> None:
    def run(hold: int = 1, **options: Any) -> Stream:  # random weights are sure of nothing
        return tiny_detector.stream(images, shadow_score=0.2, hold=hold, **options)

    dense = run(budget=EVERYTHING, shadow_every=4, timing=True)
    assert [r.drift is not None for r in dense] == [False, False, False, True] * 2 + [False]
    assert dense.drift is not None and (dense.drift.frames, dense.drift.timed) == (2, 2)
    assert dense.drift.dense_seconds > 0 and dense.drift.seconds > 0
    assert dense.drift.dense > 0 and dense.drift.agreement == 1
    frozen = run(budget=0, shadow_every=1, scene_cuts=False)
    compared = [r.drift.agreement for r in frozen if r.drift is not None]
    assert compared[0] == 1 and len(compared) == 9 and min(a for a in compared if a is not None) < 1
    assert frozen.drift is not None and frozen.drift.timed == 0
    held = run(hold=9, shadow_every=1, scene_cuts=False)
    assert [r.drift is not None for r in held] == [True] * 9
    plain = run()
    assert all(r.drift is None for r in plain) and plain.drift is None


def test_shadows_change_nothing(tiny_detector: Detector, images: list[NDArray[np.uint8]]) -> None:
    with_shadow = tiny_detector.stream(images, budget=0.2, shadow_every=2)
    for a, b in zip(with_shadow, tiny_detector.stream(images, budget=0.2), strict=True):
        assert torch.equal(a.detections.boxes, b.detections.boxes) and a.cost.macs == b.cost.macs
    with pytest.raises(UserError, match="shadow_every"):
        tiny_detector.stream(images, shadow_every=-1)
