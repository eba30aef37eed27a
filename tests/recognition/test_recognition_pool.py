"""Recognisers in a pool and on the page: the same rounds, budgets and reports as of detection."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from small import moving_clip, small_recogniser

from eventful_det.errors import UserError
from eventful_det.gating.selector import TopK
from eventful_det.recognition.session import RecognitionResult
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.session import StreamOptions
from eventful_det.serving.reports import message
from eventful_det.serving.views import StreamView


def arrays(count: int, seed: int = 0) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for frame in moving_clip(count, seed=seed)]


def test_a_pool_gives_what_streams_give() -> None:
    recogniser = small_recogniser()
    found: dict[str, list[RecognitionResult]] = {"a": [], "b": []}
    with StreamPool(recogniser, budget=TopK(2), scene_cuts=False) as pool:
        for seed, name in enumerate(found):
            pool.add(arrays(20 + 8 * seed, seed), name=name)
        for round_ in pool:
            for result in round_:
                found[result.stream].append(result)
        assert {name: one.frames for name, one in pool.metrics().streams.items()} == {"a": 5, "b": 7}
    for seed, results in enumerate(found.values()):
        alone = list(recogniser.stream(arrays(20 + 8 * seed, seed), budget=TopK(2), scene_cuts=False))
        assert [r.frame_index for r in results] == [r.frame_index for r in alone]
        for one, other in zip(results, alone, strict=True):
            assert torch.allclose(one.probabilities["verb"], other.probabilities["verb"], atol=1e-5)
            assert one.cost.macs == other.cost.macs


def test_streams_of_a_pool_share_a_budget() -> None:
    with StreamPool(small_recogniser(), budget=4, scene_cuts=False) as pool:
        for name in "ab":
            pool.add(arrays(20), name=name)
        _, *rounds = pool
    assert {sum(result.cost.recomputed for result in results) for results in rounds} == {4}


def test_what_is_for_detectors_is_refused() -> None:
    recogniser = small_recogniser()
    with pytest.raises(UserError, match="for detectors"):
        StreamPool(recogniser, hold=2)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="for detectors"):
        StreamPool(recogniser, short_side=64)  # type: ignore[call-overload]
    with StreamPool(recogniser) as pool, pytest.raises(UserError, match="ignore"):
        pool.add(arrays(8), options=StreamOptions(ignore=(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)),)))


def test_the_page_gets_classes_in_the_place_of_boxes() -> None:
    view = StreamView("clip", lambda: None)
    for result in small_recogniser().stream(arrays(12), scene_cuts=False):
        view.show(result)
    assert view.newest is not None
    data = message("clip", view.newest, list(view.history))
    (length,) = struct.unpack(">I", data[:4])
    about = json.loads(data[4 : 4 + length])
    assert set(about["classes"]) == {"verb", "noun"} and "detections" not in about
    assert sum(one["probability"] for one in about["classes"]["noun"]) == pytest.approx(1, abs=1e-3)
    assert about["token_size"] == [10, 10] and about["work"]["rows"] == 2
    assert list(about["cost"]["macs"]) == ["backbone", "temporal", "heads", "total"]
