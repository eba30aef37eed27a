"""Average precision: hand-computed cases, and pycocotools used the ordinary way."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eventful_det.data.coco_video import Annotation, Box, CocoVideo, Frame, Video
from eventful_det.detectors.vitdet.roi_heads import Detections
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import Entry, agreement, category_ids, coco_results, evaluate

BOX: Box = (100.0, 100.0, 200.0, 200.0)


def dataset(*frames: list[Annotation], names: tuple[str, ...] = ("cat", "dog", "fox")) -> CocoVideo:
    images = [Frame(i, f"{i}.jpg", 640, 480, i, list(objects)) for i, objects in enumerate(frames, start=1)]
    return CocoVideo(list(enumerate(names, start=11)), [Video(1, "a", images)], Path())


def found(image: int, box: Box, score: float = 0.9, category: int = 11) -> Entry:
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def moved(box: Box, x: float) -> Box:
    return (box[0] + x, box[1], box[2] + x, box[3])


def random_data(seed: int) -> tuple[CocoVideo, list[Entry]]:
    """Objects, and noisy detections of them with misses, doubles and false positives."""
    rng = np.random.default_rng(seed)
    frames, results = [], []
    for image in range(1, 31):
        objects = []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.uniform([0, 0, 20, 20], [400, 300, 200, 150]).tolist()
            category = int(rng.integers(11, 13))  # the third class never occurs
            objects.append(Annotation(category, (x, y, x + w, y + h), iscrowd=bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = (rng.normal(0, 0.12, 4) * [w, h, w, h]).tolist()
                guess = (x + dx, y + dy, x + dx + max(5, w + dw), y + dy + max(5, h + dh))
                results.append(found(image, guess, float(rng.random()), int(rng.choice([category, 13], p=[0.9, 0.1]))))
        frames.append(objects)
    return dataset(*frames), results


def test_the_truth_as_detections_is_perfect() -> None:
    data, _ = random_data(0)
    for frame in data.frames:
        frame.annotations = [a for a in frame.annotations if not a.iscrowd]
    truth = [found(f.image_id, a.box, 0.7, a.category_id) for f in data.frames for a in f.annotations]
    scores = evaluate(data, truth)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((1, 1, 1))
    assert scores.ap50_by_class["cat"] == scores.ap50_by_class["dog"] == pytest.approx(1)
    assert math.isnan(scores.ap50_by_class["fox"])
    assert (scores.images, scores.objects, scores.detections) == (30, len(truth), len(truth))


def test_no_detections_at_all_score_zero() -> None:
    scores = evaluate(dataset([Annotation(11, BOX)], []), [])
    assert (scores.ap, scores.ap50, scores.ap75, scores.detections) == (0, 0, 0, 0)


def test_a_miss_costs_the_recall_beyond_it() -> None:
    objects = [Annotation(11, (x, 10.0, x + 50, 60.0)) for x in (10.0, 110.0, 210.0, 310.0)]
    scores = evaluate(dataset(objects), [found(1, a.box) for a in objects[:3]])
    assert scores.ap == scores.ap50 == pytest.approx(76 / 101)  # precision 1 at the recalls 0, .01, ..., .75


@pytest.mark.parametrize(("score", "expected"), [(0.95, 0.5), (0.1, 1.0)])
def test_a_false_positive_counts_by_its_score(score: float, expected: float) -> None:
    results = [found(1, BOX), found(1, (300.0, 300.0, 350.0, 350.0), score)]
    assert evaluate(dataset([Annotation(11, BOX)]), results).ap50 == pytest.approx(expected)


def test_a_box_off_by_a_fifth_counts_at_small_overlaps() -> None:
    scores = evaluate(dataset([Annotation(11, BOX)]), [found(1, moved(BOX, 20))])  # overlap 80 / 120
    assert (scores.ap50, scores.ap75) == pytest.approx((1, 0))
    assert scores.ap == pytest.approx(0.4)  # found at 0.5, 0.55, 0.6 and 0.65


def test_the_mean_is_over_the_classes_that_occur() -> None:
    data = dataset([Annotation(11, BOX), Annotation(12, moved(BOX, 200))])
    scores = evaluate(data, [found(1, BOX), found(1, BOX, 0.99, category=13)])
    assert scores.ap50 == pytest.approx(0.5)
    assert scores.ap50_by_class["cat"] == pytest.approx(1) and scores.ap50_by_class["dog"] == 0
    assert math.isnan(scores.ap50_by_class["fox"]), "detections of a class that never occurs change nothing"


def test_a_single_class_is_enough() -> None:
    scores = evaluate(dataset([Annotation(11, BOX)], names=("cat",)), [found(1, BOX)])
    assert scores.ap == pytest.approx(1) and scores.ap50_by_class == pytest.approx({"cat": 1})


def test_frames_without_labels_are_not_scored() -> None:
    data = dataset([Annotation(11, BOX)], [])
    data.videos[0].frames[1].labelled = False
    scores = evaluate(data, [found(1, BOX, 0.5), found(2, BOX, 0.9), found(77, BOX, 0.9)])
    assert scores.ap == pytest.approx(1) and (scores.images, scores.detections) == (1, 1)
    data.videos[0].frames[0].labelled = False
    assert math.isnan(evaluate(data, []).ap)


def test_crowds_are_neither_to_be_found_nor_false() -> None:
    data = dataset([Annotation(11, BOX), Annotation(11, (300.0, 100.0, 600.0, 300.0), iscrowd=True)])
    scores = evaluate(data, [found(1, BOX, 0.5), found(1, (310.0, 110.0, 400.0, 200.0), 0.9)])
    assert scores.ap == pytest.approx(1) and scores.objects == 1


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(*random_data(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_used_the_ordinary_way(seed: int, tmp_path: Path) -> None:
    data, results = random_data(seed)
    data.renumber()
    data.save(tmp_path / "truth.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        judge = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = evaluate(data, results)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx(tuple(judge.stats[:3]), abs=1e-12)
    assert 0.05 < scores.ap < scores.ap50 < 0.95, "the case is neither trivial nor hopeless"


def test_coco_results() -> None:
    boxes = torch.tensor([[10.0, 20.0, 40.5, 60.0], [0.0, 0.0, 1.0, 2.0]])
    none = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.long))
    detections = Detections(boxes, torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    assert coco_results({7: detections, 8: none}, [11, 12]) == [
        {"image_id": 7, "category_id": 12, "bbox": [10.0, 20.0, 30.5, 40.0], "score": 0.75},
        {"image_id": 7, "category_id": 11, "bbox": [0.0, 0.0, 1.0, 2.0], "score": 0.5},
    ]


def test_labels_are_matched_to_categories_by_name() -> None:
    assert category_ids(dataset(), ["fox", "cat", "dog"]) == [13, 11, 12]
    with pytest.raises(UserError, match="data set only: dog, fox; known to the weights only: emu"):
        category_ids(dataset(), ["cat", "emu"])


def test_agreement() -> None:
    _, results = random_data(2)
    assert agreement(results, results) == pytest.approx(1)
    assert agreement(results, []) == 0
    assert math.isnan(agreement([], results)), "nothing to agree with"
    sure = [entry for entry in results if entry["score"] >= 0.5]
    assert agreement(results, sure) == pytest.approx(1), "unsure ones are not asked for"
    assert 0 < agreement(results, sure[::2]) < 0.7
    assert agreement([found(1, BOX)], [found(1, moved(BOX, 20))]) == pytest.approx(1)
    assert agreement([found(1, BOX)], [found(1, moved(BOX, 60))]) == 0


def test_agreement_is_of_classes_with_enough_boxes() -> None:
    often = [found(image, BOX, category=11) for image in range(1, 11)]
    blink = found(11, BOX, category=12)
    assert agreement([*often, blink], often) == pytest.approx(1), "one box of another class"
    assert agreement([*often, blink], [blink]) == 0
    assert agreement([*often[1:], blink], often[1:]) == pytest.approx(0.5), "too few of any: all count"


def test_rare_classes_can_be_left_out_of_the_mean() -> None:
    data = dataset([Annotation(11, BOX), Annotation(12, BOX)], [Annotation(11, BOX)])
    scores = evaluate(data, [found(1, BOX, 0.5), found(2, BOX, 0.9)])
    assert scores.ap50_of_common(2) == pytest.approx(1) and scores.ap50_of_common(1) == pytest.approx(0.5)
    assert math.isnan(scores.ap50_of_common(3)) and scores.objects == 3
