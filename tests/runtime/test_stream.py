"""Streams: lazy, constant in memory, steerable between frames, independent of each other."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventful_det.data.synthetic import SceneOptions, render_video, video_facts
from eventful_det.data.video import VideoFrame, VideoSource
from eventful_det.detectors.results import Detections
from eventful_det.detectors.saliency import token_saliency
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import DEFAULT, EVERYTHING, Budget, GateInput, Ranking, Selector, TopK
from eventful_det.runtime.motion.boxes import BoxMover
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.scene_cuts import SceneCuts
from eventful_det.runtime.session import StreamResult

Image = NDArray[np.uint8]
TOKENS = 6 * 10  # of frames of 96 x 144, padded to 96 x 160


def clip(index: int, frames: int = 8, width: int = 144, height: int = 96) -> list[Image]:
    options = SceneOptions(width=width, height=height, frames=frames, cut_fraction=0)
    return [frame.image for frame in render_video(options, index=index)]


@pytest.fixture(scope="module")
def frames() -> list[Image]:
    return clip(1)


def equal(a: StreamResult, b: StreamResult) -> bool:
    pairs = zip(a.detections.tensors(), b.detections.tensors(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and torch.equal(a.work, b.work)


def test_a_stream_is_closed_at_the_end_of_with(tiny_detector: Detector, frames: list[Image]) -> None:
    with tiny_detector.stream(frames) as stream:
        assert next(stream).frame_index == 0
    assert list(stream) == []


def test_frames_are_pulled_one_by_one(tiny_detector: Detector, frames: list[Image]) -> None:
    pulled = 0

    def source() -> Iterator[Image]:
        nonlocal pulled
        for image in frames:
            pulled += 1
            yield image

    stream = tiny_detector.stream(source(), max_frames=5)
    assert pulled <= 1
    for result in stream:
        assert pulled - 1 == result.frame_index
    assert pulled == 5
    assert next(stream, None) is None


def test_memory_is_constant(tiny_detector: Detector) -> None:
    alive: list[weakref.ref[Image]] = []

    def source() -> Iterator[Image]:
        options = SceneOptions(width=144, height=96, frames=60)
        for frame in render_video(options):
            alive.append(weakref.ref(frame.image))
            yield frame.image

    stream = tiny_detector.stream(source(), budget=0.2, hold=1)
    sizes = []
    for result in stream:
        sizes.append(stream.state_bytes - sum(t.nbytes for t in result.detections.tensors()))
        assert sum(image() is not None for image in alive) <= 3
    assert len(sizes) == 60 and len(set(sizes)) == 1


def test_result_describes_the_frame(tiny_detector: Detector, frames: list[Image]) -> None:
    result, again = itertools.islice(tiny_detector.stream(frames, budget=TopK(TOKENS // 4), timing=True), 2)
    assert result.names == ("circle", "square", "star") and result.timestamp is None
    assert result.image is frames[0] and result.token_size == (16, 16)
    assert result.cost.flush and result.cost.recomputed == result.cost.tokens == TOKENS
    assert result.work.shape == (6, 10) and bool((result.work == 1).all())
    assert not again.cost.flush and again.cost.recomputed == round(float(again.work.sum())) == TOKENS // 4
    assert set(again.cost.seconds) >= {"backbone", "pyramid", "rpn", "roi", "other"} and again.cost.latency > 0
    assert again.cost.macs["backbone"] < again.cost.dense["backbone"] == result.cost.dense["backbone"]


def test_detections_are_in_pixels_of_the_source(tiny_detector: Detector, frames: list[Image]) -> None:
    doubled = [image.repeat(2, axis=0).repeat(2, axis=1) for image in frames[:2]]
    streams = [tiny_detector.stream(images, hold=1) for images in (frames, doubled)]
    for small, large in zip(*streams, strict=False):
        assert len(small.detections) > 0
        torch.testing.assert_close(large.detections.boxes, 2 * small.detections.boxes)
        assert large.token_size == (32, 32)
        assert float(large.detections.boxes[:, [0, 2]].max()) <= 288 + 1e-3


def test_budget_between_frames(tiny_detector: Detector, frames: list[Image]) -> None:
    stream = tiny_detector.stream(frames, budget=7, hold=1)
    recomputed = [next(stream).cost.recomputed, next(stream).cost.recomputed]
    budgets: list[Budget | Selector] = [0.2, TopK(3), 0, EVERYTHING]
    for budget in budgets:
        stream.budget = budget
        recomputed.append(next(stream).cost.recomputed)
        assert stream.budget == budget
    assert recomputed == [TOKENS, 7, TOKENS // 5, 3, 0, TOKENS]
    for bad in (1.5, -1, "much", True, DEFAULT.policy):
        with pytest.raises(UserError, match="budget"):
            stream.budget = bad  # type: ignore[assignment]


def test_a_budget_is_the_default_policy_within_it(tiny_detector: Detector, frames: list[Image]) -> None:
    """To a stream, a pool and the step itself alike; a budget is a limit, and what nobody wants is not spent."""
    within = DEFAULT.within(0.3)
    for a, b in zip(*(tiny_detector.stream(frames, budget=one, hold=1) for one in (0.3, within)), strict=True):
        assert equal(a, b)
    pool = StreamPool(tiny_detector, budget=0.3, hold=1)
    pool.add(frames)
    state = tiny_detector.init_state()
    for (result,), stream in zip(pool, tiny_detector.stream(frames, budget=0.3, hold=1), strict=True):
        image = tiny_detector.input_transform(stream.image)
        (step,) = tiny_detector.step([image], state, selector=within, flush=stream.cost.flush)
        assert equal(result, stream) and torch.equal(step.work, stream.work)
    still = list(tiny_detector.stream([frames[0]] * 4, budget=0.5))
    assert [result.cost.recomputed for result in still] == [TOKENS, 0, 0, 0]


def test_everything_recomputed_equals_dense(tiny_detector: Detector, frames: list[Image]) -> None:
    dense = tiny_detector.stream(frames, rule=Dense())
    for a, b in zip(tiny_detector.stream(frames, budget=EVERYTHING), dense, strict=True):
        torch.testing.assert_close(a.detections.boxes, b.detections.boxes, atol=1e-2, rtol=0)


def test_scene_cut_flushes(tiny_detector: Detector, frames: list[Image]) -> None:
    both = frames[:4] + clip(2)[:4]
    assert [r.cost.flush for r in tiny_detector.stream(both)] == [True, False, False, False] * 2
    assert [r.cost.flush for r in tiny_detector.stream(both, scene_cuts=False)] == [True] + 7 * [False]


def test_size_change_flushes(tiny_detector: Detector, frames: list[Image]) -> None:
    mixed = frames[:2] + [np.ascontiguousarray(image[:, :96]) for image in frames[2:4]] + frames[4:6]
    results = list(tiny_detector.stream(mixed, scene_cuts=False))
    assert [r.cost.flush for r in results] == [True, False] * 3
    assert [r.cost.tokens for r in results] == [60, 60, 36, 36, 60, 60]
    held = list(tiny_detector.stream(mixed, scene_cuts=False, hold=6))
    assert [r.held for r in held] == [False, True] * 3  # boxes of another size are not held


def test_hold(tiny_detector: Detector, frames: list[Image]) -> None:
    results = list(tiny_detector.stream(frames[:7], hold=3))
    assert [r.held for r in results] == [False, True, True, False, True, True, False]
    assert [r.frame_index for r in results] == list(range(7))
    for result, image in zip(results, frames, strict=False):
        assert result.image is image
    for held in (results[1], results[2]):
        tracks, before = held.detections.tracks, results[0].detections.tracks
        assert tracks is not None and before is not None and set(tracks.tolist()) <= set(before.tolist())
        assert held.cost.total == held.cost.recomputed == float(held.work.sum()) == 0
        assert held.cost.dense_total == results[0].cost.dense_total
    moved = [next(r for r in results[:3] if r.frame_index == i).detections for i in (0, 2)]
    assert not torch.equal(moved[0].boxes, moved[1].boxes), "boxes move with what they hold"
    cut = [r.held for r in tiny_detector.stream(frames[:2] + clip(2)[:2], hold=4)]
    assert cut == [False, True, False, True]
    with pytest.raises(UserError, match="hold"):
        tiny_detector.stream(frames, hold=0)


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({}, 2),
        ({"budget": 0.25}, 2),
        ({"budget": TOKENS}, 2),
        ({"budget": DEFAULT}, 2),
        ({"hold": 1}, 1),
        ({"budget": TopK(9)}, 1),
        ({"rule": Dense()}, 1),
        ({"rule": Paper()}, 1),
        ({"rule": Rows(exact=True)}, 1),
    ],
)
def test_every_second_frame_is_a_key_frame_unless_somebody_chooses(
    options: dict[str, Any], every: int, tiny_detector: Detector, frames: list[Image]
) -> None:
    """A budget leaves the choice to the product; a selector, a rule for comparison and `hold` are choices."""
    held = [result.held for result in tiny_detector.stream(frames[:7], **options)]
    assert held == [bool(i % every) for i in range(7)]


def test_where_boxes_cannot_be_followed_every_frame_is_a_key_frame(tiny_detector: Detector) -> None:
    """Frames too far apart in time: nothing looks as it did."""
    unlike = [clip(seed)[0] for seed in range(8)]
    assert not any(result.held for result in tiny_detector.stream(unlike, scene_cuts=False))


def test_streams_do_not_disturb_each_other(tiny_detector: Detector) -> None:
    clips = [clip(1, 6), clip(2, 6, 96, 128)]
    alone = [list(tiny_detector.stream(c, budget=b)) for c, b in zip(clips, (5, 0.3), strict=True)]
    together = [tiny_detector.stream(c, budget=b) for c, b in zip(clips, (5, 0.3), strict=True)]
    for i in range(6):
        assert all(equal(next(stream), results[i]) for stream, results in zip(together, alone, strict=True))


def test_results_do_not_change_later(tiny_detector: Detector, frames: list[Image]) -> None:
    stream = tiny_detector.stream(frames, budget=0.5)
    first = next(stream)
    before = first.detections.clone(), first.work.clone()
    list(stream)
    assert torch.equal(before[0].boxes, first.detections.boxes) and torch.equal(before[1], first.work)


class Camera(VideoSource):
    """Loses its connection, and 5 of 13 frames."""

    live = True

    def __init__(self, frames: list[Image]) -> None:
        super().__init__("camera")
        self.images = frames

    def _read(self) -> Iterator[VideoFrame]:
        for i, image in enumerate(self.images):
            self.dropped = 5 if i >= 4 else 0
            yield VideoFrame(image, i / 25, time.monotonic() - 0.5, resumed=i == 4)


def test_live_source(tiny_detector: Detector, frames: list[Image]) -> None:
    results = list(tiny_detector.stream(Camera(frames), scene_cuts=False, hold=3))
    assert [r.cost.flush for r in results] == [True, False, False, False, True, False, False, False]
    assert [r.held for r in results] == [False, True, True, False, False, True, True, False]
    assert [r.dropped for r in results] == [0] * 4 + [5] * 4
    assert all(r.stream == "camera" and r.frame_age is not None and 0.5 <= r.frame_age < 5 for r in results)
    assert all(r.frame_age is None and r.dropped == 0 for r in tiny_detector.stream(frames[:2]))


def test_close_ends_the_iteration(tiny_detector: Detector, frames: list[Image]) -> None:
    stream = tiny_detector.stream(frames)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_bad_frames_are_reported_where_they_come(tiny_detector: Detector, frames: list[Image]) -> None:
    stream = tiny_detector.stream([frames[0], frames[0][..., 0]])
    next(stream)
    with pytest.raises(UserError, match="frame 1"):
        next(stream)
    with pytest.raises(UserError, match="no such file"):
        tiny_detector.stream("missing.mp4")


def test_cuts_of_synthetic_videos_are_found() -> None:
    options = SceneOptions(width=192, height=128, frames=30, cut_fraction=1.0)
    for index in range(8):
        cuts = SceneCuts()
        found = [i for i, frame in enumerate(render_video(options, 5, index)) if cuts(frame.image)]
        assert found == video_facts(options, 5, index).cuts


def test_what_is_not_a_cut() -> None:
    image = clip(1, 1, 384, 256)[0].astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(image.shape) * 20
    black = np.zeros_like(image)
    cuts = SceneCuts()
    for other in (image, image * 1.3, image * 0.7, image + 15, image + noise, image[:, ::-1][:, ::-1]):
        assert not cuts(np.clip(other, 0, 255).astype(np.uint8))
    assert cuts(black.astype(np.uint8))
    assert not cuts(black.astype(np.uint8))


def test_the_gate_of_a_key_frame_looks_where_objects_have_moved_to(
    tiny_detector: Detector, frames: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On held frames boxes move on; the next key frame's saliency is that of the moved boxes, not of the last ones."""
    box, score = torch.tensor([[48.0, 0.0, 80.0, 32.0]]), torch.tensor([0.7])
    moved = Detections(box, score, torch.tensor([0]), torch.tensor([0]))
    monkeypatch.setattr(BoxMover, "boxes", lambda mover: moved)
    seen: list[GateInput] = []

    def policy(gate: GateInput) -> Ranking:
        seen.append(gate)
        return Ranking(torch.arange(gate.error.numel()), 3)

    list(tiny_detector.stream(frames[:5], budget=Selector(policy), scene_cuts=False, hold=2))
    assert len(seen) == 2, "of five frames the third and the fifth are gated key frames"
    for gate in seen:
        assert gate.saliency is not None and torch.equal(gate.saliency, token_saliency(box, score, (6, 10), 16))
