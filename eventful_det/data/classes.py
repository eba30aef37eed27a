"""Category tables: what a label means.

A category has an ``id`` (1-based, what models and COCO files use), a ``wnid`` (the WordNet id, what ILSVRC
annotation files use) and a ``name`` (what people read).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eventful_det.errors import UserError


@dataclass(frozen=True, slots=True)
class Category:
    """One object category."""

    id: int
    wnid: str
    name: str


def _table(rows: Sequence[tuple[str, str]]) -> tuple[Category, ...]:
    return tuple(Category(i, wnid, name) for i, (wnid, name) in enumerate(rows, start=1))


IMAGENET_VID = _table(
    [
        ("n02691156", "airplane"),
        ("n02419796", "antelope"),
        ("n02131653", "bear"),
        ("n02834778", "bicycle"),
        ("n01503061", "bird"),
        ("n02924116", "bus"),
        ("n02958343", "car"),
        ("n02402425", "cattle"),
        ("n02084071", "dog"),
        ("n02121808", "domestic_cat"),
        ("n02503517", "elephant"),
        ("n02118333", "fox"),
        ("n02510455", "giant_panda"),
        ("n02342885", "hamster"),
        ("n02374451", "horse"),
        ("n02129165", "lion"),
        ("n01674464", "lizard"),
        ("n02484322", "monkey"),
        ("n03790512", "motorcycle"),
        ("n02324045", "rabbit"),
        ("n02509815", "red_panda"),
        ("n02411705", "sheep"),
        ("n01726692", "snake"),
        ("n02355227", "squirrel"),
        ("n02129604", "tiger"),
        ("n04468005", "train"),
        ("n01662784", "turtle"),
        ("n04530566", "watercraft"),
        ("n02062744", "whale"),
        ("n02391049", "zebra"),
    ]
)
"""The 30 categories of ImageNet VID, in the order of its development kit."""

SYNTHETIC_SHAPES = _table(
    [
        ("s00000001", "disc"),
        ("s00000002", "square"),
        ("s00000003", "triangle"),
        ("s00000004", "star"),
        ("s00000005", "cross"),
        ("s00000006", "ring"),
        ("s00000007", "crescent"),
        ("s00000008", "heart"),
        ("s00000009", "arrow"),
        ("s00000010", "hourglass"),
    ]
)
"""The categories of the synthetic videos; their ids only look like WordNet ids."""


# fmt: off
COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""The 80 categories of COCO detection, in the order of their ids."""

COCO_TO_VID = {"cat": "domestic_cat", "cow": "cattle", "boat": "watercraft"}
"""Names of ImageNet VID for categories of COCO that are called otherwise there."""


def load_classes(path: str | os.PathLike[str]) -> tuple[Category, ...]:
    """Read a category table: a JSON list of ``{"id": 1, "wnid": "n02691156", "name": "airplane"}``.

    Raises:
        UserError: if the file is missing, is not such a list, or its ids are not 1..N or repeat.
    """
    expected = 'a JSON list of {"id": 1, "wnid": "n02691156", "name": "airplane"} with ids 1..N'
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        table = tuple(Category(int(r["id"]), str(r["wnid"]), str(r["name"])) for r in rows)
    except OSError as error:
        raise UserError(f"cannot read the categories {path}: {error.strerror}; expected {expected}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a category table ({error!r}); expected {expected}") from None
    if not table or sorted(c.id for c in table) != list(range(1, len(table) + 1)):
        raise UserError(f"{path}: the ids must be 1..N, each once; expected {expected}")
    if len({c.wnid for c in table}) < len(table) or len({c.name for c in table}) < len(table):
        raise UserError(f"{path}: a wnid or a name occurs twice; every category needs its own")
    return tuple(sorted(table, key=lambda c: c.id))


def classes_json(table: Sequence[Category]) -> str:
    """The text ``load_classes`` reads back."""
    return json.dumps([asdict(category) for category in table], indent=1) + "\n"
