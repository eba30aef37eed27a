"""runtime/rescoring.py: steadier scores, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.runtime.rescoring import Objects, Rescorer, Rescoring, rescore
from eventful_det.runtime.session import StreamResult

COST = FrameCost({"backbone": 1}, {"backbone": 1}, 1, 1, False)


def found(*objects: tuple[float, float, int]) -> Detections:
    """Boxes of 20 x 20 pixels: x, score, label."""
    x, scores, labels = torch.tensor(objects, dtype=torch.float64).reshape(-1, 3).unbind(1)
    y = torch.zeros_like(x)
    return Detections(torch.stack([x, y, x + 20, y + 20], 1), scores, labels.long())


def scores_over(frames: list[Detections], options: Rescoring | None = None) -> list[list[float]]:
    objects: Objects | None = None
    seen = []
    for frame in frames:
        scores, objects = rescore(frame, objects, options or Rescoring())
        seen.append(scores.tolist())
    return seen


def test_a_blink_hardly_shows() -> None:
    scores = scores_over([found((0, 0.8, 1)), found((2, 0.1, 1)), found((4, 0.8, 1))])
    assert [one for (one,) in scores] == pytest.approx([0.8, 0.66, 0.73])


def test_a_frame_without_the_object_counts_as_zero_until_it_is_forgotten() -> None:
    there, gone = found((0, 0.8, 1)), found()
    back = [scores_over([there, *[gone] * missed, there])[-1][0] for missed in (0, 1, 3, 4)]
    assert back == pytest.approx([0.8, (0.64 + 0.8) / 2, (0.8**4 + 0.8) / 2, 0.8])


def test_classes_and_places_are_kept_apart() -> None:
    """A dog that is taken for a monkey on one frame stays a dog first."""
    frames = [found((0, 0.6, 1), (200, 0.9, 1)), found((0, 0.7, 2), (0, 0.3, 1), (200, 0.9, 1))]
    assert scores_over(frames)[1] == pytest.approx([0.7, 0.54, 0.9])
    assert scores_over([found((0, 0.2, 1)), found((11, 0.9, 1))])[1] == [0.9]  # too far to be the same


def test_each_object_is_matched_once() -> None:
    (_, scores) = scores_over([found((0, 0.2, 1)), found((1, 0.9, 1), (4, 0.9, 1))])
    assert scores == pytest.approx([0.55, 0.9])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.floats(0.05, 1), st.integers(0, 2)), max_size=6),
        min_size=1,
        max_size=8,
    ),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.integers(0, 4),
)
def test_invariants(video: list[list[tuple[float, float, int]]], rise: float, fall: float, memory: int) -> None:
    options, objects = Rescoring(rise, fall, memory), None
    for frame in video:
        detections = found(*frame)
        before = detections.clone()
        scores, objects = rescore(detections, objects, options)
        assert len(scores) == len(frame) and torch.equal(detections.scores, before.scores)
        assert all(0 <= score <= 1 for score in scores.tolist())
        assert len(objects.boxes) <= 6 * (memory + 1), "what is remembered is bounded"
    repeated = scores_over([found((0, 0.5, 1), (100, 0.25, 0))] * 4, options)
    assert all(scores == [0.5, 0.25] for scores in repeated)
    if rise == fall == 1:
        assert scores.tolist() == [score for _, score, _ in video[-1]]


def result(detections: Detections, index: int, side: int = 9) -> StreamResult:
    image = np.zeros((side, side, 3), np.uint8)
    return StreamResult(
        detections=detections,
        names=("a", "b", "c"),
        frame_index=index,
        timestamp=None,
        cost=COST,
        work=torch.ones(1, 1),
        token_size=(16, 16),
        image=image,
    )


def test_a_rescorer_gives_the_best_first_and_leaves_the_rest() -> None:
    rescorer = Rescorer()
    first = result(found((0, 0.9, 1), (50, 0.6, 2)), 0)
    assert torch.equal(rescorer(first).detections.scores, first.detections.scores)
    second = result(found((50, 0.7, 2), (0, 0.1, 1)), 1)
    after = rescorer(second)
    assert after.detections.labels.tolist() == [1, 2] and after.detections.tracks is None
    assert after.detections.scores.tolist() == pytest.approx([0.74, 0.65])
    assert after.detections.boxes.tolist() == second.detections.boxes.flip(0).tolist()
    assert second.detections.scores.tolist() == [0.7, 0.1], "the detector's own scores are left alone"
    assert after.image is second.image
    resized = rescorer(result(found((0, 0.2, 1)), 2, side=8))
    assert resized.detections.scores.tolist() == [0.2], "another size is another video"


def test_held_frames_count_like_others_and_a_flush_begins_anew() -> None:
    rescorer = Rescorer()
    rescorer(result(found((0, 0.8, 1)), 0))
    low = rescorer(result(found((0, 0.3, 1)), 1))
    assert low.detections.scores.tolist() == pytest.approx([0.7])
    held = dataclasses.replace(result(found((0, 0.3, 1)), 2), held=True)
    assert rescorer(held).detections.scores.tolist() == pytest.approx([0.62])
    cut = dataclasses.replace(result(found((0, 0.2, 1)), 3), cost=dataclasses.replace(COST, flush=True))
    assert rescorer(cut).detections.scores.tolist() == [0.2]


@pytest.mark.parametrize("options", [{"rise": 0.0}, {"fall": 1.5}, {"memory": -1}, {"overlap": 0.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="rescoring: need"):
        Rescoring(**options)  # type: ignore[arg-type]
