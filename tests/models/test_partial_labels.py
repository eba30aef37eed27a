"""A class that is not exhaustively labelled gives no negative loss."""

import pytest
import torch

from eventful_det.detectors.vitdet.boxes import area_of, set_aside
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.detectors.vitdet.roi_heads import _merge_possible

SIZE = 64


def target(exhaustive: list[list[bool]], areas: list[list[float]]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "areas": torch.tensor(areas),
        "exhaustive": torch.tensor(exhaustive),
    }


def test_possible_classes_cost_nothing_on_background() -> None:
    logits = torch.tensor([[4.0, -1.0, 1.0], [0.5, 3.0, 0.0]], requires_grad=True)  # two classes and background
    label = torch.tensor([2, 1])
    merged = _merge_possible(logits, label, torch.tensor([[True, False]]))
    probability = logits.softmax(1)
    assert torch.allclose(merged.softmax(1)[0, 2], probability[0, 0] + probability[0, 2])
    assert torch.equal(merged[1], logits[1])
    torch.nn.functional.cross_entropy(merged, label).backward()
    gradient = logits.grad
    assert gradient is not None and gradient[0, 0] < 0 < gradient[0, 1]


def test_all_classes_labelled_equals_no_statement(tiny_detector: Detector) -> None:
    tiny_detector.train()
    classes = len(tiny_detector.names)
    images = torch.rand(1, 3, SIZE, SIZE)
    full = target([[True] * classes], [[0, 0, SIZE, SIZE]])
    silent = {key: full[key] for key in ("boxes", "labels")}
    losses = []
    for targets in (full, silent):
        torch.manual_seed(0)
        losses.append(tiny_detector(images, [targets]))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_an_image_searched_for_nothing_teaches_no_background(tiny_detector: Detector) -> None:
    tiny_detector.train()
    classes = len(tiny_detector.names)
    losses = tiny_detector(torch.rand(1, 3, SIZE, SIZE), [target([[False] * classes], [[0, 0, SIZE, SIZE]])])
    assert losses["loss_cls"].item() < 1e-6


def test_boxes_belong_to_the_picture_under_their_centre() -> None:
    areas = torch.tensor([[0.0, 0, 10, 20], [10, 0, 20, 20]])
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 4, 18, 18], [12, 0, 30, 9], [-9, -9, -1, -1]])
    assert area_of(boxes, areas).tolist() == [0, 1, 0, 0]


def test_background_in_a_region_to_ignore_counts_neither_way() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 0, 18, 10], [20, 0, 30, 10], [0, 0, 9, 10]])
    label = torch.tensor([0, 0, 0, 1])
    regions = torch.tensor([[0.0, 0, 12, 12]])
    assert set_aside(label, boxes, regions).tolist() == [-1, 0, 0, 1]
    assert set_aside(label, boxes, torch.zeros(0, 4)).tolist() == label.tolist()


def test_losses_follow_scores_and_regions_to_ignore(tiny_detector: Detector) -> None:
    tiny_detector.train()
    image = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))

    def losses(**more: torch.Tensor) -> dict[str, float]:
        torch.manual_seed(1)
        target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1]), **more}
        return {name: loss.item() for name, loss in tiny_detector(image, [target]).items()}

    plain = losses()
    none = torch.zeros(0, 4)
    assert losses(scores=torch.ones(1), ignore=none) == pytest.approx(plain)
    assert losses(scores=torch.zeros(1), ignore=none)["loss_box_reg"] == 0 < plain["loss_box_reg"]
    everywhere = losses(scores=torch.zeros(1), ignore=torch.tensor([[-100.0, -100, 300, 300]]))
    assert everywhere["loss_cls"] == 0 and everywhere["loss_rpn_cls"] == 0
