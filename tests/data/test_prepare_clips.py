"""datasets/prepare_clips.py: choice of labelled videos; decoding is tested with tools/eval_net.py."""

import contextlib
import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running import script_main

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.streams import VideoStreams
from eventful_det.data.video.writer import VideoWriter


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
    """What the script does and prints, without the start of another process."""
    main = script_main("prepare_clips.py")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(map(str, args)))
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


def test_chosen_videos_keep_their_labels(source: Path, tmp_path: Path) -> None:
    done = run(source, "--output", tmp_path / "out", "--videos", "dogs", "--exhaustive", "dogs:dog", "--max-frames", 2)
    assert done.returncode == 0, done.stderr
    data = load_coco_video(tmp_path / "out/annotations/val.json")
    assert [video.name for video in data.videos] == ["dogs"] and data.image_root == tmp_path
    assert [frame.exhaustive for frame in data.frames] == [frozenset([2])] * 2
    assert all(len(frame.annotations) == 1 for frame in data.frames)


def test_video_files_in_place_and_extracted(tmp_path: Path) -> None:
    """Video files become a data set; labelled, they may be decoded for training."""
    with VideoWriter(tmp_path / "my clip.mp4", quality=5) as writer:
        for i in range(4):
            writer.write(np.full((64, 96, 3), 50 * i, np.uint8))
    done = run(tmp_path / "my clip.mp4", "--in-place", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    data = load_coco_video(tmp_path / "out/annotations/val.json")
    assert [(f.frame_id, f.width, f.height, f.labelled) for f in data.frames] == [(i, 96, 64, False) for i in range(4)]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["annotations"], "nothing was decoded into files"
    data.videos[0].frames[2].annotations.append(Annotation(9, (1, 1, 9, 9), id=1))
    data.save(tmp_path / "labelled.json")
    done = run(tmp_path / "labelled.json", "--extract", "--output", tmp_path / "pictures", "--max-frames", 3)
    assert done.returncode == 0, done.stderr
    pictures = load_coco_video(tmp_path / "pictures/annotations/val.json")
    assert [f.file_name for f in pictures.frames] == [f"my clip/00000{i}.jpg" for i in range(3)]
    assert pictures.videos[0].frames[2].annotations[0].category_id == 9
    for a, b in zip(VideoStreams(data), VideoStreams(pictures), strict=False):
        assert a[0].image is not None and b[0].image is not None
        assert np.abs(a[0].image.astype(int) - b[0].image).max() <= 3


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
