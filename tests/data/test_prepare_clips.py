"""datasets/prepare_clips.py: choice of labelled videos; decoding is tested with tools/eval_net.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video

SCRIPT = Path(__file__).parents[2] / "datasets/prepare_clips.py"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    videos = [
        Video(
            v, name, [Frame(10 * v + i, f"{name}/{i}.jpg", 64, 64, i, [Annotation(v, (1, 1, 9, 9))]) for i in range(3)]
        )
        for v, name in ((1, "cats"), (2, "dogs"))
    ]
    data = CocoVideo([(1, "cat"), (2, "dog")], videos, tmp_path)
    data.renumber()
    data.save(tmp_path / "all.json")
    return tmp_path / "all.json"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def test_chosen_videos_keep_their_labels(source: Path, tmp_path: Path) -> None:
    done = run(source, "--output", tmp_path / "out", "--videos", "dogs", "--exhaustive", "dogs:dog", "--max-frames", 2)
    assert done.returncode == 0, done.stderr
    data = load_coco_video(tmp_path / "out/annotations/val.json")
    assert [video.name for video in data.videos] == ["dogs"] and data.image_root == tmp_path
    assert [frame.exhaustive for frame in data.frames] == [frozenset([2])] * 2
    assert all(len(frame.annotations) == 1 for frame in data.frames)


def test_a_part_of_each_video(source: Path, tmp_path: Path) -> None:
    assert run(source, "--output", tmp_path / "out", "--start", "dogs:2", "--max-frames", 2).returncode == 0
    data = load_coco_video(tmp_path / "out/annotations/val.json")
    assert [[frame.frame_id for frame in video.frames] for video in data.videos] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "cows:1"], "expected NAME:FRAME, with NAME one of cats, dogs"),
        (["--start", "cats:x"], "expected NAME:FRAME"),
        (["--start", "cats:3"], "cats has no frame in the chosen range"),
        (["--videos", "cows"], "has no video cows; it has cats, dogs"),
        (["--exhaustive", "cats:cow"], "expected NAME:CLASS"),
        (["--videos", "dogs", "--exhaustive", "cats:cat"], "no such video is taken"),
    ],
)
def test_errors_are_one_line(source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = run(source, "--output", tmp_path / "out", *options)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out/annotations").exists()
