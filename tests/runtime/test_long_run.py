"""A long run: several streams, budgets that change at random, guests that come and go; nothing grows or is lost.

The long version, with its figures:

    EVENTFUL_LONG_RUN=10000 python -m pytest -n 0 -s tests/runtime/test_long_run.py
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.gating.selector import Budget, Gmacs, Latency, Selector, Threshold
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.pool import StreamPool

FRAMES = int(os.environ.get("EVENTFUL_LONG_RUN", "480"))
SIZES = ((144, 96), (96, 96), (128, 96), (96, 144))  # of the streams, width and height
BUDGETS: list[Budget | Selector] = [
    *(0.1, 0.4, 0.9, 20, 120, Gmacs(0.04), Gmacs(0.09), Latency(0.02), Latency(0.2)),
    Threshold(2),
]
GROWTH = 16e6  # bytes of memory by which two thirds of the run may exceed its first third; allocators are not exact


def clip(index: int, width: int, height: int) -> list[NDArray[np.uint8]]:
    """30 frames; two shots in every second one."""
    options = SceneOptions(width=width, height=height, frames=30, cut_fraction=index % 2)
    return [frame.image for frame in render_video(options, index=index)]


def looped(images: list[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    return islice(cycle(images), count)


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    """Tensors that are alive."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@dataclass(frozen=True)
class Held:
    """What a process and its pool hold at some moment."""

    memory: int
    tensors: int
    state: int

    @staticmethod
    def by(pool: StreamPool, names: Iterable[str]) -> Held:
        streams = pool.metrics().streams
        return Held(resident(), tensors(), sum(streams[name].state_bytes for name in names))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
def test_long_run(tiny_detector: Detector) -> None:
    draw, each, began = random.Random(0), FRAMES // len(SIZES), time.perf_counter()
    clips = {f"{width}x{height}": clip(i, width, height) for i, (width, height) in enumerate(SIZES)}
    pool = StreamPool(tiny_detector, budget=0.25, options=BudgetOptions(bucket=4, max_age=50))
    for name, images in clips.items():
        pool.add(looped(images, each), name=name)
    macs, dense, guests, held = 0, 0, 0, []
    for round_index in range(each):
        if draw.random() < 0.1:
            pool.budget = draw.choice(BUDGETS)
        if draw.random() < 0.05:
            pool.add(looped(clips["144x96"], draw.randint(1, 5)), name="guest")
            guests += 1
        results = pool.step()
        ours = [result for result in results if result.stream in clips]
        assert [result.stream for result in ours] == list(clips), "no stream is left out"
        for result in ours:
            assert result.frame_index == round_index, "no frame is lost or comes twice"
            assert result.image is clips[result.stream][round_index % 30]
        macs += sum(result.cost.total for result in results)
        dense += sum(result.cost.dense_total for result in results)
        if round_index in (each // 3, each - 1):
            held.append(Held.by(pool, clips))
    pool.step()
    assert not set(pool.names) & set(clips), "every stream ended by itself"
    before, after = held
    assert after.memory - before.memory < GROWTH
    assert abs(after.tensors - before.tensors) < 200 and abs(after.state - before.state) < 0.02 * before.state
    print(f"\n{len(SIZES) * each} frames of {len(SIZES)} streams and those of {guests} guests, none lost,")
    print(f"in {time.perf_counter() - began:.0f} s at {macs / dense:.0%} of dense; a third of the way, and at the end:")
    print(
        f"memory {before.memory / 1e6:.1f} MB, {after.memory / 1e6:.1f} MB; tensors {before.tensors}, {after.tensors};"
    )
    print(f"state {before.state / 1e6:.2f} MB, {after.state / 1e6:.2f} MB")
