"""Boxes that move with their objects between key frames."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from eventful_det.detectors.results import Detections
from eventful_det.errors import UserError
from eventful_det.runtime.motion.boxes import EVERY_ID, BoxMover, MotionOptions
from eventful_det.runtime.motion.key_frames import KeyFrames

SIZE = (240, 400)  # height, width
FINE = MotionOptions(short_side=240)  # a square of 60 pixels is small for the default picture


def key(mover: BoxMover, image: NDArray[np.uint8], detections: Detections) -> Detections:
    """A frame on which the network ran."""
    mover.move(image)
    return mover.key(detections)


def held(mover: BoxMover, image: NDArray[np.uint8]) -> Detections:
    """A frame on which it did not."""
    mover.move(image)
    return mover.boxes()


def texture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def scene(x: float, y: float, side: float, pan: float = 0.0) -> NDArray[np.uint8]:
    """A textured square with its corner at (x, y) before a textured wall; the camera pans to the right."""
    wall = texture(SIZE[0], 2 * SIZE[1], 0)
    shift = np.float32([[1, 0, -100 - pan], [0, 1, 0]])
    picture = cv2.warpAffine(wall, shift, SIZE[::-1], flags=cv2.INTER_LINEAR)
    square = texture(60, 60, 1)
    place = np.float32([[side / 60, 0, x - pan], [0, side / 60, y]])
    drawn = cv2.warpAffine(square, place, SIZE[::-1])
    mask = cv2.warpAffine(np.full((60, 60), 255, np.uint8), place, SIZE[::-1]) > 127
    picture[mask] = drawn[mask]
    return np.asarray(picture)


def found(*boxes: tuple[float, ...], scores: list[float] | None = None, labels: list[int] | None = None) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(scores or [0.9] * len(boxes)),
        torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    )


def square_box(x: float, y: float, side: float) -> tuple[float, ...]:
    return (x, y, x + side, y + side)


def run(mover: BoxMover, frames: int, dx: float, dy: float, pan: float = 0.0, grow: float = 1.0) -> tuple[float, ...]:
    """Move a square from (100, 80) through some frames; returns its true box on the last."""
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    for i in range(1, frames + 1):
        side = 60 * grow**i
        mover_box = held(mover, scene(100 + dx * i, 80 + dy * i, side, pan * i))
    assert len(mover_box) == 1
    return tuple(square_box(100 + (dx - pan) * frames, 80 + dy * frames, side))


@pytest.mark.parametrize(("dx", "dy", "pan"), [(0, 0, 0), (5, 0, 0), (-3, 2, 0), (0, 0, 4), (6, 1, 4)])
def test_boxes_follow_objects_and_cameras(dx: float, dy: float, pan: float) -> None:
    mover = BoxMover(FINE)
    true = run(mover, 6, dx, dy, pan)
    box = held(mover, scene(100 + 6 * dx, 80 + 6 * dy, 60, 6 * pan)).boxes
    assert float(box_iou(box, torch.tensor([true]))) > 0.8
    assert mover.quality == 1


def road(x: int) -> NDArray[np.uint8]:
    """A car of 24 x 14 pixels."""
    picture = texture(*SIZE, seed=3) // 6 + 90
    picture[80:94, x : x + 24] = 220, 210, 200
    picture[82:92, [*range(x + 5, x + 8), *range(x + 14, x + 19)]] = 40, 40, 60
    return np.asarray(picture)


@pytest.mark.parametrize("step", [2, 6, 12])
def test_small_objects_that_go_far_are_followed(step: int) -> None:
    """Half of their length from frame to frame, on a picture of two thirds of the frame's resolution."""
    mover = BoxMover()
    key(mover, road(100), found((100, 80, 124, 94)))
    for i in range(1, 7):
        moved = held(mover, road(100 + step * i))
    assert float(box_iou(moved.boxes, torch.tensor([[100.0 + 6 * step, 80, 124 + 6 * step, 94]]))) > 0.8


def test_boxes_of_any_number_are_followed() -> None:
    mover, boxes = BoxMover(FINE), [square_box(100 + i % 5, 80 + i % 7, 60) for i in range(400)]
    key(mover, scene(100, 80, 60), found(*boxes))
    moved = held(mover, scene(105, 80, 60))
    assert len(moved) == 400
    assert float((moved.boxes[:, 0] - torch.tensor(boxes)[:, 0]).median()) == pytest.approx(5, abs=0.5)


def test_boxes_grow_with_objects_that_approach() -> None:
    mover = BoxMover(FINE)
    run(mover, 6, 0, 0, grow=1.04)
    side = 60 * 1.04**6
    box = held(mover, scene(100, 80, side)).boxes[0]
    assert float(box[2] - box[0]) == pytest.approx(side, rel=0.08)


def test_a_still_frame_moves_nothing() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    still = held(mover, scene(100, 80, 60))
    assert still.boxes[0].tolist() == pytest.approx(square_box(100, 80, 60), abs=0.2)
    assert mover.quality > 0.99


def test_objects_keep_their_track_ids_and_new_ones_get_their_own() -> None:
    mover = BoxMover(MotionOptions(short_side=240, keep=0))
    first = key(mover, scene(100, 80, 60), found(square_box(100, 80, 60), square_box(300, 20, 40), labels=[0, 1]))
    for i in range(1, 4):
        held(mover, scene(100 + 6 * i, 80, 60))
    second = key(mover, scene(124, 80, 60), found(square_box(200, 150, 50), square_box(124, 80, 60), labels=[0, 0]))
    assert first.tracks is not None and second.tracks is not None
    assert first.tracks.tolist() == [0, 1]
    assert second.tracks.tolist() == [2, 0], "the moved square is the same object, the other a new one"


def test_unsure_boxes_use_up_no_ids() -> None:
    mover = BoxMover()
    places = square_box(100, 80, 60), square_box(20, 20, 40), square_box(300, 20, 40)
    tracks = []
    for scores in ([0.9, 0.1, 0.1], [0.9, 0.1, 0.9], [0.1, 0.9, 0.1]):
        found_now = key(mover, scene(100, 80, 60), found(*places, scores=scores))
        assert found_now.tracks is not None
        order = [int(abs(found_now.boxes - torch.tensor(place)).sum(1).argmin()) for place in places]
        tracks.append(found_now.tracks[order].tolist())
    assert tracks == [[0, -1, -1], [0, -1, 1], [0, 2, 1]], "in the order in which they got sure; they keep them"
    every = key(BoxMover(EVERY_ID), scene(100, 80, 60), found(*places, scores=[0.9, 0.1, 0.1]))
    assert every.tracks is not None and every.tracks.tolist() == [0, 1, 2]


def test_a_box_of_another_class_is_another_object() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    again = key(mover, scene(100, 80, 60), found(square_box(100, 80, 60), labels=[3]))
    assert again.tracks is not None and again.tracks.tolist() == [1, 0] and again.labels.tolist() == [3, 0]


def test_an_object_that_the_network_misses_lives_on_for_a_while() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    scores = []
    for _ in range(10):
        detections = key(mover, scene(100, 80, 60), found())
        scores.append(float(detections.scores[0]) if len(detections) else 0.0)
    assert scores[0] == pytest.approx(0.63, abs=0.01) and scores == sorted(scores, reverse=True) and scores[-1] == 0


def test_an_object_that_is_missed_is_gone_where_boxes_cannot_be_followed() -> None:
    """Frames that are too far apart: what stands in the box is something else."""
    mover = BoxMover()
    key(mover, texture(240, 320, 0), found(square_box(100, 100, 60), square_box(200, 60, 50)))
    now = key(mover, texture(240, 320, 1), found(square_box(20, 150, 60)))
    assert len(now) == 1


def test_a_box_and_its_detection_become_one() -> None:
    """A blink of the score is damped, and so is a jump of the box."""
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    jumped = key(mover, scene(100, 80, 60), found((110, 80, 170, 140), scores=[0.4]))
    assert len(jumped) == 1 and jumped.tracks is not None and jumped.tracks.tolist() == [0]
    assert 0.6 < float(jumped.scores[0]) < 0.8
    assert float(jumped.boxes[0, 0]) == pytest.approx(108, abs=0.5)


def test_something_new_outside_of_all_boxes_is_noticed() -> None:
    mover, rule = BoxMover(), KeyFrames(every=100, quality=0)
    key(mover, scene(-70, 80, 60), found(square_box(300, 20, 40)))
    noticed = []
    for i in range(1, 12):
        held(mover, scene(-70 + 12 * i, 80, 60))
        noticed.append(rule.early(mover))
    assert not any(noticed[:3]) and any(noticed), "a square that walks in from the left"


def test_boxes_that_leave_the_frame_are_gone() -> None:
    mover = BoxMover()
    key(mover, scene(350, 80, 60), found(square_box(350, 80, 60)))
    counts = [len(held(mover, scene(350, 80, 60, pan=-9 * i))) for i in range(1, 7)]
    assert counts[0] == 1 and counts[-1] == 0


def test_where_nothing_can_be_followed_scores_fall() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    lost = held(mover, texture(*SIZE, seed=9))
    assert mover.quality < 0.5 and float(lost.scores[0]) < 0.9


def test_no_boxes_and_a_new_size_are_no_trouble() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found())
    assert len(held(mover, scene(100, 80, 60))) == 0
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    mover.forget()
    key(mover, texture(120, 300, 4), found((10, 10, 40, 60)))
    assert len(held(mover, texture(120, 300, 4))) == 1


def test_results_belong_to_the_caller() -> None:
    mover = BoxMover()
    given = key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    given.boxes.zero_()
    assert held(mover, scene(100, 80, 60)).boxes[0, 2] > 100


def test_every_third_frame_is_every_third_frame() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    held(mover, texture(*SIZE, seed=9))
    assert KeyFrames().early(mover) and not KeyFrames.each(3).early(mover), "however things look"
    with pytest.raises(UserError, match="hold must be at least 1"):
        KeyFrames(every=0)


def test_the_network_runs_again_when_something_else_is_in_the_boxes() -> None:
    """The square is gone in a step, behind it stands the wall: every point there has its way, but no box its object."""
    mover, rule = BoxMover(), KeyFrames(every=10, novelty=9)
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    held(mover, scene(101, 80, 60))
    assert mover.quality > 0.9 and not rule.early(mover)
    held(mover, scene(300, 80, 60))
    held(mover, scene(300, 80, 60))
    assert mover.quality < 0.5 and rule.early(mover)
    key(mover, scene(300, 80, 60), found(square_box(300, 80, 60)))
    assert mover.quality == 1


def test_tracks_go_on_counting_behind_a_scene_cut() -> None:
    mover = BoxMover()
    key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    mover.forget()
    again = key(mover, scene(100, 80, 60), found(square_box(100, 80, 60)))
    assert again.tracks is not None and again.tracks.tolist() == [1]
