"""Streams, synthetic actions and training."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from small import moving_clip, small_recogniser

from eventful_det.data.source import VideoFrame
from eventful_det.errors import UserError
from eventful_det.gating.paper import Paper
from eventful_det.gating.rows import Rows
from eventful_det.gating.rules import AnyRule
from eventful_det.gating.selector import Gmacs, LargestError, Latency, Selector, TopK
from eventful_det.recognition.checkpoints import load_recogniser
from eventful_det.recognition.config import vivit_tiny
from eventful_det.recognition.data.segments import Segments, read_folders
from eventful_det.recognition.data.synthetic_actions import ACTIONS, ActionOptions, mirrored, render_action
from eventful_det.recognition.evaluation import Way
from eventful_det.recognition.recogniser import Recogniser
from eventful_det.recognition.session import FrameClock
from eventful_det.recognition.training.features import FeatureClips, cache_features, cache_views, gated_ways
from eventful_det.recognition.training.samples import SyntheticClips, VideoClips
from eventful_det.recognition.training.trainer import RecogniserTrainer
from eventful_det.training.options import TrainOptions

SMALL = ActionOptions(width=32, height=32, frames=12, noise=0)


def arrays(count: int) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for frame in moving_clip(count)]


def test_every_tubelet_gives_probabilities() -> None:
    recogniser = small_recogniser()
    stream = recogniser.stream(arrays(30), budget=2, scene_cuts=False)
    results = list(stream)
    assert [r.frame_index for r in results] == list(range(2, 30, 4))  # every second frame, two a tubelet
    assert [r.cost.recomputed for r in results][0] == 6
    assert all(r.cost.recomputed <= 2 for r in results[1:])
    (best, probability), *_ = results[-1].top(1, "noun")
    assert best in recogniser.config.classes["noun"] and 1 / 3 <= probability <= 1
    for count, head in ((-1, "noun"), (0, None), (1, "adverb")):
        with pytest.raises(UserError, match="top: expected a number from 1 and one of"):
            results[-1].top(count, head)


def test_the_budget_can_be_turned_and_the_state_stays_in_size() -> None:
    stream = small_recogniser().stream(arrays(40), budget=TopK(1), scene_cuts=False)
    sizes, counts = set(), []
    for i, result in enumerate(stream):
        sizes.add(stream.state_bytes)
        counts.append(result.cost.recomputed)
        stream.budget = TopK(1 if i < 4 else 5)
    assert len(sizes) == 1 and counts == [6, 1, 1, 1, 1, 5, 5, 5, 5, 5]


def test_a_budget_that_cannot_be_held_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="rows rule"):
        small_recogniser().stream(arrays(4), budget=Gmacs(1), rule=Paper())


def test_a_budget_in_macs_is_used_to_the_last_token() -> None:
    recogniser = small_recogniser()
    macs_of = recogniser.cost_model(Rows()).macs((2, 3), torch.arange(6)).tolist()
    budget = macs_of[3]
    for macs, tokens in ((budget, 3), (budget - 1, 2), (macs_of[0], 0), (10 * budget, 6)):
        selector = Selector(LargestError(), Gmacs(macs / 1e9))
        _, *results = recogniser.stream(arrays(24), budget=selector, scene_cuts=False)
        assert {result.cost.recomputed for result in results} == {tokens}
    assert results[-1].cost.total == macs_of[6]


def test_a_budget_in_seconds_is_met_by_fewer_tokens() -> None:
    recogniser = small_recogniser()
    much, none = (
        [r.cost.recomputed for r in recogniser.stream(arrays(60), budget=Latency(seconds), scene_cuts=False)]
        for seconds in (10.0, 1e-6)
    )
    assert min(much[2:]) > 1 and set(none[1:]) <= {0, 1}


@pytest.mark.parametrize("rule", [Rows(), Paper()])
def test_weights_may_be_held_in_bfloat16(rule: AnyRule) -> None:
    probabilities = []
    for dtype in (torch.float32, torch.bfloat16):
        recogniser = small_recogniser().to(dtype)
        *_, last = recogniser.stream(arrays(24), budget=TopK(2), rule=rule, scene_cuts=False)
        probabilities.append(last.probabilities["verb"])
    assert torch.allclose(*probabilities, atol=0.05)


def test_memory_does_not_grow(steps: int = 40) -> None:
    """Of a source that makes its frames as they are asked for; 5,000 steps were tried once."""
    frames = (frame for _ in range(steps // 10) for frame in arrays(20))
    stream = small_recogniser(stride=1).stream(frames, budget=1, scene_cuts=False)
    kept = set()
    for i, _ in enumerate(stream):
        if i in (10, 20, steps - 1):
            gc.collect()
            kept.add((stream.state_bytes, sum(type(thing) is torch.Tensor for thing in gc.get_objects())))
    assert len(kept) == 1


def test_another_scene_begins_anew() -> None:
    frames = arrays(16) + [np.full((20, 30, 3), (250, 10, 10), np.uint8) for _ in range(16)]
    flushed = [r.cost.flush for r in small_recogniser().stream(frames)]
    assert flushed == [True, False, False, False, True, False, False, False]


@pytest.mark.parametrize("fps", [60.0, 20.0, 7.0, 3.0])
def test_frames_are_taken_at_the_recognisers_rate(fps: float) -> None:
    """Every second frame at 8 frames/s is one in 0.25 s: of 20 frames/s every fifth; of slow sources all."""
    clock, image = FrameClock(2, 8.0), np.zeros((2, 2, 3), np.uint8)
    times = [i / fps for i in range(200) if clock.takes(VideoFrame(image, i / fps))]
    assert np.mean(np.diff(times)) == pytest.approx(max(0.25, 1 / fps), rel=0.05)


def test_actions_repeat_to_the_bit_and_differ_by_motion() -> None:
    for index, action in enumerate(ACTIONS):
        clip = render_action(SMALL, seed=1, index=index)
        assert ACTIONS[clip.label] == action and clip.frames.shape == (12, 32, 32, 3)
        assert np.array_equal(clip.frames, render_action(SMALL, seed=1, index=index).frames)
        assert not np.array_equal(clip.frames, render_action(SMALL, seed=1, index=index, split="train").frames)
        part = render_action(SMALL, seed=1, index=index, frames=[3, 7])
        assert np.array_equal(part.frames, clip.frames[[3, 7]])
        assert any(not np.array_equal(clip.frames[0], frame) for frame in clip.frames)


@pytest.mark.parametrize(
    "action, axis, becomes",
    [("enter", "time", "leave"), ("rise", "y", "fall"), ("cross_left", "x", "cross_right"), ("rise", "x", "rise")],
)
def test_mirrored_actions(action: str, axis: str, becomes: str) -> None:
    clip = render_action(SMALL, index=ACTIONS.index(action))
    other = mirrored(clip, axis)
    assert ACTIONS[other.label] == becomes
    assert np.array_equal(mirrored(other, axis).frames, clip.frames)


def test_coverage_follows_the_object() -> None:
    options = dataclasses.replace(SMALL, bystander=0.0, camera="still")
    rows = np.arange(7)[:, None]
    for action, falls in (("rise", -1), ("fall", 1)):
        cover = render_action(options, index=ACTIONS.index(action)).coverage
        height = [(c * rows).sum() / c.sum() for c in cover]
        assert falls * (height[-1] - height[0]) > 1
    vanish = render_action(options, index=ACTIONS.index("vanish")).coverage
    assert vanish[0].sum() > 0 and vanish[-1].sum() == 0


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="width must be a whole number from 32"):
        ActionOptions(width=8)
    with pytest.raises(UserError, match="camera"):
        ActionOptions(camera="drone")  # type: ignore[arg-type]


def tiny(seed: int = 0) -> Recogniser:
    torch.manual_seed(seed)
    sizes = {"dim": 24, "heads": 2, "mlp": 32, "temporal_heads": 2, "temporal_mlp": 32, "temporal_depth": 1}
    clips = {"depth": 1, "size": (32, 32), "position_grid": (2, 2), "frames": 6, "stride": 2, "dropout": 0.0}
    return Recogniser(dataclasses.replace(vivit_tiny({"action": ACTIONS}), **sizes, **clips))


OPTIONS = TrainOptions(steps=6, batch=2, warmup=1, lr=3e-3, ema=0.5, amp="float32", checkpoint_every=3)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = tiny()
    result = RecogniserTrainer(whole, SyntheticClips(whole, SMALL), OPTIONS, tmp_path / "whole").train()

    class Killed(Exception):
        pass

    def kill(step: int, _: dict[str, float]) -> None:
        if step == 4:
            raise Killed

    cut = tiny()
    with pytest.raises(Killed):
        RecogniserTrainer(cut, SyntheticClips(cut, SMALL), OPTIONS, tmp_path / "cut", kill).train()
    again = tiny(seed=1)
    resumed = RecogniserTrainer(again, SyntheticClips(again, SMALL), OPTIONS, tmp_path / "cut").train()
    for name, value in result.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    saved = load_recogniser(tmp_path / "whole" / "model.safetensors")
    assert saved.config == result.config
    with pytest.raises(UserError, match="other values of train.lr"):
        other = dataclasses.replace(OPTIONS, lr=1.0)
        RecogniserTrainer(tiny(), SyntheticClips(tiny(), SMALL), other, tmp_path / "whole")


def test_training_learns_a_few_clips_by_heart(tmp_path: Path) -> None:
    class Few(SyntheticClips):
        def sample(self, n: int):  # type: ignore[no-untyped-def]
            return super().sample(n % 4)

    recogniser = tiny()
    losses: list[float] = []
    options = dataclasses.replace(OPTIONS, steps=60, batch=4, ema=0.0)
    trainer = RecogniserTrainer(
        recogniser, Few(recogniser, SMALL), options, tmp_path, lambda _, m: losses.append(m["loss_action"])
    )
    trainer.train()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_second_stage_trains_on_cached_outputs_alone(tmp_path: Path) -> None:
    from eventful_det.data.video.writer import VideoWriter

    for i in range(4):
        clip = render_action(SMALL, index=i)
        path = tmp_path / "videos" / ACTIONS[clip.label] / f"{i}.mp4"
        path.parent.mkdir(parents=True)
        with VideoWriter(path, 25) as writer:
            for frame in clip.frames:
                writer.write(frame)
    segments: Segments = read_folders(tmp_path / "videos", ACTIONS)
    recogniser = tiny().eval()
    assert not cache_features(recogniser, segments, tmp_path / "features", [Way("k", selector=TopK(2))])
    files = sorted((tmp_path / "features").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    cache_features(recogniser, segments, tmp_path / "features", [Way("k", selector=TopK(2))])
    assert len(files) == 4 and [path.stat().st_mtime_ns for path in files] == times  # kept

    before = {name: value.clone() for name, value in recogniser.state_dict().items()}
    options = dataclasses.replace(OPTIONS, ema=0.0)
    trained = RecogniserTrainer(recogniser, FeatureClips(tmp_path / "features"), options, tmp_path / "run").train()
    changed = {
        name.split(".")[0] for name, value in trained.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"temporal_model", "classifier"}
    view, labels, _ = VideoClips(recogniser, segments).sample(3)
    assert view.shape == (6, 3, 32, 32) and set(labels) == {"action"}
    with pytest.raises(UserError, match="no cached features"):
        FeatureClips(tmp_path / "nothing")


def test_gated_outputs_of_rendered_clips_are_cached(tmp_path: Path) -> None:
    """Budgets are drawn for groups of clips; what is there already is kept, and what is missing is the same."""
    recogniser = tiny().eval()
    samples = SyntheticClips(recogniser, SMALL, count=20, keep=False)
    folder, ways = tmp_path / "features", gated_ways([1.0, 0.25])
    done: list[int] = []
    cache_views(recogniser, samples, 20, folder, ways, on_clip=done.append)
    assert done == [16, 20] and not samples.rendered
    clips = FeatureClips(folder)
    features, labels, _ = clips.sample(0)
    assert len(clips.files) == 20 and features.shape == (1, 3, 24) and set(labels) == {"action"}
    before = clips.files[17].read_bytes()
    clips.files[17].unlink()
    cache_views(recogniser, samples, 20, folder, gated_ways([1.0]))
    assert clips.files[17].is_file() and len(before) == clips.files[17].stat().st_size
    view, label, _ = samples.sample(17)
    again, own = FeatureClips(folder).sample(clips_place(clips, 17))[:2]
    assert own == label and torch.allclose(again[0], recogniser.spatial(view[None])[0], atol=0.05)
    assert not torch.equal(FeatureClips(folder, noise=0.1).sample(0)[0], features)


def clips_place(clips: FeatureClips, index: int) -> int:
    """When a file has its turn in the first round."""
    order = np.random.default_rng([clips.seed, 0]).permutation(len(clips.files))
    return int(np.flatnonzero(order == index)[0])
