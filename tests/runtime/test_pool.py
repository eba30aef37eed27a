"""Pools: streams share steps and a budget, and do not disturb each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.errors import UserError
from eventful_det.gating.policy import TopK
from eventful_det.models.detector import Detector
from eventful_det.runtime.pool import PoolResult, StreamPool
from eventful_det.runtime.stream import StreamResult

Image = NDArray[np.uint8]


def clip(index: int, frames: int = 8, width: int = 144, height: int = 96) -> list[Image]:
    options = SceneOptions(width=width, height=height, frames=frames, cut_fraction=0)
    return [frame.image for frame in render_video(options, index=index)]


def assert_equal(a: StreamResult, b: StreamResult) -> None:
    for x, y in zip(a.detections.tensors(), b.detections.tensors(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.work, b.work) and a.cost.macs == b.cost.macs and a.frame_index == b.frame_index


def by_stream(pool: StreamPool) -> dict[str, list[PoolResult]]:
    results: dict[str, list[PoolResult]] = {}
    for round in pool:
        for result in round:
            results.setdefault(result.stream, []).append(result)
    return results


def test_streams_of_a_policy_are_as_if_alone(tiny_detector: Detector) -> None:
    clips = {"a": clip(1, 6), "b": clip(2, 8, 96, 144), "c": clip(3, 4)}
    pool = StreamPool(tiny_detector, budget=TopK(9))
    for name, images in clips.items():
        pool.add(images, name=name)
    results = by_stream(pool)
    for name, images in clips.items():
        for mine, alone in zip(results[name], tiny_detector.stream(images, budget=TopK(9)), strict=True):
            assert_equal(mine, alone)
            assert mine.image is alone.image and mine.frame_age is None and mine.dropped == 0
    assert pool.names == () and pool.step() == []


def test_a_budget_is_one_for_all(tiny_detector: Detector) -> None:
    still = [clip(1, 1)[0]] * 6
    pool = StreamPool(tiny_detector, budget=20)
    pool.add(still, name="still")
    pool.add(clip(2, 6), name="busy")
    results = by_stream(pool)
    for quiet, busy in zip(results["still"][1:], results["busy"][1:], strict=True):
        assert quiet.cost.recomputed + busy.cost.recomputed == 20
        assert busy.cost.recomputed > 15


def test_join_leave_and_names(tiny_detector: Detector) -> None:
    with StreamPool(tiny_detector, budget=0.3) as pool:
        assert pool.add(clip(1)) == "arrays" and pool.add(clip(2)) == "arrays-2"
        assert [r.stream for r in pool.step()] == ["arrays", "arrays-2"]
        assert pool.add(clip(3), name="third") == "third"
        flushes = {r.stream: r.cost.flush for r in pool.step()}
        assert flushes == {"arrays": False, "arrays-2": False, "third": True}
        pool.remove("arrays")
        assert [r.stream for r in pool.step()] == ["arrays-2", "third"] and pool.names == ("arrays-2", "third")
        with pytest.raises(UserError, match="no stream 'arrays'"):
            pool.remove("arrays")
        with pytest.raises(UserError, match="no such file"):
            pool.add("missing.mp4")
    assert pool.names == () and next(pool, None) is None


def test_a_stream_that_dies_leaves_the_others_alone(tiny_detector: Detector) -> None:
    def dying() -> Iterator[Image]:
        yield from clip(1, 2)
        raise OSError("the cable is gone")

    pool = StreamPool(tiny_detector, budget=TopK(5))
    pool.add(dying(), name="dying")
    pool.add(clip(2, 5), name="healthy")
    results = by_stream(pool)
    assert len(results["dying"]) == 2 and len(results["healthy"]) == 5
    metrics = pool.metrics()
    assert metrics.streams["dying"].error == "OSError: the cable is gone"
    assert metrics.streams["healthy"].error is None and not metrics.streams["healthy"].active
    assert metrics.total.frames == 7 and metrics.total.flushes == 2


def test_live_streams_show_the_newest(tiny_detector: Detector) -> None:
    images, ready = clip(1, 8), threading.Event()

    def camera() -> Iterator[Image]:
        yield from images[:5]
        ready.set()
        time.sleep(0.2)
        yield images[5]

    pool = StreamPool(tiny_detector, budget=0.5)
    pool.add(camera(), name="camera", live=True)
    ready.wait()
    time.sleep(0.02)
    (first,) = pool.step()
    assert first.image is images[4] and first.dropped == 4 and 0 <= (first.frame_age or -1) < 1
    assert pool.step() == []
    (second,) = next(pool)
    assert second.image is images[5] and second.frame_index == 1
    assert next(pool, None) is None
    assert pool.metrics().streams["camera"].dropped == 4
