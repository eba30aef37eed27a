"""Label pictures with a large detector, to train a small one for the same camera.

    python tools/pseudo_label.py source=day.mp4 every=25 teacher=yolox_s.onnx output=.data/yard
    python tools/pseudo_label.py source=pictures/ teacher=yolox_s.onnx views.tiles=3 views.tile_share=0.45
    python tools/pseudo_label.py source=annotations.json teacher=yolox_s.onnx   # real boxes stay, the rest is added
    python tools/train_net.py experiment=distil data.root=.data/yard

The teacher is any ONNX detector whose output is YOLOX's, or boxes, scores and labels. It looks at the whole picture,
its mirror image and overlapping tiles; what the views agree on becomes a label with a score, what they do not agree on
a region that training ignores. The same command goes on where a killed run was. docs/training.md tells more.

Writes annotations/train.json (COCO-video with scores), answers.jsonl and results.json to `output`; of videos also the
frames.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from common import Texts, as_list, at_least_one, command, progress_bar, say, show_table, warn, write_results

from eventful_det.data.classes import COCO_NAMES, COCO_TO_VID
from eventful_det.data.coco_video import CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.labelling.teacher import Answers, Teacher, TeacherInput, Views, annotate, look
from eventful_det.data.video import IMAGE_SUFFIXES, open_source
from eventful_det.data.video.pictures import UnreadablePicture, read_image
from eventful_det.data.video.transforms import Image
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.errors import UserError
from eventful_det.options import Count
from eventful_det.outputs import owned

QUALITY = 95  # of the JPEG frames


@dataclass(frozen=True)
class Options:
    """What may be asked of the labeller; configs/pseudo_label.yaml explains it."""

    positional: ClassVar = ("source",)

    source: Texts | None
    teacher: str | None
    output: str
    weights: str | None
    every: Count
    max_frames: Count | None
    classes: Literal["coco"] | tuple[str, ...]
    names: dict[str, str] | None
    only: Texts | None
    doubtful: Texts
    views: Views
    input: TeacherInput
    threads: Count


def gather(config: Options, names: tuple[str, ...], output: Path) -> CocoVideo:
    """The pictures to label, with the boxes that people drew: a COCO-video file, or pictures and frames of videos."""
    sources = at_least_one(config.source, "source")
    if len(sources) == 1 and str(sources[0]).endswith(".json"):
        data = load_coco_video(sources[0])
        if files := [video.file_name for video in data.videos if video.file_name]:
            raise UserError(
                f"{sources[0]}: training needs pictures, not the video {files[0]}; "
                "decode it with datasets/prepare_clips.py --extract"
            )
        if unknown := {name for _, name in data.categories} - set(names):
            raise UserError(f"{sources[0]}: the detector has no class {', '.join(sorted(unknown))}; see weights=")
        return in_classes(data, names)
    videos: list[Video] = []
    for source in sources:
        number, name = len(videos) + 1, Path(str(source)).stem or "source"
        frames = []
        for index, (path, height, width) in enumerate(
            pictures(config, source, output / "frames" / f"{number:03d}_{name}")
        ):
            file = Path(os.path.relpath(path, output)).as_posix()
            frames.append(Frame(number * 1_000_000 + index, file, width, height, index, exhaustive=frozenset()))
        videos.append(Video(number, name, frames))
    return CocoVideo(list(enumerate(names, start=1)), videos, output)


def in_classes(data: CocoVideo, names: tuple[str, ...]) -> CocoVideo:
    """A data set whose categories are `names`; of classes that it does not have, nothing was searched for."""
    ids = {name: i for i, name in enumerate(names, start=1)}
    new = {category: ids[name] for category, name in data.categories}
    for frame in data.frames:
        searched = (set(new) if frame.exhaustive is None else frame.exhaustive) if frame.labelled else set()
        frame.exhaustive, frame.labelled = frozenset(new[c] for c in searched), True
        for annotation in frame.annotations:
            annotation.category_id = new[annotation.category_id]
    return CocoVideo(list(enumerate(names, start=1)), data.videos, data.image_root)


def pictures(config: Options, source: Any, folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Path, height and width of every n-th picture of a folder, or frame of a video, which is written to `folder`."""
    inside = f"{glob.escape(str(source))}/*" if Path(str(source)).is_dir() else str(source)
    paths = sorted(Path(path) for path in glob.glob(inside) if path.lower().endswith(IMAGE_SUFFIXES))
    if paths:
        for path in paths[:: config.every][: config.max_frames]:
            try:
                height, width = read_image(path).shape[:2]
            except UnreadablePicture as error:
                warn(f"{error}; left out")
            else:
                yield path, height, width
        return
    with open_source(source) as video:
        stop = None if config.max_frames is None else config.max_frames * config.every
        for index, frame in enumerate(islice(video, 0, stop, config.every)):
            path = folder / f"{index:06d}.jpg"
            if not path.is_file():
                write_picture(path, frame.image)
            yield path, frame.image.shape[0], frame.image.shape[1]


def write_picture(path: Path, image: Image) -> None:
    """Write a JPEG so that it is either there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.jpg")
    if not cv2.imwrite(str(part), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
        raise UserError(f"cannot write {part}; is the disk full?")
    os.replace(part, path)


class Answered:
    """The answers of the teacher so far, one line for each picture, in a file that survives a kill.

    Args:
        path: of the file.
        made_by: what the answers depend on.

    Raises:
        UserError: the file holds answers that depend on something else.
    """

    def __init__(self, path: Path, made_by: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        head, lines = json.dumps({"made_by": made_by}), path.read_text().splitlines() if path.is_file() else []
        if lines and lines[0] != head:
            raise UserError(f"{path} holds the answers of another teacher or other views; choose another output")
        self.by_file: dict[str, Answers] = {}
        whole = [head]
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            whole.append(line)
            boxes, scores = np.array(entry["boxes"], np.float32).reshape(-1, 4), np.array(entry["scores"], np.float32)
            self.by_file[entry["file"]] = Answers(boxes, scores, np.array(entry["labels"], np.int64))
        path.write_text("\n".join(whole) + "\n")
        self._file = path.open("a")

    def add(self, file: str, answers: Answers) -> None:
        """Remember what the teacher saw in a picture."""
        self.by_file[file] = answers
        entry = {"file": file, "boxes": answers.boxes.round(1).tolist(), "scores": answers.scores.round(3).tolist()}
        self._file.write(json.dumps(entry | {"labels": answers.labels.tolist()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def class_table(config: Options, names: tuple[str, ...]) -> tuple[np.ndarray, frozenset[int]]:
    """Our label for each class of the teacher, and our labels that it knows.

    -1 = none of ours; `len(names)` is added to those of classes that never make a label, only a region to ignore.
    """
    coco = config.classes == "coco"
    theirs = list(COCO_NAMES if coco else config.classes)
    named, doubted = config.names or {}, as_list(config.doubtful)
    renamed = (COCO_TO_VID if coco else {}) | named
    if unknown := (set(named) | set(doubted)) - set(theirs):
        raise UserError(f"names, doubtful: the teacher has no class {', '.join(sorted(unknown))}; see classes")
    ours = [renamed.get(name, name) for name in theirs]
    if config.only is not None:
        only = as_list(config.only)
        if unknown := set(only) - set(ours):
            raise UserError(f"only: the teacher has no class {', '.join(sorted(unknown))}; see classes and names")
        ours = [name if name in only else "" for name in ours]
    labels = np.array([names.index(name) if name in names else -1 for name in ours], np.int64)
    doubtful = np.array([name in doubted for name in theirs])
    known = frozenset(labels[(labels >= 0) & ~doubtful].tolist())
    if not known:
        raise UserError(f"no class is common to the teacher ({', '.join(theirs[:5])}, ...) and {', '.join(names)}")
    return np.where(doubtful & (labels >= 0), labels + len(names), labels), known


def ask(config: Options, data: CocoVideo, labels: np.ndarray, views: Views, output: Path) -> dict[str, Answers]:
    """What the teacher sees in every picture that it has not seen yet, by file name; unreadable ones are left out."""
    prepare = config.input
    teacher = Teacher(str(config.teacher), prepare, views.floor, config.threads)
    digest = hashlib.sha256(teacher.path.read_bytes()).hexdigest()
    settings = {"teacher": digest, "input": asdict(prepare), "views": asdict(views), "labels": labels.tolist()}
    answered = Answered(output / "answers.jsonl", json.loads(json.dumps(settings)))
    frames = list(data.frames)
    with progress_bar() as progress:
        for frame in progress.track(frames, description="labelling"):
            if frame.file_name in answered.by_file:
                continue
            try:
                image = read_image(str(data.image_path(frame)))
            except UnreadablePicture as error:
                warn(f"{error}; left out")
                continue
            answered.add(frame.file_name, look(teacher, image, views, labels))
    answered.close()
    return answered.by_file


def run(config: Options) -> None:
    """Label, then write the results."""
    missing = {"source=PICTURES_OR_VIDEO": config.source, "teacher=MODEL.onnx": config.teacher}
    if None in missing.values():
        raise UserError(f"give {' and '.join(option for option, value in missing.items() if value is None)}")
    with owned(Path(config.output)):
        label(config, Path(config.output))


def label(config: Options, output: Path) -> None:
    """Label, in a folder that nobody else writes to."""
    views = config.views
    names = load_detector(config.weights).names
    labels, known = class_table(config, names)
    data = gather(config, names, output)
    answers = ask(config, data, labels, views, output)
    ids = [category for category, _ in data.categories]
    counts: Counter[tuple[int, str]] = Counter()
    for video in data.videos:
        video.frames = [frame for frame in video.frames if frame.file_name in answers]
        for frame in video.frames:
            searched = frame.exhaustive or frozenset()
            frame.annotations = annotate(answers[frame.file_name], views, frame.annotations, ids, searched)
            frame.exhaustive = searched | {ids[i] for i in known}
            counts.update(
                (a.category_id, "ignored" if a.iscrowd else "pseudo" if a.generated else "real")
                for a in frame.annotations
            )
    if not any(video.frames for video in data.videos):
        raise UserError("none of the pictures could be read; nothing was labelled")
    data.renumber()
    path = output / "annotations" / "train.json"
    CocoVideo(data.categories, data.videos, data.image_root).save(path)
    table: list[tuple[str, ...]] = [("class", "real boxes", "labels", "ignored regions")]
    for category, name in data.categories:
        row = [counts[category, kind] for kind in ("real", "pseudo", "ignored")]
        if any(row):
            table.append((name, *map(str, row)))
    by_class = {
        kind: {name: counts[i, kind] for i, name in data.categories if counts[i, kind]}
        for kind in ("real", "pseudo", "ignored")
    }
    frames = sum(len(video.frames) for video in data.videos)
    write_results(output, {"command": command(), "pictures": frames, "annotations": str(path)} | by_class)
    show_table(table)
    say(f"{frames} pictures: {path}; next: eventful-det train experiment=distil data.root={output}")


if __name__ == "__main__":
    from command_line import start

    start("pseudo_label")
