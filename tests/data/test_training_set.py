"""The training set: class balance, mosaics, and what an image says about classes nobody looked for."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eventful_det.data.augmentation import Augmentation
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.training_set import TrainingSet, training_loader
from eventful_det.errors import UserError

CATEGORIES = [(1, "cat"), (2, "dog"), (3, "unicorn")]


@pytest.fixture
def data(tmp_path: Path) -> CocoVideo:
    """20 pictures: 18 with a cat, 2 with a dog; each searched for its own class only."""
    videos = []
    for i in range(20):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((64, 64, 3), 12 * i, np.uint8))
        category = 2 if i >= 18 else 1
        frame = Frame(i + 1, f"{i}.png", 64, 64, 0, [Annotation(category, (8, 8, 56, 56))])
        frame.exhaustive = frozenset([category])
        videos.append(Video(i + 1, str(i), [frame]))
    return CocoVideo(CATEGORIES, videos, tmp_path)


def test_exhaustive_classes_survive_the_file(data: CocoVideo, tmp_path: Path) -> None:
    data.renumber()
    data.save(tmp_path / "data.json")
    again = load_coco_video(tmp_path / "data.json")
    assert [frame.exhaustive for frame in again.frames] == [frame.exhaustive for frame in data.frames]


def test_every_frame_once_an_epoch_without_balancing(data: CocoVideo) -> None:
    samples = TrainingSet(data, Augmentation())
    assert sorted(samples.frame_of(n).image_id for n in range(20, 40)) == list(range(1, 21))


def test_rare_classes_are_shown_by_their_repeat_factor(data: CocoVideo) -> None:
    samples = TrainingSet(data, Augmentation(), repeat_threshold=0.9)  # cat: factor 1; dog: sqrt(0.9 / 0.1) = 3
    shown = Counter(samples.frame_of(n).annotations[0].category_id for n in range(20 * 24))
    assert shown[2] / shown[1] == pytest.approx(3 * 2 / 18, rel=0.02)


def test_emphasised_classes_are_shown_more_often(data: CocoVideo) -> None:
    samples = TrainingSet(data, Augmentation(), repeat_threshold=0.9, emphasis={"dog": 2, "cat": 0.5})
    shown = Counter(samples.frame_of(n).annotations[0].category_id for n in range(20 * 24))
    assert shown[2] / shown[1] == pytest.approx(4 * 3 * 2 / 18, rel=0.03)


def test_emphasis_on_an_unknown_class_is_said(data: CocoVideo) -> None:
    with pytest.raises(UserError, match="no class wolf; there are cat, dog, unicorn"):
        TrainingSet(data, Augmentation(), emphasis={"wolf": 2})


def test_classes_nobody_looked_for_are_told_apart(data: CocoVideo) -> None:
    samples = TrainingSet(data, Augmentation(((64, 64),), mosaic=1.0))
    for n in range(10):
        image, target = samples[n]
        assert image.shape == (3, 64, 64) and target["areas"].shape == (4, 4)
        for area, known in zip(target["areas"], target["exhaustive"], strict=True):
            x, y = (area[:2] + area[2:]) / 2
            inside = [
                int(label)
                for box, label in zip(target["boxes"], target["labels"], strict=True)
                if box[0] <= x < box[2] and box[1] <= y < box[3]
            ]
            assert known[2], "a class without any box is a negative everywhere"
            assert all(known[label] for label in inside) and not known[:2].all()


def test_unreadable_pictures_are_left_out_and_named(data: CocoVideo, caplog: pytest.LogCaptureFixture) -> None:
    samples = TrainingSet(data, Augmentation(((32, 32),)))
    bad, kept = samples.frame_of(3), samples.frame_of(4)
    (data.image_root / bad.file_name).write_bytes(b"")
    assert samples.frame_of(3).image_id != kept.image_id
    assert all(torch.equal(a, b) for a, b in zip(samples[3][0], samples[4][0], strict=True))
    assert caplog.text.count(bad.file_name) == 1
    for frame in data.frames:
        (data.image_root / frame.file_name).unlink()
    with pytest.raises(UserError, match="10 training samples in a row hold unreadable pictures"):
        samples[0]


def test_pictures_of_another_size_are_left_out_and_named(data: CocoVideo, caplog: pytest.LogCaptureFixture) -> None:
    """Resized, or turned by EXIF data, which tools that draw boxes often pass over: the boxes would lie elsewhere."""
    samples = TrainingSet(data, Augmentation(((32, 32),)))
    bad = samples.frame_of(3)
    cv2.imwrite(str(data.image_root / bad.file_name), np.zeros((32, 32, 3), np.uint8))
    assert torch.equal(samples[3][0], samples[4][0])
    assert f"{bad.file_name} is 32x32, but the data set says 64x64" in caplog.text


def test_batches_of_worker_processes_need_no_shared_memory(data: CocoVideo) -> None:
    """Containers have 64 MB of it; beyond that, writing to it ends in a bus error or never."""
    samples = TrainingSet(data, Augmentation(((32, 32),)))
    images, targets = next(iter(training_loader(samples, 2, workers=1)))
    assert not images.is_shared() and not any(tensor.is_shared() for target in targets for tensor in target.values())
    alone, _ = next(iter(training_loader(samples, 2)))
    assert torch.equal(images, alone)


def test_all_samples_of_a_batch_have_one_size(data: CocoVideo) -> None:
    sizes = ((32, 64), (64, 32), (48, 48))
    batches = iter(training_loader(TrainingSet(data, Augmentation(sizes)), 3))
    seen = {tuple(next(batches)[0].shape[-2:]) for _ in range(12)}
    assert seen == set(sizes)


def test_crowds_and_what_is_too_small_are_ignored_and_doubtful_labels_count_less(data: CocoVideo) -> None:
    frame = next(data.frames)
    frame.annotations = [
        Annotation(1, (0, 0, 32, 32), score=0.64),
        Annotation(1, (32, 32, 64, 64), iscrowd=True),
        Annotation(1, (60, 0, 63, 3)),
    ]
    alone = CocoVideo(data.categories, data.videos[:1], data.image_root)
    exact = Augmentation(((64, 64),), scale=(1.0, 1.0), flip=0.0, colour=0.0, min_side=8.0)
    _, target = TrainingSet(alone, exact)[0]
    assert target["boxes"].tolist() == [[0, 0, 32, 32]]
    assert target["scores"].tolist() == pytest.approx([0.8])  # the root
    assert target["ignore"].tolist() == [[32, 32, 64, 64], [60, 0, 63, 3]]


def test_scores_survive_the_file(data: CocoVideo, tmp_path: Path) -> None:
    next(data.frames).annotations[0].score = 0.25
    data.renumber()
    data.save(tmp_path / "data.json")
    again = load_coco_video(tmp_path / "data.json")
    assert [a.score for frame in again.frames for a in frame.annotations] == [0.25] + [1.0] * 19
