"""prepare_stills: nothing alike on both sides, even shares, the same split every time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from running import script_main

from eventful_det.data.coco_video import CocoVideo, load_coco_video

CLASSES = ["cat", "dog", "owl", "yak"]
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def prepare() -> Main:
    main: Main = script_main("prepare_stills.py")
    return main


def picture(seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (72, 64), interpolation=cv2.INTER_CUBIC), np.uint8)


class Pile:
    """Still pictures and their COCO file under construction."""

    def __init__(self, root: Path) -> None:
        self.root, self.images, self.annotations = root, [], []  # type: Path, list[dict[str, Any]], list[dict[str, Any]]

    def add(self, name: str, image: NDArray[np.uint8], *boxes: int, **fields: Any) -> None:
        """An image with a box of each category in `boxes`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
        entry = {"id": len(self.images) + 1, "file_name": name, "width": image.shape[1], "height": image.shape[0]}
        self.images.append(entry | fields)
        for category in boxes:
            self.annotations.append(
                {"id": len(self.annotations) + 1, "image_id": entry["id"], "category_id": category}
                | {"bbox": [1.5, 2, 10, 12], "area": 99.5, "iscrowd": 0}
            )

    def save(self) -> str:
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        data = {"categories": categories, "images": self.images, "annotations": self.annotations}
        (self.root / "all.json").write_text(json.dumps(data))
        return str(self.root / "all.json")


@pytest.fixture
def pile(tmp_path: Path) -> Pile:
    """Two sources: 40 cats, 20 of them with a dog beside; 20 owls, of which only owls are labelled."""
    pile = Pile(tmp_path / "pictures")
    for n in range(40):
        pile.add(f"pets/{n:03}.png", picture(n), *([1, 1, 2] if n % 2 else [1]))
    for n in range(20):
        pile.add(f"owls/{n:03}.png", picture(100 + n), 3, labelled_category_ids=[3])
    return pile


def sides(output: Path) -> tuple[CocoVideo, CocoVideo]:
    train, val = (load_coco_video(output / "annotations" / f"{name}.json") for name in ("train", "val"))
    return train, val


def names(data: CocoVideo) -> set[str]:
    return {frame.file_name for frame in data.frames}


def test_every_picture_is_on_one_side_as_it_was(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    assert prepare([pile.save(), "--output", str(tmp_path / "out")]) == 0
    before = {frame.file_name: frame for frame in load_coco_video(pile.root / "all.json").frames}
    train, val = sides(tmp_path / "out")
    assert names(train) | names(val) == set(before) and not names(train) & names(val)
    for data in (train, val):
        assert data.categories == [(1, "cat"), (2, "dog"), (3, "owl"), (4, "yak")], "those without a box too"
        for frame in data.frames:
            assert frame == before[frame.file_name]
            assert data.image_path(frame).is_file()
    assert {frame.exhaustive for frame in val.frames} == {None, frozenset({3})}


def test_every_source_and_class_gets_its_share(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    assert prepare([pile.save(), "--output", str(tmp_path / "out"), "--holdout", "0.2"]) == 0
    _, val = sides(tmp_path / "out")
    assert Counter(frame.file_name.split("/")[0] for frame in val.frames) == {"pets": 8, "owls": 4}
    assert Counter(a.category_id for frame in val.frames for a in frame.annotations) == {1: 12, 2: 4, 3: 4}


def test_a_rare_class_is_held_out_once(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    for n in range(6):
        pile.add(f"pets/yak{n}a.png", picture(200 + n), 4)
    assert prepare([pile.save(), "--output", str(tmp_path / "out")]) == 0
    assert sum(a.category_id == 4 for frame in sides(tmp_path / "out")[1].frames for a in frame.annotations) == 1


def test_copies_are_not_torn_apart(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    for n in range(20):
        copy = cv2.resize(picture(n), (50, 40), interpolation=cv2.INTER_AREA)
        pile.add(f"web/{n:03}.jpg", np.asarray(copy if n % 2 else copy[:, ::-1], np.uint8), 1)
    for seed in range(3):
        assert prepare([pile.save(), "--output", str(tmp_path / "out"), "--holdout", "0.4", "--seed", str(seed)]) == 0
        val = names(sides(tmp_path / "out")[1])
        assert all((f"pets/{n:03}.png" in val) == (f"web/{n:03}.jpg" in val) for n in range(20))
        assert any(f"web/{n:03}.jpg" in val for n in range(20))


def films(pile: Pile) -> list[list[str]]:
    """Frames that must stay together, by what they show and how they are numbered."""
    scenes = []
    for first, step, count, seed in ((0, 2, 6, 300), (12, 2, 6, 301), (500, 2, 6, 302)):
        names = []
        for n in range(count):
            image = picture(seed)
            image[40:, 8 * n : 8 * n + 8] = picture(400 + n)[40:, :8]  # something walks by
            names.append(f"film/{len(pile.images):05}.png")
            pile.add(names[-1], image, 3, orig_name=f"train/clip_Frame_{first + step * n}.png")
        scenes.append(names)
    shaky = [f"shaky/{n}.png" for n in range(8)]  # no two frames alike, but one film
    for n, name in enumerate(shaky):
        pile.add(name, picture(500 + n), 3, orig_name=f"frame{n * 20:04}.png")
    return [*scenes, shaky]


def test_scenes_of_films_are_not_torn_apart(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    scenes = films(pile)
    held_out = set()
    for seed in range(6):
        output = tmp_path / str(seed)
        assert prepare([pile.save(), "--output", str(output), "--holdout", "0.35", "--seed", str(seed)]) == 0
        val = names(sides(output)[1])
        shares = [len(val.intersection(scene)) / len(scene) for scene in scenes]
        assert set(shares) <= {0.0, 1.0}, shares
        assert sum(shares[:3]) == 1, "one scene of the three is what comes nearest to a third"
        held_out.add(shares.index(1.0))
    assert len(held_out) > 1, "another seed holds out another scene"


def test_the_split_depends_on_content_and_seed_alone(prepare: Main, pile: Pile, tmp_path: Path) -> None:
    output = tmp_path / "out"
    files = [output / "annotations" / name for name in ("train.json", "val.json", "split.json")]
    assert prepare([pile.save(), "--output", str(output)]) == 0
    once = [path.read_bytes() for path in files]
    assert prepare([pile.save(), "--output", str(output), "--workers", "1"]) == 0
    assert [path.read_bytes() for path in files] == once
    assert sorted(path.name for path in (output / "annotations").iterdir()) == sorted(path.name for path in files)

    pile.images.reverse()
    pile.annotations.reverse()
    assert prepare([pile.save(), "--output", str(output)]) == 0
    record = json.loads(files[2].read_text())
    assert record["val"] == json.loads(once[2])["val"] == sorted(names(sides(output)[1]))
    assert record["annotations_sha256"] != json.loads(once[2])["annotations_sha256"]

    assert prepare([pile.save(), "--output", str(output), "--seed", "1"]) == 0
    assert json.loads(files[2].read_text())["val"] != record["val"]


def test_the_tables_are_printed(prepare: Main, pile: Pile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare([pile.save(), "--output", str(tmp_path / "out"), "--holdout", "0.2"]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    for row in ("pets 32 8 64 16", "owls 16 4 16 4", "cat 32 8 48 12", "dog 16 4 16 4", "yak 0 0 0 0"):
        assert row.split() in rows
    assert any(row[:5] == ["60", "images", "in", "60", "groups,"] for row in rows)


def test_pictures_that_cannot_be_read_are_left_out_and_named(
    prepare: Main, pile: Pile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pile.root / "pets/003.png").unlink()
    (pile.root / "pets/004.png").write_text("no picture")
    (pile.root / "pets/005.png").write_bytes(b"")
    count = len(pile.images)
    assert prepare([pile.save(), "--output", str(tmp_path / "out")]) == 0
    assert "3 images are left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/annotations/split.json").read_text())
    assert record["train_images"] + record["val_images"] == count - 3
    assert [name for name in ("003", "004", "005") if any(f"{name}.png" in fault for fault in record["left_out"])] == [
        "003",
        "004",
        "005",
    ]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("videos", "expected still pictures"),
        ("one group", "cannot be split"),
        ("no images", "cannot be split"),
        ("--holdout 1", "--holdout is 1; expected a share between 0 and 1"),
        ("no file", "cannot read the data set"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing_behind(
    prepare: Main, pile: Pile, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, told: str
) -> None:
    if fault in ("one group", "no images"):
        pile.images, pile.annotations = pile.images[: int(fault == "one group")], []
    annotations = Path(pile.save())
    if fault == "videos":
        data = json.loads(annotations.read_text())
        data["videos"] = [{"id": 1}]
        data["images"] = [image | {"video_id": 1, "frame_id": n} for n, image in enumerate(data["images"])]
        annotations.write_text(json.dumps(data))
    elif fault == "no file":
        annotations.unlink()
    options = fault.split() if fault.startswith("--") else []
    assert prepare([str(annotations), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
