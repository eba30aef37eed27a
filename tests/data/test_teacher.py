"""Teachers: what is read of an ONNX detector, what its views agree on, and what becomes a label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from teachers import generic_teacher, yolox_teacher

from eventful_det.data.coco_video import Annotation
from eventful_det.data.labelling.teacher import Answers, Teacher, TeacherInput, Views, annotate, look
from eventful_det.data.video.transforms import Image
from eventful_det.errors import UserError

WHOLE = Views(tiles=1, flip=False)
NAMES = np.array([0, 1])


def scene(height: int, width: int, *boxes: tuple[int, int, int, int], blue: int = 255) -> Image:
    """A black picture with blue boxes."""
    image = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2, 2] = blue
    return image


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(yolox_teacher(tmp_path_factory.mktemp("teacher") / "yolox.onnx"))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (64, 128), (192, 96)])
def test_boxes_come_back_in_pixels_of_the_picture(teacher: Teacher, height: int, width: int) -> None:
    cell = 8 * max(height, width) // 64
    box = (cell, 2 * cell, 2 * cell, 3 * cell)
    found = teacher(scene(height, width, box))
    assert found.scores.tolist() == pytest.approx([1.0], abs=0.02)
    assert found.boxes[0] == pytest.approx(np.array(box), abs=0.5)
    assert found.labels.tolist() == [0]


def test_channels_are_in_the_order_of_the_teacher(teacher: Teacher) -> None:
    red = scene(64, 64, (8, 8, 16, 16))[..., ::-1].copy()
    assert not len(teacher(red).scores)
    assert len(Teacher(teacher.path, TeacherInput(bgr=False))(red).scores) == 1


def test_boxes_scores_and_labels_are_read(tmp_path: Path) -> None:
    found = Teacher(generic_teacher(tmp_path / "generic.onnx"))(np.full((128, 128, 3), 204, np.uint8))
    assert found.boxes.tolist() == [[0, 0, 64, 64], [64, 64, 128, 128]]
    assert found.scores.tolist() == pytest.approx([0.8, 0.4])
    assert found.labels.tolist() == [1, 0]


def test_tiles_see_what_is_too_small_for_the_whole(teacher: Teacher) -> None:
    image = scene(128, 128, (8, 8, 16, 16))  # a quarter of a cell of the whole picture, a cell of a tile
    assert look(teacher, image, WHOLE, NAMES).scores.max(initial=0) < 0.3
    found = look(teacher, image, Views(tiles=2, tile_share=0.5, flip=False), NAMES)
    assert found.scores[0] == pytest.approx(1, abs=0.02)
    assert found.boxes[0] == pytest.approx(np.array([8, 8, 16, 16]), abs=0.5)


def test_what_the_edge_of_a_tile_cuts_is_not_asked_of_the_tile(teacher: Teacher) -> None:
    image = scene(128, 128, (48, 8, 80, 16))  # across the tiles' border at 64
    picky = Teacher(teacher.path, floor=0.6)  # sees nothing in the whole picture
    found = look(picky, image, Views(tiles=2, tile_share=0.5, flip=False), NAMES)
    assert sorted(found.boxes[:, 0].round().tolist()) == [48, 72]  # neither the cell up to 64 nor the one from there


def test_views_that_disagree_lower_the_score(teacher: Teacher) -> None:
    box, shifted = (0, 0, 8, 8), (4, 0, 12, 8)  # the second lies in two cells by half
    assert look(teacher, scene(64, 64, box), Views(tiles=1), NAMES).scores.max() == pytest.approx(1, abs=0.02)
    assert look(teacher, scene(64, 64, shifted), Views(tiles=1), NAMES).scores.max() < 0.6


def test_classes_without_a_name_are_left_out(teacher: Teacher) -> None:
    assert not len(look(teacher, scene(64, 64, (8, 8, 16, 16)), WHOLE, np.array([-1, 0])).scores)


def answers(*entries: tuple[tuple[float, ...], float, int]) -> Answers:
    boxes, scores, labels = zip(*entries, strict=True)
    return Answers(np.float32(boxes), np.float32(scores), np.array(labels))


def test_sure_answers_are_labels_and_doubtful_ones_regions_to_ignore() -> None:
    found = answers(((0, 0, 10, 10), 0.9, 0), ((20, 0, 30, 10), 0.2, 1), ((40, 0, 50, 10), 0.9, 2))
    labels = annotate(found, Views(), [], [5, 7], ())
    assert [(a.category_id, a.iscrowd) for a in labels] == [(5, False), (7, True), (5, True)]
    assert [a.score for a in labels] == pytest.approx([0.9, 0.2, 0.9]) and all(a.generated for a in labels)


def test_real_boxes_win() -> None:
    real = [Annotation(7, (0, 0, 10, 10))]
    found = answers(((0, 0, 10, 9), 0.9, 0), ((20, 0, 30, 10), 0.8, 1), ((40, 0, 50, 10), 0.7, 0))
    assert [a.box[0] for a in annotate(found, Views(), real, [5, 7], {7})] == [0, 40]


@pytest.mark.parametrize(("rival", "doubtful"), [(0.5, False), (0.8, True)])
def test_two_classes_on_one_object(rival: float, doubtful: bool) -> None:
    found = answers(((0, 0, 10, 10), 0.9, 0), ((0, 0, 10, 9), rival, 1))
    assert [(a.category_id, a.iscrowd) for a in annotate(found, Views(), [], [5, 7], ())] == [(5, doubtful)]


def test_what_cannot_be_a_teacher(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(UserError, match="no teacher"):
        Teacher(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(UserError, match="no ONNX model that can be run"):
        Teacher(broken)
    with pytest.raises(UserError, match="do not cover"):
        Views(tiles=3, tile_share=0.2)
    with pytest.raises(UserError, match="floor <= doubt <= keep"):
        Views(keep=0.1)
