"""Box arithmetic against hand-computed values and its own inverse."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from eventful_det.detectors.vitdet.boxes import cell_anchors, decode, encode, grid_anchors, match, sample

coordinate = st.floats(0, 500, allow_nan=False)
side = st.floats(1, 300, allow_nan=False)


def box(x: float, y: float, w: float, h: float) -> torch.Tensor:
    return torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)


xywh = st.tuples(coordinate, coordinate, side, side)


@given(xywh, xywh)
def test_decode_inverts_encode(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> None:
    a, b = box(*first), box(*second)
    if (b[0, 2:] - b[0, :2]).max() / (a[0, 2:] - a[0, :2]).min() > 60:  # beyond the clamp
        return
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(decode(encode(a, b, weights), a, weights), b, atol=1e-6, rtol=1e-6)


def test_growth_is_clamped() -> None:
    grown = decode(torch.tensor([[0.0, 0.0, 99.0, 99.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (1, 1, 1, 1))
    torch.testing.assert_close(grown[0, 2] - grown[0, 0], torch.tensor(1000.0))


def test_anchors_are_not_rounded_and_keep_their_area() -> None:
    cells = cell_anchors(32, (0.5, 1.0, 2.0))
    widths, heights = cells[:, 2] - cells[:, 0], cells[:, 3] - cells[:, 1]
    torch.testing.assert_close(widths * heights, torch.full((3,), 1024.0))
    torch.testing.assert_close(heights / widths, torch.tensor([0.5, 1.0, 2.0]))
    assert not torch.equal(cells, cells.round())


def test_grid_anchors_are_row_major() -> None:
    anchors = grid_anchors(torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), 2, 3, stride=4)
    assert anchors[1].tolist() == [3, -1, 5, 1]
    assert anchors[3].tolist() == [-1, 3, 1, 5]


def test_match_labels() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 110.0, 110.0]])
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 5.0], [50.0, 50.0, 60.0, 60.0], [104.0, 104.0, 114.0, 114.0]]
    )
    matched, label = match(truth, boxes, 0.3, 0.7, keep_best=True)
    assert label.tolist() == [1, -1, 0, 1]  # the last is the best there is for the second object
    assert matched[0] == 0
    assert matched[3] == 1
    assert match(truth, boxes, 0.3, 0.7, keep_best=False)[1].tolist() == [1, -1, 0, 0]
    assert match(truth[:0], boxes, 0.3, 0.7, keep_best=True)[1].tolist() == [0, 0, 0, 0]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40))
def test_sample_respects_counts(positives: int, negatives: int, count: int) -> None:
    label = torch.tensor([1] * positives + [0] * negatives + [-1] * 5)
    positive, negative = sample(label, count, 0.25)
    assert len(positive) == min(positives, count // 4)
    assert len(positive) + len(negative) <= count
    assert (label[positive] == 1).all()
    assert (label[negative] == 0).all()
