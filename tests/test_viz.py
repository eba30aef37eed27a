"""What is drawn is where it should be, for frames of all shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.gating.selector import (
    DEFAULT,
    EVERYTHING,
    Budget,
    Gmacs,
    RandomK,
    Selector,
    Threshold,
    TopFraction,
    TopK,
)
from eventful_det.runtime.session import StreamResult
from eventful_det.viz import (
    Caption,
    annotate,
    budget_text,
    class_colour,
    cost_row,
    draw_detections,
    draw_history,
    draw_latency,
    draw_work,
    plot_cost,
)
from eventful_det.viz.panel import part_colours
from eventful_det.viz.text import write

NAMES = ("circle", "square")
PARTS = ("backbone", "pyramid", "rpn", "roi")


def cost(share: float = 0.5, **changes: Any) -> FrameCost:
    dense = dict(zip(PARTS, (4_000_000_000, 10**9, 10**9, 2 * 10**9), strict=True))
    macs = {part: int(share * value) for part, value in dense.items()}
    values = {"recomputed": 12, "tokens": 24, "flush": False, "seconds": {"backbone": 0.03, "other": 0.01}, **changes}
    return FrameCost(macs, dense, **values)


def result(height: int, width: int, **changes: Any) -> StreamResult:
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.5, 0.5, 2.0, 2.0]]) * torch.tensor([width, height, width, height])
    values: dict[str, Any] = {
        "detections": Detections(boxes, torch.tensor([0.9, 0.6]), torch.tensor([0, 1])),
        "names": NAMES,
        "frame_index": 3,
        "timestamp": 0.12,
        "cost": cost(),
        "work": torch.eye(4, 6),
        "token_size": (height / 4, width / 6),
        "image": np.full((height, width, 3), 90, np.uint8),
    }
    return StreamResult(**{**values, **changes})


def count(image: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> int:
    return int((image == colour).all(axis=2).sum())


def test_class_colours_are_stable_and_apart() -> None:
    colours = np.array([class_colour(label) for label in range(10)], np.int16)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 999 * np.eye(10)
    assert apart.min() > 30
    assert class_colour(3) == class_colour(3)


@pytest.mark.parametrize(("height", "width"), [(256, 384), (720, 1280), (24, 32)])
def test_boxes(height: int, width: int) -> None:
    frame = result(height, width)
    drawn = draw_detections(frame.image, frame.detections, NAMES, show=0.7)
    assert drawn.shape == frame.image.shape and np.all(frame.image == 90)
    assert count(drawn, class_colour(0)) > 0 and count(drawn, class_colour(1)) == 0
    rows, cols = np.nonzero((drawn != 90).any(axis=2))
    assert cols.min() <= 0.1 * width + 1 and rows.max() >= 0.6 * height - 1
    both = draw_detections(frame.image, frame.detections, NAMES, show=0.5)
    assert count(both, class_colour(1)) > 0
    assert np.array_equal(draw_detections(frame.image, frame.detections, NAMES, show=1.1), frame.image)


def test_work_map_covers_its_tokens() -> None:
    image = np.full((90, 130, 3), 120, np.uint8)
    work = torch.zeros(3, 5)
    work[1, 2] = 1
    work[2, 4] = 0.5
    drawn = draw_work(image, work, (32.0, 30.0)).astype(int)  # the map reaches beyond the picture
    bright = drawn.sum(axis=2) > 240
    assert bright[32:64, 60:90].all() and not bright[:32].any() and not bright[:, :60].any()
    grey, half, full = drawn[10, 10], drawn[80, 125], drawn[50, 75]
    assert grey[0] == grey[1] == grey[2] and (grey < half).all() and (half[:2] < full[:2]).all()


def test_history_shows_shares_of_dense() -> None:
    canvas = np.zeros((148, 768, 3), np.uint8)
    draw_history(canvas, [cost(0.25)] * 50 + [cost(1.0)] * 50)
    left, right = canvas[:, 60:400], canvas[:, 410:]
    backbone = part_colours(PARTS)["backbone"]
    assert count(right, backbone) == pytest.approx(4 * count(left, backbone), rel=0.15)
    draw_history(canvas, [])
    draw_history(canvas, [cost(0.0, recomputed=0, seconds={})] * 500)


def test_latency_is_shown_against_dense() -> None:
    slow, fast = cost(seconds={"backbone": 0.08}), cost(seconds={"backbone": 0.02})
    canvas = np.zeros((140, 376, 3), np.uint8)
    draw_latency(canvas, [slow] * 50 + [fast] * 50, dense_seconds=0.1)
    bars = (canvas == (120, 176, 222)).all(axis=2)
    assert bars[:, :205].sum() == pytest.approx(4 * bars[:, 215:].sum(), rel=0.1)
    line = np.flatnonzero((canvas[:, 60:] == 236).any(axis=2).mean(axis=1) > 0.9)
    above = np.flatnonzero(bars.any(axis=1))[0]
    assert len(line) == 1 and line[0] < above  # dense is slower than either
    draw_latency(canvas, [cost(seconds={})] * 3)
    draw_latency(canvas, [])


def test_flushes_and_held_frames_are_marked() -> None:
    canvas = np.zeros((140, 376, 3), np.uint8)
    draw_history(canvas, [cost(flush=True), cost(), cost(0.0), cost(0.0)])
    red, grey = count(canvas, (240, 92, 84)), count(canvas, (112, 120, 132))
    assert red > 0 and grey == pytest.approx(2 * red, rel=0.5)


def read(drawn: Any, **changes: Any) -> bool:
    """Whether a picture of the frame with these changes is another one."""
    return not np.array_equal(drawn, annotate(result(180, 320, **changes), [cost()]))


@pytest.mark.parametrize("width", [100, 320, 640, 959, 960, 1584, 1920, 1921])
def test_annotate_every_width(width: int) -> None:
    live = {"stream": "rtsp://camera/" + 30 * "long-name-", "frame_age": 0.1, "dropped": 1234}
    for height, broad in ((180, 320), (320, 180)):
        frame = result(height, broad, **live)
        drawn = annotate(frame, [cost()] * 100, caption=Caption("threshold 2, at most 50%", 0.1), width=width)
        assert drawn.shape[1] <= max(width, 320) and drawn.shape[1] > 0.6 * width
        edge = np.concatenate([drawn[:, :5].reshape(-1, 3), drawn[:, -5:].reshape(-1, 3), drawn[-3:].reshape(-1, 3)])
        assert np.ptp(edge, axis=0).max() == 0  # nothing runs out of the picture
        assert count(drawn, class_colour(0)) > 0 and count(drawn, part_colours(PARTS)["roi"]) > 0


def test_header_tells_age_and_budget() -> None:
    plain = annotate(result(180, 320), [cost()])
    assert read(plain, stream="a.mp4") and read(plain, frame_index=4) and read(plain, timestamp=9.0)
    named = annotate(result(180, 320, stream="b/a.mp4"), [cost()])
    assert not read(named, stream="c/a.mp4")
    fresh, old, stale = (annotate(result(180, 320, frame_age=age), [cost()]) for age in (0.1, 1.0, 3.0))
    for drawn, colour in ((fresh, (64, 178, 112)), (old, (226, 158, 50)), (stale, (226, 76, 70))):
        assert count(drawn, colour) > 500 and count(plain, colour) == 0
    assert not np.array_equal(plain, annotate(result(180, 320), [cost()], caption=Caption("96 tokens")))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (None, "default, up to 35% of tokens"),
        (DEFAULT, "default, up to 35% of tokens"),
        (DEFAULT.within(96), "focus, threshold 2, 96 tokens"),
        (96, "96 tokens"),
        (0.25, "25% of tokens"),
        (Gmacs(40), "40GMACs"),
        (TopK(7), "largest errors, 7 tokens"),
        (TopFraction(0.5), "largest errors, 50% of tokens"),
        (RandomK(3), "random, 3 tokens"),
        (Threshold(2), "threshold 2"),
        (EVERYTHING, "largest errors"),
    ],
)
def test_budget_text(budget: Budget | Selector, text: str) -> None:
    assert budget_text(budget) == text


@pytest.mark.parametrize(("height", "width"), [(256, 384), (720, 1280), (1280, 720), (32, 640), (640, 32), (7, 5)])
def test_annotate_every_shape(height: int, width: int) -> None:
    frame = result(height, width)
    drawn = annotate(frame, [frame.cost] * 3)
    again = annotate(result(height, width, timestamp=None, held=True, cost=cost(0, seconds={})), [])
    assert drawn.dtype == np.uint8 and drawn.shape == again.shape
    assert max(drawn.shape) <= 1600
    assert count(drawn, part_colours(PARTS)["roi"]) > 0


def test_a_picture_in_place_of_the_frame_is_not_among_the_tokens() -> None:
    frame = result(180, 320)
    marked = np.full_like(frame.image, 255)
    plain, drawn = annotate(frame), annotate(frame, picture=marked)
    changed = (plain != drawn).any((0, 2))
    middle = drawn.shape[1] // 2
    assert changed[:middle].any() and not changed[middle:].any()


def test_annotate_has_one_size_per_aspect_ratio() -> None:
    assert annotate(result(180, 320)).shape == annotate(result(720, 1280)).shape


def test_plot(tmp_path: Path) -> None:
    rows = [cost_row(cost(1.0, flush=True))] + [cost_row(cost(0.3))] * 9
    assert rows[0]["gmacs_total"] == rows[0]["dense_total"] == 8.0 and rows[0]["ms_total"] == pytest.approx(40)
    assert rows[0]["flush"] == 1 and rows[1]["recomputed"] == 12
    plot_cost({key: np.array([row[key] for row in rows]) for key in rows[0]}, tmp_path / "cost.png")
    picture = cv2.imread(str(tmp_path / "cost.png"))
    assert picture is not None and picture.shape[1] >= 1000
    plot_cost({key: np.array([value]) for key, value in rows[0].items()}, tmp_path / "one.png")


def test_the_plot_says_the_median_of_frames_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    row = cost_row(cost(0.3))
    rows = {key: np.array([value] * 3) for key, value in row.items()}
    plot_cost(rows | {"ms_total": np.array([90.0, 1, 1]), "held": np.array([0, 1, 1])}, "")
    (text,) = figures[0].axes[1].get_legend().get_texts()
    assert text.get_text().startswith("median 90 ms")


def test_text_of_any_characters_can_be_drawn() -> None:
    canvas = np.zeros((20, 90, 3), np.uint8)
    assert write(canvas, "a\udcff\0\n", 2, 15, 12) > 12 and canvas.any()
