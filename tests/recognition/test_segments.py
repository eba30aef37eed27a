"""Labelled clips, reading them by time, and accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config, small_recogniser

from eventful_det.data.video.writer import VideoWriter
from eventful_det.errors import UserError
from eventful_det.recognition.accuracy import Scored, accuracy, best_actions, per_class, tail, unseen, write_submission
from eventful_det.recognition.data.clip_reader import read_clip, read_clips, wanted_frames
from eventful_det.recognition.data.segments import Segment, read_class_names, read_column, read_epic, read_folders
from eventful_det.recognition.evaluation import Way, evaluate, evaluate_clips

EPIC = Path(__file__).parents[2] / ".." / "shared" / "data" / "epic"
HEADER = "noun_class,narration_id,video_id,start_timestamp,stop_timestamp,start_frame,verb_class,participant_id\n"


def video(path: Path, frames: int, fps: float) -> None:
    """Frame i is of grey level 4 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, quality=4) as writer:
        for i in range(frames):
            writer.write(np.full((32, 48, 3), min(255, 4 * i), np.uint8))


def table(path: Path, *rows: str) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def test_epic_is_read_by_column_name_and_timestamps(tmp_path: Path) -> None:
    video(tmp_path / "videos" / "P01" / "P01_11.MP4", 40, 20)
    rows = (
        "2,P01_11_0,P01_11,00:00:00.50,00:00:01.25,999,0,P01",
        "1,P01_11_1,P01_11,00:00:01.00,00:00:02.00,999,1,P01",  # overlaps
        "0,P02_01_0,P02_01,00:01:00.00,01:00:02.50,999,1,P02",
    )
    found = read_epic(table(tmp_path / "a.csv", *rows), tmp_path / "videos")
    assert [(s.name, s.start, s.stop) for s in found.items] == [("P01_11_0", 0.5, 1.25), ("P01_11_1", 1.0, 2.0)]
    assert found.items[0].labels == {"verb": 0, "noun": 2}
    assert (found.missing, found.left_out) == (("P02_01",), 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ("2,P01_11_0,P01_11,00:00:01.00,00:00:00.50,9,0,P01", "line 2: stop_timestamp .* is not after"),
        ("2,P01_11_0,P01_11,1.0,00:00:00.50,9,0,P01", "start_timestamp is '1.0'"),
        ("2,P01_11_0,P01_11,00:00:00.1,00:00:00.50,9,take,P01", "verb_class is 'take'"),
        ("2,P01_11_0,P01_11", "cut short"),
        ("0,P09_01_0,P09_01,00:00:00.1,00:00:00.50,9,0,P09", "none of the 1 videos"),
    ],
)
def test_faults_of_a_table_are_said_with_their_line(tmp_path: Path, row: str, message: str) -> None:
    video(tmp_path / "P01_11.mp4", 2, 10)
    with pytest.raises(UserError, match=message):
        read_epic(table(tmp_path / "a.csv", row), tmp_path)
    (tmp_path / "b.csv").write_text("id,name\n")
    with pytest.raises(UserError, match="no column narration_id"):
        read_epic(tmp_path / "b.csv", tmp_path)


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("run/b.mp4", "run/a.mp4", "jump/c.mp4"):
        video(tmp_path / name, 2, 10)
    (tmp_path / "run" / "notes.txt").write_text("no video")
    (tmp_path / "run" / "folder.mp4").mkdir()
    found = read_folders(tmp_path)
    assert found.classes == {"action": ("jump", "run")}
    assert [(s.name, s.labels["action"]) for s in found.items] == [
        ("jump/c.mp4", 0),
        ("run/a.mp4", 1),
        ("run/b.mp4", 1),
    ]
    assert read_folders(tmp_path, ("run", "walk", "jump")).items[0].labels == {"action": 2}
    with pytest.raises(UserError, match="is no class"):
        read_folders(tmp_path, ("run",))
    with pytest.raises(UserError, match="no videos in"):
        read_folders(tmp_path / "run")


@pytest.mark.parametrize("fps", [10.0, 20.0, 25.0])
def test_clips_show_the_same_moments_at_any_frame_rate(tmp_path: Path, fps: float) -> None:
    """Frame i shows the moment 1 + i / 10 s: the frame of the video at or before it, of grey level 4 x its number."""
    path, config = tmp_path / "a.mp4", small_config(temporal_views=1, frames=4, stride=1)
    video(path, int(2.2 * fps), fps)
    clip = read_clip(Segment("a", path, 1.0, 1.4), config)
    assert len(clip) == 4 and sorted(clip.frames) == [0, 1, 2, 3]
    expected = [4 * int((1 + i / 10) * fps + 1e-6) for i in range(4)]
    assert clip[range(4)].float().mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=2.5)
    assert clip.frames[0].shape == (3, 16, 24)  # just covers a view


def test_a_clip_that_ends_early_repeats_its_last_frame(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 5, 10)
    config = small_config(temporal_views=1, frames=6, stride=1)
    clip = read_clip(Segment("a", tmp_path / "a.mp4", 0.2, 0.8), config)
    assert clip[range(6)].float().mean((1, 2, 3)).tolist() == pytest.approx([8, 12, 16, 16, 16, 16], abs=2.5)
    with pytest.raises(UserError, match="shows nothing"):
        read_clip(Segment("a", tmp_path / "a.mp4", 50.0, 51.0), config)
    with pytest.raises(UserError, match="cannot read"):
        read_clip(Segment("a", tmp_path / "none.mp4"), config)


def test_only_frames_that_are_looked_at_are_kept() -> None:
    config = small_config(temporal_views=2, frames=6, stride=2)
    assert wanted_frames(100, config, shared=False) == [0, 2, 4, 6, 8, 10, 88, 90, 92, 94, 96, 98]
    assert wanted_frames(3, config, shared=True) == [0, 2]


def scored(
    name: str, verb: list[float], noun: list[float], labels: tuple[int, int], participant: str = "P01"
) -> Scored:
    segment = Segment(name, Path("x"), labels={"verb": labels[0], "noun": labels[1]}, participant=participant)
    return Scored(segment, {"verb": torch.tensor(verb), "noun": torch.tensor(noun)})


SCORES = [
    scored("a", [9, 1, 0, 0, 0, 0, 0], [0, 5, 0], (0, 1)),  # both right
    scored("b", [9, 1, 0, 0, 0, 0, 0], [0, 5, 4], (0, 2), "P02"),  # verb right, noun second
    scored("c", [6, 5, 4, 3, 2, 1, 0], [5, 0, 0], (6, 0), "P02"),  # verb seventh, noun right
    scored("d", [0, 0, 0, 0, 0, 0, 0], [1, 1, 1], (1, 0)),  # ties go to the first class
]


def test_accuracy_by_hand() -> None:
    found = accuracy(SCORES)
    assert (found["verb"].top1, found["verb"].top5) == (50, 75)
    assert (found["noun"].top1, found["noun"].top5) == (75, 100)
    assert (found["action"].top1, found["action"].top5, found["action"].count) == (25, 75, 4)
    other = accuracy(SCORES, unseen({"P02"}))
    assert (other["verb"].top1, other["noun"].top1, other["verb"].count) == (50, 50, 2)
    rare = accuracy(SCORES, tail(verbs={6}, nouns={2}))
    assert {head: of.count for head, of in rare.items()} == {"verb": 1, "noun": 1, "action": 2}
    assert per_class(SCORES)["verb"][0].top1 == 100 and per_class(SCORES)["verb"][6].top5 == 0


def test_pairs_are_ranked_by_the_product_of_probabilities() -> None:
    verbs, nouns = torch.randn(6), torch.randn(7)
    table = (verbs.softmax(0)[:, None] * nouns.softmax(0)).flatten()
    expected = [divmod(int(i), 7) for i in table.argsort(descending=True)[:10]]
    assert [(v, n) for v, n, _ in best_actions(verbs, nouns, 10)] == expected


def test_submission_of_the_challenge(tmp_path: Path) -> None:
    write_submission(tmp_path / "test.json", SCORES, pretraining=1, labels=3, data=3)
    content = json.loads((tmp_path / "test.json").read_text())
    assert (content["version"], content["challenge"], content["sls_tl"]) == ("0.2", "action_recognition", 3)
    assert content["results"]["a"]["verb"]["0"] == 9
    assert max(content["results"]["a"]["action"].items(), key=lambda item: item[1])[0] == "0,1"
    with pytest.raises(UserError, match="takes verb and noun"):
        write_submission(tmp_path / "no.json", [Scored(SCORES[0].segment, {"verb": torch.zeros(3)})])


def test_an_evaluation_reports_what_it_could_not_read(tmp_path: Path) -> None:
    video(tmp_path / "take" / "a.mp4", 12, 10)
    (tmp_path / "take" / "b.mp4").write_bytes(b"no video")
    recogniser = small_recogniser(temporal_views=1, spatial_views=1)
    segments = read_folders(tmp_path, ("take", "put"), head="verb")
    result = evaluate(recogniser, segments, Way("default"))
    assert result.accuracy["verb"].count == 1 and list(result.failed) == ["take/b.mp4"]
    assert 0 < result.gmacs < result.dense_gmacs


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    for name in "ab":
        video(tmp_path / "take" / f"{name}.mp4", 12, 10)
    segments = read_folders(tmp_path, ("take", "put"), head="verb")
    first, other = (small_recogniser(seed, temporal_views=1, spatial_views=1) for seed in (0, 1))
    ways, kept = [Way("default"), Way("held", hold=2)], tmp_path / "kept"
    evaluate_clips(first, read_clips(segments.items[:1], first.config), ways, kept=kept)
    runs = [evaluate_clips(of, read_clips(segments.items, of.config), ways, kept=kept) for of in (first, other)]
    for whole, later in zip(*runs, strict=True):  # nothing runs anew: the other recogniser was not asked
        assert (whole.times, whole.gmacs, whole.accuracy) == (later.times, later.gmacs, later.accuracy)
        for a, b in zip(whole.scored, later.scored, strict=True):
            assert a.scores["verb"].equal(b.scores["verb"])
    video(tmp_path / "take" / "a.mp4", 11, 10)
    changed = evaluate_clips(other, read_clips(segments.items, other.config), ways, kept=kept)
    assert changed[0].times[0] != runs[1][0].times[0] and changed[0].times[1] == runs[1][0].times[1]


@pytest.mark.skipif(not EPIC.is_dir(), reason="needs the annotation tables of EPIC-Kitchens 100")
def test_official_tables(tmp_path: Path) -> None:
    verbs = read_class_names(EPIC / "EPIC_100_verb_classes.csv")
    nouns = read_class_names(EPIC / "EPIC_100_noun_classes_v2.csv")
    assert (len(verbs), len(nouns), verbs[0], nouns[1]) == (97, 305, "take", "spoon")  # of which models know 300
    (tmp_path / "P01_11.mp4").touch()
    names = EPIC / "EPIC_100_verb_classes.csv", EPIC / "EPIC_100_noun_classes_v2.csv"
    found = read_epic(EPIC / "EPIC_100_validation.csv", tmp_path, *names)
    assert len(found) + found.left_out == 9668 and len(found.missing) == 137
    assert read_column(EPIC / "EPIC_100_unseen_participant_ids_validation.csv", "participant_id") == ("P18", "P32")
    assert "10" in read_column(EPIC / "EPIC_100_tail_verbs.csv", "verb")
