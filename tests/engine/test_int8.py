"""Engines in int8: calibrated on a video, about the same detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_engine import RULE, SIZE, clip, make_detector

from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.engine.export import calibration_frames, export_engine
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.selector import TopK

pytest.importorskip("nncf")


def test_int8(tmp_path: Path) -> None:
    detector = make_detector(depth=2, global_blocks=(1,))
    film = [(255 * frame.permute(1, 2, 0)).byte().numpy() for frame in clip(6)]
    export_engine(detector, tmp_path, size=SIZE, buckets=RULE.buckets, calibrate=film)
    low = {path.stem for path in tmp_path.glob("*.xml") if '"FakeQuantize"' in path.read_text()}
    assert low == {"dense", "backbone"}
    assert not list(tmp_path.glob("*.new.*"))
    engine = load_detector(tmp_path)
    for rule, selector in ((Dense(), TopK(60)), (engine.rule, TopK(16))):
        states = detector.init_state(), engine.init_state()
        for frame in clip(4):
            (ours,) = detector.step([frame], states[0], rule=rule, selector=selector)
            (theirs,) = engine.step([frame], states[1], rule=rule, selector=selector)
        assert ours.cost.recomputed == theirs.cost.recomputed
        best, other = ours.detections.scores.max(), theirs.detections.scores.max()
        assert 0 < abs(float(best - other)) < 0.05, "not the same numbers, but nearly"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int8 is for detectors in OpenVINO"):
        export_engine(make_detector(), tmp_path, format="onnx", size=SIZE, calibrate=[])
    with pytest.raises(UserError, match="no frame"):
        export_engine(make_detector(), tmp_path, size=SIZE, calibrate=[])
    assert not (tmp_path / "engine.json").exists()


def test_frames_are_spread_over_a_video() -> None:
    for count, least in ((3, 4), (8, 4), (100, 4), (1000, 12)):
        film = [np.full((1, 1, 3), i, np.int64) for i in range(count)]
        taken = [int(image[0, 0, 0]) for image in calibration_frames(film, least)]  # type: ignore[arg-type]
        assert min(count, least) <= len(taken) < 2 * least and taken[0] == 0
        assert len(set(np.diff(taken))) == 1 and taken[-1] >= count * (1 - 1 / least) - 1
