"""Pools: streams share steps and a budget, and do not disturb each other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from videos import encode

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video import VideoFrame, VideoSource, open_source
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import Budget, Gmacs, Latency, TopK
from eventful_det.runtime.budget import BudgetOptions
from eventful_det.runtime.motion.key_frames import KeyFrames
from eventful_det.runtime.pool import StreamPool
from eventful_det.runtime.pool.feed import Feed
from eventful_det.runtime.pool.metrics import StreamMetrics
from eventful_det.runtime.session import StreamResult

Image = NDArray[np.uint8]
TOKENS = 6 * 10  # of frames of 96 x 144, padded to 96 x 160


def clip(index: int, frames: int = 8, width: int = 144, height: int = 96) -> list[Image]:
    options = SceneOptions(width=width, height=height, frames=frames, cut_fraction=0)
    return [frame.image for frame in render_video(options, index=index)]


def assert_equal(a: StreamResult, b: StreamResult) -> None:
    for x, y in zip(a.detections.tensors(), b.detections.tensors(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.work, b.work) and a.cost.macs == b.cost.macs and a.frame_index == b.frame_index


def by_stream(pool: StreamPool) -> dict[str, list[StreamResult]]:
    results: dict[str, list[StreamResult]] = {}
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
    pool = StreamPool(tiny_detector, budget=20, hold=1)
    pool.add(still, name="still")
    pool.add(clip(2, 6), name="busy")
    results = by_stream(pool)
    for quiet, busy in zip(results["still"][1:], results["busy"][1:], strict=True):
        assert quiet.cost.recomputed == 0 and busy.cost.recomputed == 20


def test_streams_take_turns_while_boxes_are_held(tiny_detector: Detector) -> None:
    """Each runs on every n-th frame, whose cost is the round's; the rounds have equally many of them."""
    clips = {name: clip(i, 12) for i, name in enumerate("abcdef")}
    pool = StreamPool(tiny_detector, budget=TopK(5), scene_cuts=False, hold=3)
    for name, images in clips.items():
        pool.add(images, name=name)
    rounds = list(pool)
    assert [sum(not result.held for result in round) for round in rounds] == [6] + [2] * 11
    for i, name in enumerate("abcdef"):
        mine = [round[i] for round in rounds]
        ran = [result.frame_index for result in mine if not result.held]
        assert len(ran) == 5 or (len(ran) == 4 and ran[1] == 3)
        assert all(later - earlier == 3 for earlier, later in zip(ran[1:], ran[2:], strict=False))
        for index, result in enumerate(mine):
            assert (result.stream, result.frame_index) == (name, index) and result.image is clips[name][index]
            assert bool(result.cost.total) != result.held
    with pytest.raises(UserError, match="hold must be at least 1"):
        StreamPool(tiny_detector, hold=0)


def test_a_stream_has_a_hold_of_its_own(tiny_detector: Detector) -> None:
    """Whatever the budget of the pool is, which holds frames of the others."""
    pool = StreamPool(tiny_detector, budget=0.02, scene_cuts=False)
    for hold in (None, 1, 3):
        pool.add(clip(1, 24), name=str(hold), hold=hold)
    keys = {name: sum(not result.held for result in results) for name, results in by_stream(pool).items()}
    assert keys["1"] == 24 and keys["3"] in (8, 9) and keys["None"] < 8


def test_nothing_is_held_beyond_a_cut_or_a_new_size(tiny_detector: Detector) -> None:
    first, second = clip(1, 4), clip(2, 4)
    pool = StreamPool(tiny_detector, budget=TopK(5), hold=8)
    pool.add([*first[:2], *second[:2]], name="cut")
    pool.add([*first[:2], *clip(1, 2, 96, 144)], name="size")
    results = by_stream(pool)
    assert [result.held for result in results["cut"]] == [False, True, False, True]
    assert [result.held for result in results["size"]] == [False, True, False, True]


def test_a_pool_takes_key_frames_and_spreads_them(tiny_detector: Detector) -> None:
    still = [clip(1, 1)[0]] * 24
    pool = StreamPool(tiny_detector, budget=TopK(5), scene_cuts=False, hold=KeyFrames.each(4))
    for _ in range(4):
        pool.add(list(still))
    ran = [sum(not result.held for result in results) for results in pool]
    assert ran == [4] + [1] * 23, "one stream at a time after the first frames"


def test_a_round_that_pays_for_one_stream_has_the_others_wait(tiny_detector: Detector) -> None:
    """Of four streams one a round can be afforded a key frame; on average the budget is kept."""
    pool = StreamPool(tiny_detector, budget=0.0875, scene_cuts=False)
    for index in (1, 2, 3, 4):
        pool.add(clip(index, 40))
    rounds = list(pool)[8:]
    tokens = [sum(result.cost.recomputed for result in results) for results in rounds]
    assert sum(tokens) <= 0.0875 * 4 * TOKENS * len(rounds) * 1.1
    assert sum(count > 42 for count in tokens) <= len(tokens) / 8, "rounds cost alike"
    assert {result.stream for results in rounds for result in results if not result.held} == set(pool.metrics().streams)


def test_a_share_is_that_of_every_stream(tiny_detector: Detector) -> None:
    """However many they are."""
    taken = []
    for count in (1, 6):
        pool = StreamPool(tiny_detector, budget=0.08, scene_cuts=False)
        for _ in range(count):
            pool.add(clip(1, 60))
        later = [result for results in list(pool)[8:] for result in results]
        taken.append(sum(result.cost.recomputed for result in later) / (TOKENS * len(later)))
    assert taken[1] == pytest.approx(taken[0], rel=0.2) and 0.04 < taken[0] < 0.1


def test_quiet_streams_leave_their_part_to_a_busy_one(tiny_detector: Detector) -> None:
    keys = []
    for others in ([clip(2, 1)[0]] * 48, clip(2, 48)):
        pool = StreamPool(tiny_detector, budget=0.08, scene_cuts=False)
        pool.add(clip(1, 48), name="busy")
        for _ in range(3):
            pool.add(list(others))
        keys.append(sum(not result.held for result in by_stream(pool)["busy"][8:]))
    assert keys[0] >= 1.5 * keys[1]


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, 1.0), (0.01, None), (1, 60), (Gmacs(1e-6), Gmacs(1.0)), (0.01, Gmacs(1.0))]
)
def test_a_larger_budget_acts_at_once(tiny_detector: Detector, before: Budget, after: Budget) -> None:
    stream = tiny_detector.stream(clip(1, 40), budget=before, scene_cuts=False)
    keys = []
    for result in stream:
        keys += [] if result.held else [result.frame_index]
        if result.frame_index == 19:
            stream.budget = after
    assert len([key for key in keys if key < 20]) <= 4 and [key for key in keys if key >= 20][:3] == [20, 22, 24]


def test_a_smaller_budget_never_stops_the_network(tiny_detector: Detector) -> None:
    stream = tiny_detector.stream(clip(1, 110), budget=0.1, scene_cuts=False)
    keys = []
    for result in stream:
        keys += [] if result.held else [result.frame_index]
        if result.frame_index == 4:
            stream.budget = 1e-6
    assert [key for key in keys if key > 4], "once in 64 frames"


@pytest.mark.parametrize("offset", [0, 1])
def test_frames_that_come_in_other_rounds_are_held_as_often(
    offset: int, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cameras whose frames never come in the same round, whichever of them begins."""

    class Script:
        """Frames, or none yet."""

        dropped, lost = 0, False

        def __init__(self, frames: list[VideoFrame | None], *_: object) -> None:
            self.frames = iter(frames)

        def poll(self) -> VideoFrame | None:
            return next(self.frames)

        def close(self) -> None:
            """Nothing to release."""

    monkeypatch.setattr("eventful_det.runtime.pool.Feed", Script)
    frames = [VideoFrame(image, None) for image in clip(1, 16)]
    pool = StreamPool(tiny_detector, budget=TopK(5), scene_cuts=False, hold=2)
    for i in (0, 1):
        pool.add([frame if t % 2 == (i + offset) % 2 else None for t, frame in enumerate(frames)], name=str(i))
    for results in by_stream(pool).values():
        held = [result.held for result in results]
        assert len(held) == 8 and all(one != other for one, other in zip(held[1:], held[2:], strict=False))


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


def test_who_comes_and_goes_does_not_disturb_a_bit(tiny_detector: Detector) -> None:
    """Others join, leave, die, change their size and come back; two streams take no notice."""
    watched = {"a": clip(1, 12), "b": clip(4, 12, 96, 144)}
    mixed = clip(2, 3) + clip(2, 3, 96, 144) + clip(2, 3)

    def dying() -> Iterator[Image]:
        yield from clip(3, 2)
        raise RuntimeError("gone")

    rule = Rows(exact=True)
    pool = StreamPool(tiny_detector, budget=TopK(11), rule=rule, scene_cuts=False)
    for name, images in watched.items():
        pool.add(images, name=name)
    results: dict[str, list[StreamResult]] = {}
    for step in range(12):
        if step == 1:
            pool.add(mixed, name="mixed")
            pool.add(dying(), name="weak")
        if step == 5:
            pool.remove("mixed")
        if step == 6:
            assert pool.metrics().streams["weak"].error == "RuntimeError: gone"
            assert pool.add(clip(3, 4), name="weak") == "weak", "a stream may come back under its name"
            assert pool.metrics().streams["weak"].error is None
        for result in pool.step():
            results.setdefault(result.stream, []).append(result)
    for name, images in watched.items():
        alone = tiny_detector.stream(images, budget=TopK(11), rule=rule, scene_cuts=False)
        for mine, solo in zip(results[name], alone, strict=True):
            assert_equal(mine, solo)
    assert [r.cost.flush for r in results["mixed"]] == [True, False, False, True]
    assert [r.cost.flush for r in results["weak"]] == [True, False] + [True, False, False, False]
    assert [r.frame_index for r in results["weak"]] == [0, 1, 0, 1, 2, 3]


def test_gmacs_are_those_of_a_round(tiny_detector: Detector) -> None:
    pool = StreamPool(tiny_detector, budget=Gmacs(0.03), scene_cuts=False, hold=1)
    for index in (1, 2, 4):
        pool.add(clip(index, 10), name=str(index))
    pool.step()
    for step in range(9):
        if step == 5:
            pool.budget = Gmacs(0.02)
        results = pool.step()
        assert sum(r.cost.total for r in results) <= (0.03 if step < 5 else 0.02) * 1e9
        assert sum(r.cost.recomputed for r in results) > 2


def test_a_flush_costs_the_others_nothing(tiny_detector: Detector) -> None:
    """A stream that joins is recomputed in full, outside of the budget; the others keep all of theirs."""
    pool = StreamPool(tiny_detector, budget=0.2, scene_cuts=False, hold=1)
    pool.add(clip(4, 6), name="old")
    for step in range(6):
        if step == 3:
            pool.add(clip(2, 6), name="new")
        recomputed = {r.stream: r.cost.recomputed for r in pool.step()}
        if step == 3:
            assert recomputed == {"old": 12, "new": 60}


def test_every_stream_is_served_and_no_token_grows_old(tiny_detector: Detector) -> None:
    noisy = np.random.default_rng(0)
    loud = [noisy.integers(0, 255, (96, 144, 3), dtype=np.uint8) for _ in range(30)]
    pool = StreamPool(tiny_detector, budget=12, options=BudgetOptions(max_age=15), scene_cuts=False, hold=1)
    pool.add(loud, name="loud")
    pool.add(clip(4, 30), name="moving")
    pool.add([clip(1, 1)[0]] * 30, name="still")
    ages = {name: torch.zeros(6, 10) for name in pool.names}
    for step, results in enumerate(pool):
        for result in results:
            ages[result.stream] = torch.where(result.work > 0, 0, ages[result.stream] + 1)
            assert ages[result.stream].max() <= 15
            if 0 < step < 10 and result.stream == "moving":
                assert result.cost.recomputed >= 12 * 0.5 / 3, "half of its proportion is assured"


def test_a_stalled_stream_holds_nobody_up(tiny_detector: Detector) -> None:
    released = threading.Event()

    def stalled() -> Iterator[Image]:
        yield clip(1, 1)[0]
        released.wait(10)

    with StreamPool(tiny_detector, budget=TopK(3)) as pool:
        pool.add(stalled(), name="stalled", live=True)
        pool.add(clip(2, 4), name="file")
        seen = [result.stream for _ in range(4) for result in pool.step()]
        assert seen.count("file") == 4
        released.set()


def test_an_iterable_that_blocks_holds_nobody_up(tiny_detector: Detector) -> None:
    released = threading.Event()

    def blocked() -> Iterator[Image]:
        yield from clip(1, 2)
        released.wait(20)
        yield clip(1, 1)[0]

    began = time.monotonic()
    with StreamPool(tiny_detector, budget=TopK(3)) as pool:
        pool.add(blocked(), name="blocked")
        pool.add(clip(2, 6), name="file")
        rounds = [[result.stream for result in pool.step()] for _ in range(6)]
        assert rounds == [["blocked", "file"]] * 2 + [["file"]] * 4 and time.monotonic() - began < 5
        released.set()
        assert [result.stream for round in pool for result in round] == ["blocked"]


def test_a_source_is_one_stream(tiny_detector: Detector) -> None:
    with StreamPool(tiny_detector) as pool:
        for source in (open_source(clip(1, 3)), iter(clip(1, 3))):
            pool.add(source, name="first")
            with pytest.raises(UserError, match="already"):
                pool.add(source, name="second")
        with pytest.raises(UserError, match="already"):
            pool.add(open_source(source), name="second")
        pool.add(clip(1, 1))
        assert [len(list(frames)) for frames in by_stream(pool).values()] == [3, 3, 1]


def test_budget_and_members_from_another_thread(tiny_detector: Detector) -> None:
    pool = StreamPool(tiny_detector, budget=0.5)
    pool.add(clip(1, 40), name="first")
    stop = threading.Event()

    def meddle() -> None:
        for i in range(1000):
            if stop.is_set():
                return
            name = pool.add(clip(2, 2), name="guest")
            pool.budget = (0.1, 5, Gmacs(0.02), Latency(0.1))[i % 4]
            pool.metrics()
            if name in pool.names:
                with contextlib.suppress(UserError):
                    pool.remove(name)
            time.sleep(0.005)

    thread = threading.Thread(target=meddle)
    thread.start()
    frames = []
    for _ in range(45):
        frames += [r.frame_index for r in pool.step() if r.stream == "first"]
    stop.set()
    thread.join()
    assert frames == list(range(40))


def test_metrics(tiny_detector: Detector) -> None:
    pool = StreamPool(tiny_detector, budget=0.25, timing=True)
    assert pool.metrics().total == StreamMetrics(active=False)
    pool.add(clip(1, 5), name="a")
    pool.add(clip(2, 5), name="b")
    results = [result for _ in range(5) for result in pool.step()]
    metrics = pool.metrics()
    mine = [r for r in results if r.stream == "a"]
    a, total = metrics.streams["a"], metrics.total
    assert (a.frames, a.flushes, a.dropped, a.active, a.error) == (5, 1, 0, True, None)
    assert a.macs == sum(r.cost.total for r in mine) and a.dense_macs == sum(r.cost.dense_total for r in mine)
    assert a.gmacs == pytest.approx(a.macs / 5e9) and a.dense_gmacs == pytest.approx(a.dense_macs / 5e9)
    assert a.milliseconds == pytest.approx(200 * sum(r.cost.latency for r in mine))
    assert total.frames == 10 and total.macs == sum(r.cost.total for r in results)
    assert total.frames_per_second == pytest.approx(sum(m.frames_per_second for m in metrics.streams.values()))
    assert 0 < total.gmacs < total.dense_gmacs and total.state_bytes > 1e5
    pool.close()
    gone = pool.metrics()
    assert gone.total.frames == 10 and gone.total.frames_per_second == 0 and not gone.streams["a"].active


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


class Camera(VideoSource):
    """Captured its frames half a second ago, and was lost before the third; each is taken before the next one comes."""

    live = True
    lost = False

    def __init__(self, images: list[Image]) -> None:
        super().__init__("camera")
        self.images, self.taken = images, threading.Semaphore(1)

    def _read(self) -> Iterator[VideoFrame]:
        for i, image in enumerate(self.images):
            self.taken.acquire()
            self.dropped = 3 if i >= 2 else 0
            yield VideoFrame(image, i / 25, time.monotonic() - 0.5, resumed=i == 2)


def test_a_camera_that_was_lost_begins_anew(tiny_detector: Detector) -> None:
    camera = Camera(clip(1, 4))
    pool = StreamPool(tiny_detector, budget=TopK(5), scene_cuts=False)
    pool.add(camera)
    results = []
    for (result,) in pool:
        results.append(result)
        camera.taken.release()
    assert [r.cost.flush for r in results] == [True, False, True, False]
    assert [r.dropped for r in results] == [0, 0, 3, 3] and [r.frame_index for r in results] == [0, 1, 2, 3]
    assert all(r.stream == "camera" and r.frame_age is not None and 0.5 <= r.frame_age < 5 for r in results)


class Distant(VideoSource):
    """A file behind an address: its frames come when the test lets them."""

    remote = True

    def __init__(self, images: list[Image]) -> None:
        super().__init__("distant")
        self.images, self.arrive = images, threading.Semaphore(0)

    def _read(self) -> Iterator[VideoFrame]:
        for image in self.images:
            assert self.arrive.acquire(timeout=10)
            yield VideoFrame(image)


def test_nobody_waits_for_the_network(tiny_detector: Detector) -> None:
    """And no frame of a file is lost, however it comes."""
    distant = Distant(clip(1, 5))
    pool = StreamPool(tiny_detector, budget=TopK(5))
    pool.add(distant)
    pool.add(clip(2, 3), name="here")
    assert [[r.stream for r in pool.step()] for _ in range(3)] == 3 * [["here"]]
    distant.arrive.release(5)
    results = [result for round in pool for result in round]
    assert [r.stream for r in results] == 5 * ["distant"]
    assert all(r.image is image for r, image in zip(results, distant.images, strict=True))
    assert pool.metrics().streams["distant"].dropped == 0


def test_metrics_tell_who_is_lost(tiny_detector: Detector) -> None:
    camera = Camera(clip(1, 2))
    pool = StreamPool(tiny_detector, budget=TopK(5))
    pool.add(camera)
    next(pool)
    assert not pool.metrics().streams["camera"].lost
    camera.lost = True
    assert pool.metrics().streams["camera"].lost
    camera.taken.release()  # its thread waits for that
    pool.close()
    assert not pool.metrics().streams["camera"].lost


def test_files_leave_while_they_are_read(tmp_path: Path) -> None:
    """Closed by one thread while another decodes: it ends, and does not crash."""
    path = encode(tmp_path / "clip.mp4", clip(0, frames=20))
    for live in (False, True):
        for turn in range(10):
            feed = Feed(str(path), live, lambda: None)
            polled = threading.Thread(target=lambda feed=feed: _poll_all(feed))
            polled.start()
            time.sleep(0.002 * turn)
            feed.close()
            polled.join(10)
            assert not polled.is_alive()


def _poll_all(feed: Feed) -> None:
    with contextlib.suppress(StopIteration):
        while True:
            feed.poll()
