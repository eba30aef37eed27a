"""Clips: consecutive frames under one augmentation, stills set in motion, and sets mixed by ratio."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.clips import ClipOptions, ClipSet
from eventful_det.data.clips.motion import Camera, Sprite, camera_path
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.data.mixed import MixedSet
from eventful_det.data.training_set import TrainingSet, training_loader
from eventful_det.errors import UserError

CATEGORIES = [(1, "left"), (2, "right")]
AUGMENTATION = Augmentation(((64, 96),), scale=(0.9, 1.3), colour=0.0)


def picture(x: int) -> np.ndarray:
    """A bright square of 24 pixels at column x of a dark, textured ground."""
    image = np.random.default_rng(0).integers(20, 60, (64, 96, 3), dtype=np.uint8)
    image[20:44, x : x + 24] = 230
    return image


@pytest.fixture
def videos(tmp_path: Path) -> CocoVideo:
    """Two videos of 10 frames, in which a square moves by 4 pixels a frame."""
    made = []
    for v in range(2):
        frames = []
        for t in range(10):
            cv2.imwrite(str(tmp_path / f"{v}_{t}.png"), picture(4 * t))
            truth = Annotation(v + 1, (4.0 * t, 20, 4.0 * t + 24, 44), track_id=0)
            frames.append(Frame(10 * v + t + 1, f"{v}_{t}.png", 96, 64, t, [truth]))
        made.append(Video(v + 1, str(v), frames))
    return CocoVideo(CATEGORIES, made, tmp_path)


@pytest.fixture
def stills(tmp_path: Path) -> CocoVideo:
    made = []
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"still{i}.png"), picture(12 * i))
        truth = Annotation(1 + i % 2, (12.0 * i, 20, 12.0 * i + 24, 44))
        made.append(Video(i + 1, str(i), [Frame(i + 1, f"still{i}.png", 96, 64, 0, [truth])]))
    return CocoVideo(CATEGORIES, made, tmp_path)


def brightness(image: torch.Tensor, box: list[float]) -> float:
    x1, y1, x2, y2 = (round(v) for v in box)
    return float(image[:, y1 + 3 : y2 - 3, x1 + 3 : x2 - 3].float().mean())


def test_frames_of_a_clip_follow_each_other_under_one_augmentation(videos: CocoVideo) -> None:
    samples = ClipSet(videos, AUGMENTATION, ClipOptions(length=4, stride=3))
    steps = set()
    for n in range(20):
        clip, targets = samples[n]
        assert clip.shape == (4, 3, 64, 96)
        assert all(torch.equal(a["labels"], targets[0]["labels"]) for a in targets if len(a["labels"]))
        whole = [t["boxes"][0] for t in targets if len(t["boxes"]) and t["boxes"][0, 0] > 1 and t["boxes"][0, 2] < 95]
        for image, target in zip(clip, targets, strict=True):
            assert all(brightness(image, box) > 200 for box in target["boxes"].tolist() if box[2] - box[0] > 12)
        if len(whole) == 4:
            ways = torch.stack(whole)[1:, 0] - torch.stack(whole)[:-1, 0]
            assert ways.std() < 1.5  # evenly spaced, always in the same direction
            steps.add(round(float(ways.abs().mean()) / float(whole[0][3] - whole[0][1]) * 24 / 4))
    assert steps <= {1, 2, 3}
    assert len(steps) > 1


def test_short_videos_and_stills_are_set_in_motion(stills: CocoVideo) -> None:
    options = ClipOptions(length=5, static=0.0, pan=0.05, noise=0.0)
    samples = ClipSet(stills, AUGMENTATION, options)
    moved = 0
    for n in range(8):
        clip, targets = samples[n]
        assert len(targets) == 5
        moved += not torch.equal(clip[0], clip[-1])
        for image, target in zip(clip, targets, strict=True):
            first = target["boxes"][:1].tolist()  # in front of it something may fly
            assert all(image[:, round(b[1]) : round(b[3]), round(b[0]) : round(b[2])].numel() for b in first)
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"][:, 2] <= 96).all()
    assert moved == 8


def test_a_static_camera_changes_only_what_flies_through(stills: CocoVideo) -> None:
    still = ClipSet(stills, AUGMENTATION, ClipOptions(length=3, static=1.0, sprites=0, noise=0.0))[0][0]
    assert torch.equal(still[0], still[2])
    options = ClipOptions(length=3, static=1.0, sprites=2, noise=0.0)
    samples = ClipSet(stills, dataclasses.replace(AUGMENTATION, min_visible=0.0), options)  # hidden boxes stay
    flown = 0
    for n in range(10):
        clip, targets = samples[n]
        changed = (clip[0] != clip[2]).any(0)
        allowed = torch.zeros(64, 96, dtype=torch.bool)
        for x1, y1, x2, y2 in torch.cat([targets[0]["boxes"], targets[2]["boxes"]]).tolist():
            allowed[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = True
        flown += bool(changed.any())
        assert not (changed & ~allowed).any()
    assert flown > 3


def test_clips_depend_on_their_number_alone(stills: CocoVideo, videos: CocoVideo) -> None:
    for data in (stills, videos):
        samples = ClipSet(data, AUGMENTATION, ClipOptions(length=4), seed=3)
        for n in (0, 7):
            (a, ta), (b, tb) = samples[n], samples[n]
            assert torch.equal(a, b)
            assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(ta, tb, strict=True))
    batch, targets = next(iter(training_loader(samples, batch=2, first_step=1)))
    assert batch.shape == (2, 4, 3, 64, 96)
    assert [len(target) for target in targets] == [4, 4]


def test_frames_nobody_labelled_have_no_negatives(videos: CocoVideo) -> None:
    videos.videos[0].frames[1].labelled = False
    videos.videos[0].frames[1].annotations = []
    samples = ClipSet(videos, AUGMENTATION, ClipOptions(length=10))
    exhaustive = [[bool(t["exhaustive"].all()) for t in samples[n][1]] for n in range(12)]
    assert [True] * 10 in exhaustive
    assert [True, False] + [True] * 8 in exhaustive


def test_clips_need_two_frames() -> None:
    with pytest.raises(UserError, match="length must be a whole number from 2"):
        ClipOptions(length=1)


def test_camera_shows_boxes_where_they_are() -> None:
    canvas = np.zeros((80, 120, 3), np.uint8)
    canvas[30:50, 40:70] = 255
    for camera in (Camera(10.0, 6.0, 1.0), Camera(7.5, 3.25, 1.2), Camera(0.0, 0.0, 0.85)):
        view = camera.picture(canvas, 64, 96)
        box = camera.boxes(np.array([[40, 30, 70, 50]], np.float32))[0]
        y, x = np.nonzero(view[..., 0] > 127)
        assert np.abs(box - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 1.0


def test_camera_stays_on_the_canvas() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        path = camera_path(8, (80, 120), (64, 96), 0.1, 0.05, rng)
        for camera in path:
            assert camera.left >= -1e-6
            assert camera.top >= -1e-6
            assert camera.left + 96 / camera.scale <= 120 + 1e-6
            assert camera.top + 64 / camera.scale <= 80 + 1e-6
    still = camera_path(8, (80, 120), (64, 96), 0, 0, rng)
    assert len(set(still)) == 1
    assert still[0].left.is_integer()


def test_sprites_move_and_leave() -> None:
    sprite = Sprite(np.full((10, 20, 3), 200, np.uint8), (5.0, 5.0), (30.0, 0.0))
    for t, visible in [(0, True), (1, True), (4, False)]:
        canvas = np.zeros((40, 100, 3), np.uint8)
        sprite.paste(canvas, t)
        x1, y1, x2, y2 = sprite.box(t).astype(int)
        assert bool(canvas.any()) == visible
        canvas[y1:y2, x1:x2] = 0
        assert not canvas.any()  # nothing outside its box


def test_mixing_keeps_the_ratio_and_every_set_its_order(stills: CocoVideo, videos: CocoVideo) -> None:
    sets = [TrainingSet(stills, AUGMENTATION), TrainingSet(videos, AUGMENTATION)]
    mixed = MixedSet(sets, [3, 1], seed=1)
    places = [mixed.place(n) for n in range(400)]
    assert Counter(which for which, _ in places[:100]) == {0: 75, 1: 25}
    for which in (0, 1):
        assert [place for w, place in places if w == which] == list(range(300 if which == 0 else 100))
    which, place = places[5]
    assert torch.equal(mixed[(5, 0)][0], sets[which][(place, 0)][0])
    alone = MixedSet(sets[:1], [1.0])
    assert [alone.place(n) for n in range(250)] == [(0, n) for n in range(250)]


@pytest.mark.parametrize("ratio", [[1.0], [1.0, 0.0], [1.0, 1000.0]])
def test_mixing_needs_a_positive_ratio_for_each(stills: CocoVideo, ratio: list[float]) -> None:
    with pytest.raises(UserError, match="mixing"):
        MixedSet([TrainingSet(stills, AUGMENTATION)] * 2, ratio)
