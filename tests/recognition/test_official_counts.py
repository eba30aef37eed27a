"""The official counts of ViViT-B on EPIC-Kitchens 100 and Kinetics-400, to the last operation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from eventful_det.recognition.config import RecogniserConfig, vivit_b_epic, vivit_b_k400
from eventful_det.recognition.data.segments import read_durations
from eventful_det.testing import official_vivit as official

EPIC, K400 = vivit_b_epic(), vivit_b_k400()
EPIC_TABLES = Path(__file__).parents[2] / ".." / "shared" / "data" / "epic"

# Recorded from the official code: operations of one step of one view.
STEPS = [
    (
        EPIC,
        50,
        {
            "accumulator": 7852032,
            "add": 7699200,
            "bias": 4147200,
            "gate": 37937808,
            "linear": 4246732800,
            "matmul": 739123200,
        },
    ),
    (
        EPIC,
        100,
        {
            "accumulator": 8312832,
            "add": 7699200,
            "bias": 8294400,
            "gate": 37937808,
            "linear": 8493465600,
            "matmul": 1478246400,
        },
    ),
    (
        EPIC,
        200,
        {
            "accumulator": 9234432,
            "add": 7699200,
            "bias": 16588800,
            "gate": 37937808,
            "linear": 16986931200,
            "matmul": 2956492800,
        },
    ),
    (EPIC, None, {"add": 7699200, "bias": 33260544, "linear": 34058797056, "matmul": 2963884032}),
    (
        K400,
        24,
        {
            "accumulator": 3852288,
            "add": 3782400,
            "bias": 1990656,
            "gate": 12850704,
            "linear": 2038431744,
            "matmul": 174292992,
        },
    ),
    (
        K400,
        48,
        {
            "accumulator": 4073472,
            "add": 3782400,
            "bias": 3981312,
            "gate": 12850704,
            "linear": 4076863488,
            "matmul": 348585984,
        },
    ),
    (
        K400,
        96,
        {
            "accumulator": 4515840,
            "add": 3782400,
            "bias": 7962624,
            "gate": 12850704,
            "linear": 8153726976,
            "matmul": 697171968,
        },
    ),
    (K400, None, {"add": 3782400, "bias": 16339968, "linear": 16732127232, "matmul": 715327488}),
]
CLIPS = {  # operations of 12 views of 16 steps, a flush at each view's first
    "epic": {
        None: 7122023849100, 30: 999083694540, 40: 1178740398540, 50: 1358397102540, 60: 1538053806540,
        70: 1717710510540, 80: 1897367214540, 100: 2256680622540, 120: 2615994030540, 140: 2975307438540,
        160: 3334620846540, 200: 4053247662540, 240: 4771874478540, 280: 5490501294540,
    },
    "k400": {None: 3359582406336, 24: 617754671616, 48: 1016443255296, 96: 1813820422656},
}  # fmt: skip


@pytest.mark.parametrize("config, k, expected", STEPS)
def test_a_step(config: RecogniserConfig, k: int | None, expected: dict[str, int]) -> None:
    counts = asdict(official.spatial_step(config, k))
    assert {kind: value for kind, value in counts.items() if value} == expected


@pytest.mark.parametrize(
    "config, ablation, k, matmul",
    [
        (EPIC, "tokenwise", 50, 2963884032),
        (EPIC, "qk", 50, 1851503616),
        (EPIC, "qk", 200, 2960188416),
        (K400, "tokenwise", 96, 715327488),
        (K400, "qk", 24, 444810240),
        (K400, "qk", 96, 706249728),
    ],
)
def test_ablations(config: RecogniserConfig, ablation: str, k: int, matmul: int) -> None:
    counts = official.spatial_step(config, k, ablation)  # type: ignore[arg-type]
    assert (counts.matmul, counts.accumulator) == (matmul, 0)
    assert counts.gate == 3 * 12 * 768 * (401 if config is EPIC else 197)


def test_temporal_model_and_head() -> None:
    assert asdict(official.temporal_window(EPIC)) == asdict(official.temporal_window(K400))
    window = official.temporal_window(EPIC)
    assert (window.linear, window.bias, window.matmul, window.add) == (481296384, 470016, 1775616, 117504)
    assert official.head(EPIC).total == 74593
    assert official.head(K400).total == 307600


@pytest.mark.parametrize("name", CLIPS)
def test_whole_clips(name: str) -> None:
    config = EPIC if name == "epic" else K400
    assert {k: official.clip_counts(config, k).total for k in CLIPS[name]} == CLIPS[name]


def test_shared_tubelets_by_hand() -> None:
    """A clip of 40 frames: views start at 0, 2, 4 and 8 (rounded from 2.67, 5.33), and hold 20 distinct tubelets."""
    flush, step = official.spatial_step(EPIC).total, official.spatial_step(EPIC, 50).total
    windows = 12 * (official.temporal_window(EPIC).total + official.head(EPIC).total)
    assert official.shared_counts(EPIC, [40], 50) == 3 * (flush + 19 * step) + windows
    # 200 frames: four views that do not touch, each flushed at its first tubelet
    assert official.shared_counts(EPIC, [200], 50) == official.clip_counts(EPIC, 50).total


@pytest.mark.skipif(not EPIC_TABLES.is_dir(), reason="needs the annotation tables of EPIC-Kitchens 100")
def test_shared_tubelets_on_the_durations_of_epic_kitchens() -> None:
    lengths = [round(30 * seconds) for seconds in read_durations(EPIC_TABLES / "EPIC_100_validation.csv")]
    totals = {k: round(official.shared_counts(EPIC, lengths, k) / 1e12, 3) for k in (None, 200, 100, 50)}
    assert totals == {None: 3.995, 200: 2.245, 100: 1.220, 50: 0.708}
