"""tools/pseudo_label.py end to end: pictures and videos in, labels with scores out, and a training that takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import pseudo_label
from running import options_of, run
from teachers import generic_teacher, yolox_teacher

from eventful_det.data.classes import COCO_NAMES
from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.errors import UserError

TOOL = ["tools/pseudo_label.py", "classes=[person,car]", "views.tiles=1"]
TOOL_VIDEO = ["views.flip=false", "only=[car]"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yolox_teacher(tmp_path_factory.mktemp("teacher") / "yolox.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of 64x64 pixels, each with one blue cell further to the right, of falling brightness."""
    (tmp_path / "pictures").mkdir()
    for i, blue in enumerate((255, 160, 60)):
        image = np.zeros((64, 64, 3), np.uint8)
        image[8:16, 8 * i : 8 * i + 8, 0] = blue
        cv2.imwrite(str(tmp_path / "pictures" / f"{i}.png"), image)
    return tmp_path / "pictures"


def labels(output: Path) -> dict[str, list[Annotation]]:
    data = load_coco_video(output / "annotations" / "train.json")
    assert all(data.image_path(frame).is_file() for frame in data.frames)
    return {Path(frame.file_name).name: frame.annotations for frame in data.frames}


def test_a_folder_is_labelled_and_the_run_goes_on(folder: Path, teacher: Path, tmp_path: Path) -> None:
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:20])  # is left out
    output = tmp_path / "out"
    command = [*TOOL, f"source={folder}", f"teacher={teacher}", f"output={output}"]
    run(*command)
    found = labels(output)
    assert [(len(a), a[0].iscrowd) for _, a in sorted(found.items())] == [(1, False), (1, False), (1, True)]
    assert found["1.png"][0].box == pytest.approx((8, 8, 16, 16)) and found["1.png"][0].score == pytest.approx(
        0.63, abs=0.01
    )
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert results["pseudo"] == {"person": 2} and results["ignored"] == {"person": 1}
    searched = next(load_coco_video(output / "annotations" / "train.json").frames).exhaustive
    assert searched is not None and len(searched) == 2
    # killed while it wrote the last line: that picture is asked for again, the others are not
    lines = (output / "answers.jsonl").read_text().splitlines()
    edited = lines[1].replace('"scores": [1.0]', '"scores": [0.777]')
    assert edited != lines[1]
    (output / "answers.jsonl").write_text("\n".join([lines[0], edited, *lines[2:-1], lines[-1][:20]]))
    run(*command)
    again = labels(output)
    assert again["0.png"][0].score == pytest.approx(0.777) and again["2.png"] == found["2.png"]
    failed = run(*command, "views.keep=0.3", check=False)
    assert failed.returncode == 2 and "choose another output" in failed.stderr and failed.stderr.count("\n") == 1


def test_real_boxes_stay(folder: Path, teacher: Path, tmp_path: Path) -> None:
    frames = [Frame(i + 1, f"{i}.png", 64, 64, 0, exhaustive=frozenset()) for i in range(2)]
    frames[0].annotations = [Annotation(1, (0, 8, 9, 16))]
    frames[1].exhaustive = frozenset([2])
    data = CocoVideo([(1, "car"), (2, "person")], [Video(f.image_id, f.file_name, [f]) for f in frames], folder)
    data.renumber()
    data.save(tmp_path / "real.json")
    run(*TOOL, f"source={tmp_path / 'real.json'}", f"teacher={teacher}", f"output={tmp_path / 'out'}")
    found = labels(tmp_path / "out")
    assert [a.box for a in found["0.png"]] == [(0, 8, 9, 16)] and not found["0.png"][0].generated
    assert found["1.png"] == []  # people searched for persons there, and found none


@pytest.mark.slow
def test_a_video_is_labelled_and_trained_on(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "day.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(5):
        writer.write(np.full((64, 64, 3), 204, np.uint8))
    writer.release()
    teacher, output = generic_teacher(tmp_path / "teacher.onnx"), tmp_path / "out"
    run(*TOOL, f"source={tmp_path / 'day.avi'}", "every=2", *TOOL_VIDEO, f"teacher={teacher}", f"output={output}")
    found = labels(output)
    assert len(found) == 3 and all([a.box for a in boxes] == [(0, 0, 32, 32)] for boxes in found.values())
    small = [
        "augment.sizes=[[64,96]]",
        "train.batch=2",
        "train.workers=0",
        "train.steps=2",
        "probe=false",
        "device=cpu",
    ]
    run("tools/train_net.py", "experiment=distil", f"data.root={output}", f"output={tmp_path / 'run'}", *small)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("teacher=/nowhere.onnx", "no teacher /nowhere.onnx"), ("source=/nowhere.mp4", "/nowhere.mp4")],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path, teacher: Path, tmp_path: Path, wrong: str, said: str
) -> None:
    done = run(*TOOL, f"source={folder}", f"teacher={teacher}", f"output={tmp_path / 'out'}", wrong, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_classes_of_the_teacher_become_ours() -> None:
    ours = ("dog", "domestic_cat", "car", "fox")

    def table(*options: str) -> tuple[dict[str, int], frozenset[int]]:
        config = options_of("pseudo_label", "source=a", "teacher=b", *options)
        labels, known = pseudo_label.class_table(config, ours)
        names = COCO_NAMES if config.classes == "coco" else config.classes
        return {name: label for name, label in zip(names, labels.tolist(), strict=True) if label >= 0}, known

    assert table() == ({"dog": 0, "cat": 1, "car": 2}, {0, 1, 2})
    assert table("only=[car]") == ({"car": 2}, {2})
    doubted = table("names={truck: car}", "doubtful=[truck]")
    assert doubted == ({"dog": 0, "cat": 1, "car": 2, "truck": 2 + len(ours)}, {0, 1, 2})
    assert table("classes=[wolf, fox]", "names={wolf: dog}") == ({"wolf": 0, "fox": 3}, {0, 3})
    for option, said in (
        ("names={wolf: dog}", "the teacher has no class wolf"),
        ("only=[fox]", "the teacher has no class fox"),
        ("classes=[wolf,unicorn]", "no class is common"),
    ):
        with pytest.raises(UserError, match=said):
            table(option)
