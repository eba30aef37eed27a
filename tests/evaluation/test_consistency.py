"""Found objects and flicker, on cases counted by hand."""

import math
from pathlib import Path

import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.evaluation.consistency import false_alarms, flicker, found_share, likeness

BOX = [10.0, 10.0, 20.0, 20.0]
FAR = [70.0, 70.0, 20.0, 20.0]


def video(frames: int, step: int = 1) -> CocoVideo:
    """One object that does not move."""
    box = Annotation(1, (10.0, 10.0, 30.0, 30.0))
    images = [Frame(i + 1, f"{i}.jpg", 100, 100, i * step, [box]) for i in range(frames)]
    return CocoVideo([(1, "cat"), (2, "dog")], [Video(1, "v", images)], Path())


def results(*frames: list[list[float]], category: int = 1, score: float = 0.9) -> list[dict]:
    return [
        {"image_id": i, "category_id": category, "bbox": box, "score": score}
        for i, boxes in enumerate(frames, start=1)
        for box in boxes
    ]


def test_steady_boxes_do_not_flicker() -> None:
    assert flicker(video(5), results(*[[BOX]] * 5)) == 0


def test_a_lost_frame_is_one_blink() -> None:
    assert flicker(video(5), results([BOX], [BOX], [], [BOX], [BOX])) == pytest.approx(1 / 2)  # frames 2 and 4


def test_a_flash_is_one_blink() -> None:
    assert flicker(video(3), results([BOX], [BOX, FAR], [BOX])) == pytest.approx(1 / 2)


def test_a_jump_is_a_flash_and_a_loss() -> None:
    assert flicker(video(3), results([BOX], [FAR], [BOX])) == 2


def test_unsure_boxes_and_gaps_do_not_count() -> None:
    assert math.isnan(flicker(video(3), results([BOX], [FAR], [BOX], score=0.4)))
    assert math.isnan(flicker(video(3, step=2), results([BOX], [FAR], [BOX])))


def test_found_needs_class_place_and_score() -> None:
    assert found_share(video(4), results([BOX], [FAR], [], [BOX])) == 0.5
    assert found_share(video(4), results(*[[BOX]] * 4, category=2)) == 0
    assert found_share(video(4), results(*[[BOX]] * 4, score=0.4)) == 0
    assert math.isnan(found_share(CocoVideo([(1, "cat")], [], Path()), []))


def test_false_alarms_are_counted_on_empty_frames_alone() -> None:
    data = video(4)
    for frame in data.videos[0].frames[2:]:
        frame.annotations.clear()
    assert false_alarms(data, results([FAR], [], [BOX, FAR], [BOX])) == 150
    assert false_alarms(data, results([], [], [BOX], [BOX], score=0.4)) == 0
    assert math.isnan(false_alarms(video(4), results([FAR])))


def test_likeness_counts_boxes_of_both_runs() -> None:
    ours = results([BOX], [BOX, FAR], [FAR])
    assert likeness(ours, ours) == 1
    assert likeness(ours, results([BOX], [BOX], [])) == pytest.approx((2 + 2) / (4 + 2))
    assert likeness(ours, results([BOX], [BOX], [], category=2)) == 0
    assert likeness(ours, results([BOX], [BOX, FAR], [FAR], score=0.4)) == 0
    assert math.isnan(likeness([], results([BOX], score=0.4)))
