"""Detections of a video in the files of other programs, made from the lines of detections.jsonl.

``mot``
    A folder as in MOTChallenge: ``gt/gt.txt`` with ``frame,id,x,y,w,h,score,class,visibility`` (frames and pixels from
    1, id -1 = not followed), ``gt/labels.txt``, ``seqinfo.ini``. CVAT and TrackEval read it.
``cvat``
    "CVAT for video 1.1": a track for each object, interpolated nowhere. CVAT and FiftyOne read it.
``yolo``
    A folder with ``classes.txt`` and, as ultralytics writes them, ``labels/<video>_<frame>.txt`` from 1 with
    ``class cx cy w h score [track]`` in shares of the frame; empty where nothing was found.
``label_studio``
    A task of Label Studio with a prediction: a video rectangle for each object. Its configuration needs
    ``<Video name="video" value="$video"/>``, ``<VideoRectangle name="box" toName="video"/>`` and ``<Labels
    name="labels" toName="video">``.
``coco``
    A COCO results list, image ids from 1.

All hold every box with its score, but `cvat` and `label_studio`, which people look at and which have no scores: these
hold what is at least as sure as `VideoInfo.show`. A box that is not followed is a track of one frame. No more than a
frame is in memory; tracks are sorted in a temporary file.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from eventful_det.errors import printable
from eventful_det.files import JsonObject
from eventful_det.outputs import file_names

Lines = Iterator[JsonObject]


@dataclass(frozen=True)
class VideoInfo:
    """What the lines do not tell of a video.

    Attributes:
        source: its path or address.
        classes: names that the labels index.
        fps: frames per second.
        show: the least score of a box for programs without scores.
    """

    source: str
    classes: tuple[str, ...]
    fps: float
    show: float = 0.5

    @property
    def name(self) -> str:
        """Of the video, without folder and suffix, as a file may be called."""
        return file_names([Path(self.source).stem])[0]


class _Box(NamedTuple):
    """A row of the temporary table; coordinates in pixels, of a frame of `width` x `height`."""

    track: int
    label: int
    frame: int
    x1: float
    y1: float
    x2: float
    y2: float
    width: int
    height: int


def export_detections(lines: Path, kind: str, target: Path, info: VideoInfo) -> None:
    """Write the detections of a video as another program reads them.

    Args:
        lines: `detections.jsonl`, as `eventful-det detect` writes it.
        kind: one of `EXPORTS`.
        target: the file or folder, which must not be there yet.
        info: of the video.

    Raises:
        OSError: something cannot be written.
    """
    info = replace(info, classes=tuple(printable(name) for name in info.classes))  # a line each; XML takes no others
    try:
        with lines.open(encoding="utf-8") as file:
            EXPORTS[kind][1](map(json.loads, file), target, info)
    except sqlite3.Error as error:
        raise OSError(f"{error}, for temporary files") from error


def _write_mot(lines: Lines, folder: Path, info: VideoInfo) -> None:
    (folder / "gt").mkdir(parents=True)
    count, size = 0, {"width": 0, "height": 0}
    with (folder / "gt" / "gt.txt").open("w", encoding="utf-8") as file:
        for line in lines:
            count, size = line["frame_index"] + 1, line["size"]
            for found in line["detections"]:
                x1, y1, x2, y2 = found["box"]
                box = f"{x1 + 1:.2f},{y1 + 1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}"
                file.write(f"{count},{found.get('track_id', -1)},{box},{found['score']},{found['label'] + 1},1\n")
    _write_names(folder / "gt" / "labels.txt", info.classes)
    sequence = {"name": info.name, "imDir": "img1", "frameRate": f"{info.fps:g}", "seqLength": count}
    sequence |= {"imWidth": size["width"], "imHeight": size["height"], "imExt": ".jpg"}
    _write_names(folder / "seqinfo.ini", ["[Sequence]", *(f"{key}={value}" for key, value in sequence.items())])


def _write_yolo(lines: Lines, folder: Path, info: VideoInfo) -> None:
    (folder / "labels").mkdir(parents=True)
    _write_names(folder / "classes.txt", info.classes)
    for line in lines:
        rows = []
        width, height = line["size"]["width"], line["size"]["height"]
        for found in line["detections"]:
            x1, y1, x2, y2 = found["box"]
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            track = f" {found['track_id']}" if "track_id" in found else ""
            rows.append(f"{found['label']} {' '.join(f'{v:.6f}' for v in shares)} {found['score']:.4f}{track}")
        _write_names(folder / "labels" / f"{info.name}_{line['frame_index'] + 1}.txt", rows)


def _write_names(path: Path, names: Iterable[object]) -> None:
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _write_coco(lines: Lines, path: Path, _: VideoInfo) -> None:
    entries = (_coco_entry(line["frame_index"] + 1, found) for line in lines for found in line["detections"])
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        file.writelines((",\n" if n else "\n") + json.dumps(entry) for n, entry in enumerate(entries))
        file.write("\n]\n")


def _coco_entry(image: int, found: JsonObject) -> JsonObject:
    x1, y1, x2, y2 = found["box"]
    entry = {"image_id": image, "category_id": found["label"] + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    track = {"track_id": found["track_id"]} if "track_id" in found else {}
    return {**entry, "score": found["score"], **track}


def _write_cvat(lines: Lines, path: Path, info: VideoInfo) -> None:
    with closing(_Tracks(lines, info.show)) as tracks, path.open("w", encoding="utf-8") as file:
        names = "".join(f"<label><name>{escape(name)}</name><attributes/></label>" for name in info.classes)
        file.write(
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task>'
            f"<name>{escape(info.name)}</name><size>{tracks.frames}</size><mode>interpolation</mode>"
            f"<start_frame>0</start_frame><stop_frame>{max(tracks.frames - 1, 0)}</stop_frame><frame_filter/>"
            f"<labels>{names}</labels><original_size><width>{tracks.width}</width>"
            f"<height>{tracks.height}</height></original_size></task></meta>\n"
        )
        for track, label, boxes in tracks:
            file.write(f'<track id="{track}" label={quoteattr(info.classes[label])} source="auto">\n')
            for box, last in boxes:
                file.write(_cvat_box(box, box.frame, outside=False))
                if last and box.frame + 1 < tracks.frames:
                    file.write(_cvat_box(box, box.frame + 1, outside=True))
            file.write("</track>\n")
        file.write("</annotations>\n")


def _cvat_box(box: _Box, frame: int, outside: bool) -> str:
    corners = f'xtl="{box.x1:.2f}" ytl="{box.y1:.2f}" xbr="{box.x2:.2f}" ybr="{box.y2:.2f}"'
    return f'<box frame="{frame}" outside="{int(outside)}" occluded="0" keyframe="1" {corners} z_order="0"/>\n'


def _write_label_studio(lines: Lines, path: Path, info: VideoInfo) -> None:
    with closing(_Tracks(lines, info.show)) as tracks, path.open("w", encoding="utf-8") as file:
        file.write(f'[{{"data": {json.dumps({"video": info.source})}, "predictions": [{{"result": [')
        about = {"framesCount": tracks.frames, "duration": round(tracks.frames / info.fps, 3)}
        for n, (track, label, boxes) in enumerate(tracks):
            region = {"id": f"track{track}_{label}", "type": "videorectangle", "from_name": "box", "to_name": "video"}
            value = about | {"labels": [info.classes[label]], "sequence": []}
            head, tail = json.dumps({**region, "value": value}).rsplit("[]", 1)
            file.write(f"{',' if n else ''}\n{head}[")
            for i, (box, last) in enumerate(boxes):
                file.write(("," if i else "") + json.dumps(_label_studio_box(box, last, info.fps)))
            file.write(f"]{tail}")
        file.write("\n]}]}]\n")


def _label_studio_box(box: _Box, last: bool, fps: float) -> JsonObject:
    """Corner and size in percent; a box that is not `enabled` is the last one before its object is out of sight."""
    x, width = (round(100 * v / box.width, 4) for v in (box.x1, box.x2 - box.x1))
    y, height = (round(100 * v / box.height, 4) for v in (box.y1, box.y2 - box.y1))
    place = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    return {"frame": box.frame + 1, "time": round(box.frame / fps, 4), "enabled": not last, **place}


class _Tracks:
    """Boxes by track, in the order of time; a track that changes its class has a part for each.

    Args:
        lines: of the video.
        show: the least score.
    """

    def __init__(self, lines: Lines, show: float) -> None:
        self.frames = self.width = self.height = 0
        self._sorted = sqlite3.connect("")  # a temporary file, once it is large
        run = self._sorted.execute
        run(f"CREATE TABLE boxes ({', '.join(_Box._fields)})")
        places = ", ".join("?" * len(_Box._fields))
        self._sorted.executemany(f"INSERT INTO boxes VALUES ({places})", self._rows(lines, show))
        # Boxes that are not followed get ids after those of all tracks.
        run("UPDATE boxes SET track = (SELECT max(0, max(track)) FROM boxes) - track WHERE track < 0")

    def _rows(self, lines: Lines, show: float) -> Iterator[_Box]:
        alone = itertools.count(-1, -1)
        for line in lines:
            self.frames = line["frame_index"] + 1
            self.width, self.height = line["size"]["width"], line["size"]["height"]
            for found in line["detections"]:
                if found["score"] >= show:
                    track = found.get("track_id", next(alone))
                    x1, y1, x2, y2 = found["box"]
                    yield _Box(track, found["label"], self.frames - 1, x1, y1, x2, y2, self.width, self.height)

    def __iter__(self) -> Iterator[tuple[int, int, Iterator[tuple[_Box, bool]]]]:
        """Track, label, and its boxes, each with whether the object is not there on the next frame."""
        rows = map(_Box._make, self._sorted.execute("SELECT * FROM boxes ORDER BY track, label, frame"))
        for (track, label), boxes in itertools.groupby(rows, lambda box: (box.track, box.label)):
            yield track, label, _with_ends(boxes)

    def close(self) -> None:
        """Remove what is temporary."""
        self._sorted.close()


def _with_ends(boxes: Iterator[_Box]) -> Iterator[tuple[_Box, bool]]:
    box = next(boxes)
    for following in boxes:
        yield box, following.frame > box.frame + 1
        box = following
    yield box, True


EXPORTS: dict[str, tuple[str, Callable[[Lines, Path, VideoInfo], None]]] = {
    "mot": ("detections.mot", _write_mot),
    "cvat": ("detections.cvat.xml", _write_cvat),
    "yolo": ("detections.yolo", _write_yolo),
    "label_studio": ("detections.label_studio.json", _write_label_studio),
    "coco": ("detections.coco.json", _write_coco),
}
"""By format: the name of its file or folder beside detections.jsonl, and what writes it."""
