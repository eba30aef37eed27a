"""Scores of ImageNet VID: hand-computed cases, and a slow reading of the rules."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from eventful_det.data.coco_video import Annotation, Box, CocoVideo, Frame, Video
from eventful_det.evaluation.detection import Entry
from eventful_det.evaluation.ilsvrc import FGFA, MEGA, GroupScore, Protocol, group_scores, vid_scores
from eventful_det.evaluation.ilsvrc.motion import motion_groups, motion_iou

SLOW: Box = (10.0, 10.0, 109.0, 109.0)
FAR: Box = (500.0, 300.0, 599.0, 399.0)
CLASSES = [(11, "cat"), (12, "dog"), (13, "fox")]
BOTH = pytest.mark.parametrize("protocol", [MEGA, FGFA])


def dataset(*frames: list[Annotation]) -> CocoVideo:
    images = [Frame(i, f"{i}.jpg", 640, 480, i, list(objects)) for i, objects in enumerate(frames, start=1)]
    data = CocoVideo(CLASSES, [Video(1, "a", images)], Path())
    data.renumber()
    return data


def found(image: int, box: Box, score: float = 0.9, category: int = 11) -> Entry:
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def moved(box: Box, x: float) -> Box:
    return (box[0] + x, box[1], box[2] + x, box[3])


def slow_and_fast(frames: int = 10) -> CocoVideo:
    """A cat that sits and a cat that runs to and fro by 60 of its 100 pixels."""
    return dataset(
        *(
            [Annotation(11, SLOW, track_id=0), Annotation(11, moved((100, 200, 199, 299), 60 * (time % 2)), track_id=1)]
            for time in range(frames)
        )
    )


def truth_of(data: CocoVideo, score: float = 0.7, track: int | None = None) -> list[Entry]:
    objects = ((f.image_id, a) for f in data.frames for a in f.annotations)
    return [found(i, a.box, score, a.category_id) for i, a in objects if track is None or a.track_id == track]


def random_data(seed: int) -> tuple[CocoVideo, list[Entry]]:
    """Objects of all speeds, frames without any, and detections with misses, doubles and false positives."""
    rng = np.random.default_rng(seed)
    image, videos, results = 0, [], []
    for number in range(4):
        count = int(rng.integers(1, 5))
        start = rng.uniform([0, 0, 5, 5], [300, 200, 120, 90], (count, 4))
        speed = rng.normal(0, 1, (count, 2)) * rng.choice([0.1, 1, 8], (count, 1))
        classes = rng.integers(11, 13, count).tolist()
        frames = []
        for time in range(rng.integers(3, 25)):
            image += 1
            frame = Frame(image, "", 640, 480, time)
            for track in np.flatnonzero(rng.random(count) < 0.7).tolist():
                x, y, w, h = start[track].round() + [*(speed[track] * time).round(), 0, 0]
                frame.annotations.append(Annotation(classes[track], (x, y, x + w, y + h), track_id=track))
                for _ in range(rng.integers(0, 4)):
                    dx, dy, dw, dh = rng.normal(0, 0.15, 4) * [w, h, w, h]
                    guess = (x + dx, y + dy, x + dx + max(1, w + dw), y + dy + max(1, h + dh))
                    results.append(found(image, guess, float(rng.random()), int(rng.choice([classes[track], 12, 13]))))
            if rng.random() < 0.5:
                x, y, w, h = rng.uniform(5, 300, 4)
                results.append(found(image, (x, y, x + w, y + h), float(rng.random()), int(rng.integers(11, 14))))
            frames.append(frame)
        videos.append(Video(number + 1, "", frames))
    data = CocoVideo(CLASSES, videos, Path())
    data.renumber()
    return data, results


def naive(data: CocoVideo, results: list[Entry], protocol: Protocol, group: str) -> dict[str, float]:
    """AP by class over a group of objects, read off the rules one detection at a time; needs distinct scores."""

    def area(b: Box) -> float:
        return max(b[2] - b[0] + 1, 0) * max(b[3] - b[1] + 1, 0)

    def overlap(a: Box, b: Box) -> float:
        shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
        return shared / (area(a) + area(b) - shared)

    def wanted(b: Box) -> float:
        w, h = b[2] - b[0] + 1, b[3] - b[1] + 1
        return min(0.5, w * h / ((w + 10) * (h + 10))) if protocol.lenient else 0.5

    speeds = {i: value for video in data.videos for i, value in motion_iou(video).items()}
    frames = {frame.image_id: frame for frame in data.frames}
    member = {i: group == "all" or bool(motion_groups(np.array(value))[group]) for i, value in speeds.items()}
    empty = sum(not frame.annotations for frame in frames.values())
    share = (sum(member.values()) + empty * (group in ("all", "fast"))) / (len(member) + empty)
    gone: set[int] = set()
    marks: dict[int, list[tuple[float, float]]] = {category: [] for category, _ in data.categories}  # right, wrong
    for entry in sorted(results, key=lambda e: -e["score"]):
        x, y, w, h = entry["bbox"]
        box = (x, y, x + w, y + h)
        here = frames[entry["image_id"]].annotations
        same = [a for a in here if a.category_id == entry["category_id"]]
        free = [a for a in same if a.id not in gone and overlap(box, a.box) >= wanted(a.box)]
        if free:
            best = max(free, key=lambda a: overlap(box, a.box))
            gone.add(best.id)
            marks[entry["category_id"]].append((float(member[best.id]), 0.0))
            continue
        near = same if protocol.same_class else here
        ours = max((overlap(box, a.box) for a in near if member[a.id]), default=-1)
        others = max((overlap(box, a.box) for a in near if not member[a.id]), default=-1)
        if ours == others:
            wrong = sum(not member[a.id] for a in near) / len(near) if near else share
        else:
            wrong = float(ours > others)
        marks[entry["category_id"]].append((0.0, wrong))
    result = {}
    for category, name in data.categories:
        objects = sum(member[a.id] for f in frames.values() for a in f.annotations if a.category_id == category)
        right = wrong = 0.0
        curve = []  # (recall, precision)
        for hit, miss in marks[category]:
            right, wrong = right + hit, wrong + miss
            curve.append((right / objects if objects else 0, right / (right + wrong) if right + wrong else 0))
        steps = sorted({recall for recall, _ in curve if recall > 0})
        best_precision = [max(p for r, p in curve if r >= step) for step in steps]
        result[name] = float(np.dot(np.diff([0, *steps]), best_precision)) if objects else math.nan
    return result


@pytest.mark.parametrize("seed", range(12))
@BOTH
def test_equals_the_rules_read_slowly(seed: int, protocol: Protocol) -> None:
    data, results = random_data(seed)
    scores = group_scores(data, results, protocol)
    for group, score in scores.items():
        expected = naive(data, results, protocol, group)
        assert score.by_class == pytest.approx(expected, abs=1e-12, nan_ok=True)
        occurring = [value for value in expected.values() if not math.isnan(value)]
        assert score.ap == pytest.approx(np.mean(occurring) if occurring else math.nan, nan_ok=True)
    assert sum(scores[group].objects for group in ("slow", "medium", "fast")) == scores["all"].objects > 0


@BOTH
def test_the_truth_as_detections_is_perfect(protocol: Protocol) -> None:
    data, _ = random_data(3)
    scores = group_scores(data, truth_of(data), protocol)
    assert all(score.ap == pytest.approx(1) for score in scores.values()) and scores["fast"].objects > 0


def test_the_summary() -> None:
    data = slow_and_fast()
    scores = vid_scores(data, iter(truth_of(data)))
    assert (scores.ap50_vid, scores.ap50_slow, scores.ap50_fast, scores.ap_ilsvrc) == pytest.approx((1, 1, 1, 1))
    assert math.isnan(scores.ap50_medium)
    assert (scores.objects_slow, scores.objects_medium, scores.objects_fast) == (10, 0, 10)


@BOTH
def test_a_miss_costs_its_share_of_the_recall(protocol: Protocol) -> None:
    objects = [Annotation(11, moved(SLOW, x)) for x in (0, 110, 220, 330)]
    score = group_scores(dataset(objects), [found(1, a.box) for a in objects[:3]], protocol)["all"]
    assert score.ap == pytest.approx(3 / 4) and score.objects == 4
    assert group_scores(dataset(objects), [], protocol)["all"].ap == 0


@pytest.mark.parametrize(("score", "expected"), [(0.95, 0.5), (0.1, 1.0)])
@BOTH
def test_a_false_positive_counts_by_its_score(protocol: Protocol, score: float, expected: float) -> None:
    results = [found(1, SLOW), found(1, FAR, score)]
    assert group_scores(dataset([Annotation(11, SLOW)]), results, protocol)["all"].ap == pytest.approx(expected)


@BOTH
def test_the_second_of_two_detections_is_wrong_and_the_nearer_object_is_taken(protocol: Protocol) -> None:
    one = dataset([Annotation(11, SLOW)], [Annotation(11, SLOW)])
    results = [found(1, SLOW, 0.9), found(1, SLOW, 0.8), found(2, SLOW, 0.7)]
    assert group_scores(one, results, protocol)["all"].ap == pytest.approx(0.5 + 0.5 * 2 / 3)
    two = dataset([Annotation(11, SLOW), Annotation(11, moved(SLOW, 20))])
    results = [
        found(1, moved(SLOW, 12), 0.9),
        found(1, moved(SLOW, -30), 0.8),
    ]  # the second one overlaps the first only
    assert group_scores(two, results, protocol)["all"].ap == pytest.approx(1)


@pytest.mark.parametrize(("shift", "expected"), [(33, 1), (34, 0)])
def test_half_an_overlap_in_inclusive_pixels(shift: int, expected: float) -> None:
    """99 columns: moved by 33, 66 of 132 are shared."""
    data = dataset([Annotation(11, (0.0, 0.0, 98.0, 49.0))])
    for protocol in (MEGA, FGFA):
        score = group_scores(data, [found(1, (shift, 0.0, 98.0 + shift, 49.0))], protocol)["all"]
        assert score.ap == expected


@pytest.mark.parametrize(("shift", "mega", "fgfa"), [(3, 1, 1), (4, 0, 1), (6, 0, 1), (7, 0, 0)])
def test_small_objects_are_found_at_a_smaller_overlap(shift: int, mega: float, fgfa: float) -> None:
    """10 x 10 pixels ask for 100 / 400; moved by 6, 40 of 160 are shared."""
    data = dataset([Annotation(11, (50.0, 50.0, 59.0, 59.0))])
    scores = vid_scores(data, [found(1, (50.0 + shift, 50.0, 59.0 + shift, 59.0))])
    assert (scores.ap50_vid, scores.ap_ilsvrc) == (mega, fgfa)


@BOTH
def test_detections_of_other_groups_are_neither_right_nor_wrong(protocol: Protocol) -> None:
    data = slow_and_fast()
    scores = group_scores(data, truth_of(data, track=0), protocol)
    assert (scores["slow"].ap, scores["fast"].ap, scores["all"].ap) == pytest.approx((1, 0, 0.5))
    first_the_slow = truth_of(data, 0.9, track=0) + truth_of(data, 0.1, track=1)
    assert group_scores(data, first_the_slow, protocol)["fast"].ap == pytest.approx(1)


@BOTH
def test_a_bad_box_counts_in_the_group_it_is_near_to(protocol: Protocol) -> None:
    data = slow_and_fast()
    bad = [found(frame.image_id, moved(SLOW, 60), 0.95) for frame in data.frames]
    scores = group_scores(data, bad + truth_of(data), protocol)
    assert (scores["slow"].ap, scores["fast"].ap, scores["all"].ap) == pytest.approx((1 / 2, 1, 2 / 3))


@BOTH
def test_a_box_near_nothing_counts_by_the_share_of_the_other_objects(protocol: Protocol) -> None:
    data = slow_and_fast()
    bad = [found(frame.image_id, FAR, 0.95) for frame in data.frames]
    scores = group_scores(data, bad + truth_of(data), protocol)
    assert (scores["slow"].ap, scores["fast"].ap, scores["all"].ap) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


def test_a_box_with_nothing_to_be_near_to_counts_by_the_share_of_the_group() -> None:
    """A frame without objects counts as one of motion IoU 0, as in both programs."""
    data = dataset(*(f.annotations for f in slow_and_fast().frames), [], [])
    bad = [found(11, FAR, 0.95), found(12, FAR, 0.95)]
    fast = (10 + 2) / 22
    for protocol in (MEGA, FGFA):
        scores = group_scores(data, bad + truth_of(data), protocol)
        assert scores["slow"].ap == pytest.approx(10 / (10 + 2 * (1 - fast)))
        assert scores["fast"].ap == pytest.approx(10 / (10 + 2 * fast))
        assert scores["all"].ap == pytest.approx(20 / 22)


def test_whose_objects_are_looked_at() -> None:
    """A dog found on the slow cat: MEGA sees no dog there and takes the share; FGFA takes the group of the cat."""
    data = slow_and_fast(20)
    for time, frame in enumerate(data.frames):
        frame.annotations.append(Annotation(12, moved(FAR, 50 * (time % 2)), track_id=2))
    for frame in list(data.frames)[10:]:
        frame.annotations = frame.annotations[:2]
    data.renumber()
    bad = [found(frame.image_id, SLOW, 0.95, 12) for frame in list(data.frames)[10:]]
    scores = {protocol: group_scores(data, bad + truth_of(data), protocol)["fast"] for protocol in (MEGA, FGFA)}
    assert scores[MEGA].by_class["dog"] == pytest.approx(10 / (10 + 10 * 30 / 50))
    assert scores[FGFA].by_class["dog"] == pytest.approx(1)
    assert scores[MEGA].by_class["cat"] == scores[FGFA].by_class["cat"] == pytest.approx(1)


def test_crowds_are_neither_to_be_found_nor_false() -> None:
    crowd = Annotation(11, (300.0, 100.0, 600.0, 300.0), iscrowd=True, track_id=9)
    results = [found(1, SLOW, 0.5), *(found(1, (310.0 + x, 110.0, 400.0 + x, 200.0), 0.9) for x in (0, 50))]
    score = group_scores(dataset([Annotation(11, SLOW), crowd]), results)["all"]
    assert (score.ap, score.objects) == (pytest.approx(1), 1)
    assert group_scores(dataset([Annotation(11, SLOW)]), results)["all"].ap == pytest.approx(1 / 3)


def test_what_is_not_labelled_is_not_scored() -> None:
    data = dataset([Annotation(11, SLOW)], [], [])
    _, unlabelled, partly = data.frames
    unlabelled.labelled, partly.exhaustive = False, frozenset({12})
    partly.annotations.append(Annotation(11, FAR))
    results = [found(i, SLOW, 0.9) for i in (1, 2, 3, 77)]
    assert group_scores(data, results)["all"] == GroupScore(
        pytest.approx(1), pytest.approx({"cat": 1, "dog": math.nan, "fox": math.nan}, nan_ok=True), 1
    )
    for frame in data.frames:
        frame.labelled = False
    assert math.isnan(vid_scores(data, results).ap50_vid)


def test_without_track_ids_there_are_no_groups() -> None:
    data = dataset([Annotation(11, SLOW)], [Annotation(11, SLOW)])
    scores = vid_scores(data, truth_of(data))
    assert (scores.ap50_vid, scores.ap_ilsvrc) == pytest.approx((1, 1))
    assert all(map(math.isnan, (scores.ap50_slow, scores.ap50_medium, scores.ap50_fast))) and not scores.objects_fast


def test_motion_may_come_from_elsewhere() -> None:
    data = slow_and_fast()
    medium = {a.id: 0.8 for frame in data.frames for a in frame.annotations if a.track_id == 1}
    scores = group_scores(data, truth_of(data), motion=medium)
    assert [scores[name].objects for name in ("all", "slow", "medium", "fast")] == [20, 0, 10, 0]


@pytest.mark.parametrize("seed", range(3))
@BOTH
def test_only_the_order_of_the_scores_matters(seed: int, protocol: Protocol) -> None:
    data, results = random_data(seed)
    shuffled = [
        results[i] | {"score": results[i]["score"] ** 3} for i in np.random.default_rng(0).permutation(len(results))
    ]
    unsure = [found(frame.image_id, FAR, 0.0) for frame in data.frames]
    expected = {name: score.ap for name, score in group_scores(data, results, protocol).items()}
    for same in (shuffled, results + unsure):
        got = {name: score.ap for name, score in group_scores(data, same, protocol).items()}
        assert got == pytest.approx(expected, nan_ok=True)
