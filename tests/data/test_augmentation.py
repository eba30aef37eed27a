"""Augmentation: boxes follow the picture, mosaics are tiled without gap, flaws keep the shape."""

import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventful_det.data.augmentation import Augmentation

PLAIN = Augmentation(((64, 96),), scale=(0.7, 1.0), flip=0.5, colour=0.0)


def picture_with_a_square() -> tuple[np.ndarray, np.ndarray]:
    image = np.zeros((80, 80, 3), np.uint8)
    image[20:50, 30:60] = 255
    return image, np.array([[30, 20, 60, 50]], np.float32)


@given(seed=st.integers(0, 10_000), aspect=st.sampled_from([1.0, 1.5]))
def test_boxes_follow_the_picture(seed: int, aspect: float) -> None:
    image, boxes = picture_with_a_square()
    augment = dataclasses.replace(PLAIN, aspect=aspect)
    image, boxes, keep = augment(image, boxes, (64, 96), np.random.default_rng(seed))
    assert image.shape == (64, 96, 3) and keep.all()
    rows, columns = np.nonzero(image.min(axis=2) > 190)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(boxes[0] - found).max() < 2


@given(seed=st.integers(0, 10_000))
def test_boxes_follow_a_turned_ellipse(seed: int) -> None:
    box = np.array([[20, 30, 60, 50]], np.float32)
    image = np.zeros((80, 80, 3), np.uint8)
    cv2.ellipse(image, (39, 39), (19, 9), 0, 0, 360, (255, 255, 255), -1)
    augment = dataclasses.replace(PLAIN, scale=(1.0, 1.0), rotate=90.0)
    image, boxes, keep = augment(image, box, (80, 80), np.random.default_rng(seed))
    assert keep.all()
    rows, columns = np.nonzero(image.min(axis=2) > 190)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(boxes[0] - found).max() < 2


@given(seed=st.integers(0, 10_000))
def test_boxes_follow_a_quarter_turn(seed: int) -> None:
    image, boxes = picture_with_a_square()
    image, boxes = image[:, :70], np.array([[30, 20, 60, 50]], np.float32)
    augment = dataclasses.replace(PLAIN, scale=(1.0, 1.0), flip=0.0, turn=1.0)
    image, boxes, keep = augment(image, boxes, (70, 80), np.random.default_rng(seed))
    assert image.shape == (70, 80, 3) and keep.all()
    rows, columns = np.nonzero(image.min(axis=2) > 190)
    assert boxes[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert boxes[0].tolist() in ([20, 10, 50, 40], [30, 30, 60, 60])


def test_hue_turns_colours_and_leaves_grey() -> None:
    image = np.full((64, 96, 3), (200, 40, 40), np.uint8)
    image[:, :48] = 90
    augment = dataclasses.replace(PLAIN, scale=(1.0, 1.0), flip=0.0, hue=0.5)
    turned = [augment(image, np.zeros((0, 4), np.float32), (64, 96), np.random.default_rng(n))[0] for n in range(6)]
    assert all(np.abs(t[:, :48].astype(int) - 90).max() <= 1 for t in turned)
    assert len({tuple(t[0, -1]) for t in turned}) == 6 and all(t[0, -1].max() == 200 for t in turned)


@pytest.mark.parametrize("seed", range(8))
def test_flaws_keep_shape_and_rough_content(seed: int) -> None:
    image, boxes = picture_with_a_square()
    clean = dataclasses.replace(PLAIN, scale=(0.8, 0.8), flip=0.0)
    spoilt = dataclasses.replace(clean, degrade=1.0)
    a, _, _ = clean(image, boxes, (64, 96), np.random.default_rng(seed))
    b, _, _ = spoilt(image, boxes, (64, 96), np.random.default_rng(seed))
    assert a.shape == b.shape and b.dtype == np.uint8
    assert 0.5 < np.abs(a.astype(float) - b).mean() < 30


@given(seed=st.integers(0, 1000), height=st.integers(32, 500), width=st.integers(32, 500))
def test_cells_of_a_mosaic_tile_the_sample(seed: int, height: int, width: int) -> None:
    cells = dataclasses.replace(PLAIN, mosaic=1.0).cells((height, width), np.random.default_rng(seed))
    covered = np.zeros((height, width), int)
    for top, left, bottom, right in cells:
        covered[top:bottom, left:right] += 1
    assert len(cells) == 4 and (covered == 1).all()
    assert len(PLAIN.cells((height, width), np.random.default_rng(seed))) == 1
