"""Labelled clips: EPIC-Kitchens 100 from its official tables, and folders of videos, one per class."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eventful_det.data.video import VIDEO_SUFFIXES
from eventful_det.errors import UserError

_TIMES = ("start_timestamp", "stop_timestamp")
EPIC_HEADS = {"verb": "verb_class", "noun": "noun_class"}  # head -> column


@dataclass(frozen=True)
class Segment:
    """A part of a video in which something happens.

    Attributes:
        name: unique, for results.
        video: its file.
        start, stop: seconds since the start of the video; None = the whole video.
        labels: head -> class; empty where they are not known.
        participant: who is seen; empty if unknown.
    """

    name: str
    video: Path
    start: float | None = None
    stop: float | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    participant: str = ""


@dataclass(frozen=True)
class Segments:
    """A set of segments.

    Attributes:
        items: in the order of the tables; they may overlap.
        classes: names of each head's classes, where they are known.
        missing: videos that the tables name but that are not there.
        left_out: segments of missing videos.
    """

    items: tuple[Segment, ...]
    classes: dict[str, tuple[str, ...]]
    missing: tuple[str, ...] = ()
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.items)


def read_epic(
    table: str | os.PathLike[str],
    videos: str | os.PathLike[str],
    verbs: str | os.PathLike[str] | None = None,
    nouns: str | os.PathLike[str] | None = None,
) -> Segments:
    """Read a table of EPIC-Kitchens 100.

    Columns are found by name. Times are the timestamps; frame numbers are not used, because they hold for the original
    frame rate alone. A table without classes, such as that of the test set, gives segments without labels.

    Args:
        table: such as `EPIC_100_validation.csv`.
        videos: folder with `<video_id>.mp4` (or another suffix) anywhere below it.
        verbs, nouns: tables of class names, such as `EPIC_100_verb_classes.csv`.

    Raises:
        UserError: a file is missing or malformed, or no video is there.
    """
    names = {head: read_class_names(path) for head, path in (("verb", verbs), ("noun", nouns)) if path is not None}
    files = _videos_below(Path(videos))
    items, missing, left_out, seen = [], [], 0, set[str]()
    for place, row in _rows(table, ("narration_id", "video_id", *_TIMES)):
        name, video = row["narration_id"], row["video_id"]
        if name in seen:
            raise UserError(f"{place}: narration_id {name} is there twice")
        seen.add(name)
        start, stop = _span(row, place)
        labels = {
            head: _class(row[column], place, column, len(names[head]) if head in names else None)
            for head, column in EPIC_HEADS.items()
            if row.get(column)
        }
        if video not in files:
            left_out += 1
            if video not in missing:
                missing.append(video)
            continue
        participant = row.get("participant_id") or video.split("_")[0]
        items.append(Segment(name, files[video], start, stop, labels, participant))
    if not seen:
        raise UserError(f"{table} has no rows")
    if not items:
        raise UserError(f"none of the {len(missing)} videos of {table} is below {videos} (first: {missing[0]})")
    return Segments(tuple(items), names, tuple(missing), left_out)


def read_durations(table: str | os.PathLike[str]) -> list[float]:
    """Seconds that the segments of a table of EPIC-Kitchens 100 last; no video is needed.

    Raises:
        UserError: the file is missing, malformed or empty.
    """
    spans = [_span(row, place) for place, row in _rows(table, _TIMES)]
    if not spans:
        raise UserError(f"{table} has no rows")
    return [stop - start for start, stop in spans]


def read_folders(root: str | os.PathLike[str], classes: Sequence[str] | None = None, head: str = "action") -> Segments:
    """Read a folder of folders, one per class, each with videos; as Kinetics is often kept.

    Where the videos of a class lie in folders, these are taken for the participants.

    Args:
        root: of the folders.
        classes: names in the order of their labels; None = the folders by name.
        head: that the labels are of.

    Raises:
        UserError: there are no videos, or a folder is no class.
    """
    root = Path(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    names = tuple(path.name for path in folders) if classes is None else tuple(classes)
    if unknown := [path.name for path in folders if path.name not in names]:
        raise UserError(
            f"{root / unknown[0]} is no class of the recogniser; its classes are {', '.join(names[:5])}, ..."
        )
    items = [
        Segment(
            f"{folder.name}/{path.relative_to(folder)}",
            path,
            labels={head: names.index(folder.name)},
            participant="" if path.parent == folder else path.relative_to(folder).parts[0],
        )
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    ]
    if not items:
        raise UserError(f"no videos in {root}/<class>/; expected files that end in {', '.join(VIDEO_SUFFIXES)}")
    return Segments(tuple(items), {head: names})


def read_class_names(table: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of classes 0, 1, ... from a table with the columns `id` and `key`.

    Raises:
        UserError: the file is missing or malformed, or an id is.
    """
    names = {_class(row["id"], place, "id"): row["key"] for place, row in _rows(table, ("id", "key"))}
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{table}: ids are not 0, 1, 2, ...")
    return tuple(names[i] for i in range(len(names)))


def read_column(table: str | os.PathLike[str], column: str) -> tuple[str, ...]:
    """The values of a column, such as `verb` of `EPIC_100_tail_verbs.csv`, or `participant_id` of the unseen ones.

    Raises:
        UserError: the file is missing, or has no such column.
    """
    return tuple(row[column] for _, row in _rows(table, (column,)))


def _rows(table: str | os.PathLike[str], needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, each with its place for error messages."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            absent = [column for column in needed if column not in (reader.fieldnames or ())]
            if absent:
                raise UserError(f"{table} has no column {absent[0]}; it has {', '.join(reader.fieldnames or ['none'])}")
            for row in reader:
                if any(row.get(column) is None for column in needed):
                    raise UserError(f"{table} line {reader.line_num}: the row is cut short")
                yield f"{table} line {reader.line_num}", row
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is no table of comma-separated values ({error})") from None


def _span(row: Mapping[str, str], place: str) -> tuple[float, float]:
    start, stop = (_seconds(row[column], place, column) for column in _TIMES)
    if stop <= start:
        raise UserError(f"{place}: stop_timestamp {row['stop_timestamp']} is not after {row['start_timestamp']}")
    return start, stop


def _seconds(text: str, place: str, column: str) -> float:
    """Seconds of "hh:mm:ss.ss"."""
    try:
        hours, minutes, seconds = text.split(":")
        total = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        total = -1.0
    if not 0 <= total < 1e6:
        raise UserError(f"{place}: {column} is {text!r}; expected hours:minutes:seconds")
    return total


def _class(text: str, place: str, column: str, count: int | None = None) -> int:
    if not text.isdecimal() or (count is not None and int(text) >= count):
        raise UserError(f"{place}: {column} is {text!r}; expected a class from 0{f' to {count - 1}' if count else ''}")
    return int(text)


def _videos_below(folder: Path) -> dict[str, Path]:
    """Video files by name without suffix; the first in the order of paths where a name is there twice."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; it should hold the videos")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            found.setdefault(path.stem, path)
    return found
