"""Scores against other programs, on the real boxes of ImageNet VID, and by the age of frames."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eventful_det.data.coco_video import Annotation, Box, CocoVideo, Frame, Video, load_coco_video
from eventful_det.evaluation import detection
from eventful_det.evaluation.detection import Entry, evaluate
from eventful_det.evaluation.flushes import ap50_since_flush, frames_since_flush
from eventful_det.evaluation.ilsvrc import FGFA, MEGA, group_scores, vid_scores

REAL = Path(__file__).parents[3] / "shared" / "data" / "vid" / "vid_val10000_coco.json"
BOX: Box = (100.0, 100.0, 200.0, 200.0)


def found(image: int, box: Box, score: float = 0.9, category: int = 1) -> Entry:
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def truth_of(data: CocoVideo, score: float = 0.7) -> list[Entry]:
    return [found(f.image_id, a.box, score, a.category_id) for f in data.frames for a in f.annotations]


def moved(box: Box, x: float) -> Box:
    return (box[0] + x, box[1], box[2] + x, box[3])


def random_data(seed: int) -> tuple[CocoVideo, list[Entry]]:
    """Objects, and noisy detections of them with misses, doubles and false positives; all scores differ."""
    rng = np.random.default_rng(seed)
    frames, results = [], []
    for image in range(40):
        objects = []
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.uniform([0, 0, 20, 20], [400, 300, 200, 150]).tolist()
            category = int(rng.integers(1, 4))
            objects.append(Annotation(category, (x, y, x + w, y + h)))
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = (rng.normal(0, 0.12, 4) * [w, h, w, h]).tolist()
                guess = (x + dx, y + dy, x + dx + max(5, w + dw), y + dy + max(5, h + dh))
                results.append(found(image, guess, float(rng.random()), int(rng.choice([category, 3], p=[0.9, 0.1]))))
        frames.append(Frame(image, "", 640, 480, image, objects))
    return CocoVideo([(1, "a"), (2, "b"), (3, "c"), (4, "never")], [Video(1, "", frames)], Path()), results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("program", ["torchmetrics.detection._mean_ap", "torchmetrics.detection.mean_ap"])
def test_torchmetrics_agrees(seed: int, program: str) -> None:
    """The first is its own implementation in torch, in single precision; the second asks pycocotools."""
    recalls = np.linspace(0, 1, 101).tolist()  # its own are rounded to float32, so that some recalls miss their step
    metric = pytest.importorskip(program).MeanAveragePrecision(box_format="xywh", rec_thresholds=recalls)
    data, results = random_data(seed)
    for frame in data.frames:
        mine = [entry for entry in results if entry["image_id"] == frame.image_id]
        theirs = [found(frame.image_id, a.box, category=a.category_id) for a in frame.annotations]
        sides = [
            {
                "boxes": torch.tensor([entry["bbox"] for entry in side]).reshape(-1, 4),
                "labels": torch.tensor([entry["category_id"] for entry in side], dtype=torch.long),
                "scores": torch.tensor([entry["score"] for entry in side]),
            }
            for side in (mine, theirs)
        ]
        metric.update(sides[:1], sides[1:])
    expected = {key: value for key, value in metric.compute().items() if value.numel() == 1}
    scores = evaluate(data, results)
    assert [scores.ap, scores.ap50, scores.ap75] == pytest.approx(
        [expected[key].item() for key in ("map", "map_50", "map_75")], abs=1e-5
    )
    assert 0.05 < scores.ap < scores.ap50 < 0.95, "the case is neither trivial nor hopeless"


@pytest.mark.parametrize("seed", range(4))
def test_both_coco_programs_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = pytest.importorskip("faster_coco_eval")
    data, results = random_data(seed)
    scores = []
    for program in ((faster.COCO, faster.COCOeval_faster), (COCO, COCOeval)):
        monkeypatch.setattr(detection, "COCO", program[0])
        monkeypatch.setattr(detection, "COCOeval", program[1])
        scores.append(evaluate(data, results))
    a, b = scores
    assert (a.ap, a.ap50, a.ap75) == pytest.approx((b.ap, b.ap50, b.ap75), abs=1e-12) and 0.1 < a.ap < 0.9
    assert a.ap50_by_class == pytest.approx(b.ap50_by_class, abs=1e-12, nan_ok=True)


@pytest.fixture(scope="module")
def real() -> CocoVideo:
    """10,001 frames of the validation set as videos, with objects that are alone of their class on their frame tracked
    as one."""
    if not REAL.is_file():
        pytest.skip(f"no {REAL.name}")
    videos: dict[str, Video] = {}
    data = load_coco_video(REAL)
    for frame in data.frames:
        name, stem = Path(frame.file_name).parts[-2:]
        frame.frame_id = int(Path(stem).stem)
        videos.setdefault(name, Video(len(videos) + 1, name)).frames.append(frame)
        many = Counter(a.category_id for a in frame.annotations)
        for annotation in frame.annotations:
            annotation.track_id = annotation.category_id if many[annotation.category_id] == 1 else None
    for video in videos.values():
        video.frames.sort(key=lambda frame: frame.frame_id)
    return CocoVideo(data.categories, list(videos.values()), data.image_root)


@pytest.mark.slow
def test_the_real_truth_as_detections_is_perfect(real: CocoVideo) -> None:
    scores, vid = evaluate(real, truth_of(real)), vid_scores(real, truth_of(real))
    assert (scores.images, scores.objects, len(real.videos)) == (10001, 15589, 548)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((1, 1, 1))
    assert (vid.ap50_vid, vid.ap50_slow, vid.ap50_medium, vid.ap50_fast, vid.ap_ilsvrc) == pytest.approx((1,) * 5)
    assert min(vid.objects_slow, vid.objects_medium, vid.objects_fast) > 500


@pytest.mark.slow
def test_misses_on_the_real_boxes_cost_their_recall(real: CocoVideo) -> None:
    """Right boxes for some objects: AP is the recall of each class; COCO's, the part of 0, 0.01, ..., 1 up to it."""
    results = truth_of(real)[::3]
    objects = Counter(a.category_id for frame in real.frames for a in frame.annotations)
    kept = Counter(entry["category_id"] for entry in results)
    recall = {name: kept[category] / objects[category] for category, name in real.categories}
    for protocol in (MEGA, FGFA):
        assert group_scores(real, results, protocol)["all"].by_class == pytest.approx(recall)
    steps = {name: np.mean(np.linspace(0, 1, 101) <= value) for name, value in recall.items()}
    assert evaluate(real, results).ap50_by_class == pytest.approx(steps)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "ap", "ap50"), [(0.2, 0.4, 1.0), (0.08, 0.8, 1.0), (0.4, 0.0, 0.0)])
def test_jitter_on_the_real_boxes(real: CocoVideo, shift: float, ap: float, ap50: float) -> None:
    """Boxes moved by a share s of their width overlap by (1 - s) / (1 + s): 0.667, 0.852 and 0.429."""

    def alone(frame: Frame) -> bool:  # a moved box must not find a neighbour of its class
        return len({a.category_id for a in frame.annotations}) == len(frame.annotations)

    videos = [Video(v.id, v.name, [frame for frame in v.frames if alone(frame)]) for v in real.videos[::4]]
    data = CocoVideo(real.categories, videos, real.image_root)
    results = [
        found(frame.image_id, moved(a.box, shift * (a.box[2] - a.box[0])), 0.5, a.category_id)
        for frame in data.frames
        for a in frame.annotations
    ]
    scores = evaluate(data, results)
    assert (scores.ap, scores.ap50) == pytest.approx((ap, ap50)) and scores.objects > 1500
    assert vid_scores(data, results).ap50_vid == pytest.approx(ap50, abs=0.01)


def test_ages_of_frames() -> None:
    assert frames_since_flush([True, False, False, True, False]) == [0, 1, 2, 0, 1]
    assert frames_since_flush([False, False]) == [0, 1], "a stream begins with one, whatever it says"
    assert frames_since_flush([]) == []


def test_precision_against_age() -> None:
    """Found on the first five frames after a flush, then on every second one."""
    frames = [Frame(i, "", 640, 480, i, [Annotation(1, BOX)]) for i in range(200)]
    data = CocoVideo([(1, "a"), (2, "b")], [Video(1, "", frames[:120]), Video(2, "", frames[120:])], Path())
    ages = frames_since_flush([True] + [False] * 119) + frames_since_flush([True] + [False] * 79)
    frames[119].labelled = False
    results = [found(i, BOX) for i, age in enumerate(ages) if age < 5 or age % 2 == 0] + [found(999, BOX)]
    table = ap50_since_flush(data, results, dict(enumerate(ages)))
    assert [(part.first, part.last, part.images, part.objects) for part in table] == [
        (0, 0, 2, 2),
        (1, 3, 6, 6),
        (4, 15, 24, 24),
        (16, 63, 96, 96),
        (64, None, 71, 71),
    ]
    recall = [1, 1, 6 / 12, 0.5, 36 / 71]
    assert [part.ap50 for part in table] == pytest.approx([np.mean(np.linspace(0, 1, 101) <= r) for r in recall])
    only = ap50_since_flush(data, results, dict(enumerate(ages)), edges=(0, 500))
    assert only[0].images == 199 and only[0].ap50 == evaluate(data, results).ap50
    assert only[1].images == 0 and math.isnan(only[1].ap50)
