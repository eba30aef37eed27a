"""The streaming loader: what a batch holds, order, packing, sharding, video files, faults, threads."""

from __future__ import annotations

import gc
import json
import re
import threading
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video, load_coco_video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.streams import StreamFrame, VideoStreams, plan, share_out
from eventful_det.data.video.writer import VideoWriter
from eventful_det.errors import UserError

LENGTHS = [3, 1, 7, 2, 4]
SHORT = (24, 48)


def picture(video: int, place: int) -> np.ndarray:
    return np.full((36, 48, 3), 10 * video + place, np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoVideo:
    """Five videos whose pixels say which frame of which video they are."""
    root = tmp_path_factory.mktemp("pictures")
    videos = []
    for v, length in enumerate(LENGTHS):
        frames = [Frame(100 * v + i + 1, f"{v}/{i}.png", 48, 36, i) for i in range(length)]
        (root / str(v)).mkdir()
        for i, frame in enumerate(frames):
            cv2.imwrite(str(root / frame.file_name), picture(v, i))
        videos.append(Video(v + 1, f"video {v}", frames))
    return CocoVideo([(1, "a")], [*videos, Video(9, "empty")], root)


def facts(batches: list[list[StreamFrame]]) -> list[list[tuple[object, ...]]]:
    return [[(i.slot, i.video.id, i.frame.image_id, i.is_first, i.is_last, i.fault) for i in b] for b in batches]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_every_frame_comes_once_in_its_slot(data: CocoVideo, slots: int, workers: int) -> None:
    batches = list(VideoStreams(data, slots, size=SHORT, workers=workers))
    assert facts(batches) == facts(list(VideoStreams(data, slots)))
    assert [[item.slot for item in batch] for batch in batches] == [sorted({i.slot for i in b}) for b in batches]
    shown: dict[int, list[StreamFrame]] = {}
    for item in (item for batch in batches for item in batch):
        shown.setdefault(item.video.id, []).append(item)
        v, i = item.video.id - 1, item.frame.frame_id
        assert item.image is not None and item.resized is not None
        assert (item.image == picture(v, i)).all() and item.resized.shape == (24, 32, 3)
    for items in shown.values():
        assert [item.frame for item in items] == items[0].video.frames and len({item.slot for item in items}) == 1
        assert [item.is_first for item in items] == [True] + [False] * (len(items) - 1)
        assert [item.is_last for item in items] == [False] * (len(items) - 1) + [True]
    assert len(shown) == len(LENGTHS)


def test_long_videos_first_and_slots_are_refilled(data: CocoVideo) -> None:
    batches = list(VideoStreams(data, 2))
    assert [[item.video.id for item in batch] for batch in batches] == [
        *[[3, 5]] * 4,
        *[[3, 1]] * 3,
        [4, 2],
        [4],
    ]


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 6))
def test_plans_are_whole_and_busy(lengths: list[int], slots: int) -> None:
    lengths.sort(reverse=True)
    steps = list(plan(lengths, slots))
    shown = [(video, place) for step in steps for _, video, place in step]
    assert sorted(shown) == [(v, i) for v, length in enumerate(lengths) for i in range(length)]
    started: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for _, video, _ in step:
            started.setdefault(video, []).append(number)
    assert all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in started.values())
    if lengths:  # a slot is free only when nothing waits; then the longest wait is one video (Graham's bound)
        assert len(steps) <= sum(lengths) / slots + max(lengths) * (1 - 1 / slots)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5))
def test_shares_are_disjoint_whole_and_even(lengths: list[int], shares: int) -> None:
    dealt = share_out(lengths, shares)
    assert sorted(video for share in dealt for video in share) == list(range(len(lengths)))
    loads = [sum(lengths[video] for video in share) for share in dealt]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_memory_is_bounded(data: CocoVideo) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    streams = VideoStreams(data, 2, workers=2)
    read = streams._read
    streams._read = lambda *place: [item := read(*place), alive.append(weakref.ref(item.image))][0]  # type: ignore
    for batch in streams:
        assert sum(image() is not None for image in alive) <= 2 * (2 + 1) + len(batch)
    assert len(alive) == sum(LENGTHS)


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_the_threads(data: CocoVideo, workers: int) -> None:
    for batch in VideoStreams(data, 3, workers=workers):
        assert len(batch) == 3
        break
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("streams")]
    with pytest.raises(ZeroDivisionError):
        for _ in VideoStreams(data, 3, workers=workers):
            1 / 0  # noqa: B018
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("streams")]


def test_broken_frames_take_their_turn_and_are_named(data: CocoVideo, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (36, 48, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "whole.jpg"), noise)
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in {"cut": whole[:-200], "empty": b"", "text": b"no picture"}.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    names = ["gone.jpg", "whole.jpg", "cut.jpg", "empty.jpg", "text.jpg"]
    frames = [Frame(i, name, 48, 36, i) for i, name in enumerate(names)]
    frames.append(Frame(9, "whole.jpg", 36, 48, 9))
    items = [item for (item,) in VideoStreams(CocoVideo([], [Video(1, "a", frames)], tmp_path), workers=2)]
    reasons = ["No such file", "", "cut short", "the file is empty", "not a readable picture", "is 48x36, but .* 36x48"]
    for item, reason in zip(items, reasons, strict=True):
        assert (item.image is None) == (item.resized is None) == bool(reason) == bool(item.fault)
        assert re.search(reason, item.fault) and (not reason or item.frame.file_name in item.fault)
    assert items[0].is_first and items[-1].is_last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
    ],
)
def test_numbers_out_of_range(data: CocoVideo, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoStreams(data, **options)  # type: ignore[arg-type]


def clip(path: Path, frames: int) -> None:
    with VideoWriter(path, quality=1) as writer:
        for i in range(frames):
            writer.write(np.full((64, 96, 3), 20 * i, np.uint8))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A data set of two video files; of the second every second frame is listed."""
    clip(tmp_path / "one.mp4", 6)
    clip(tmp_path / "two.mp4", 9)
    videos = [
        {"id": 1, "file_name": "one.mp4", "width": 96, "height": 64},
        {"id": 2, "name": "second", "file_name": "two.mp4"},
    ]
    images = [{"id": i + 1, "video_id": 1, "frame_id": i} for i in range(6)]
    images += [{"id": 10 + i, "video_id": 2, "frame_id": i, "width": 96, "height": 64} for i in range(0, 9, 2)]
    labels = [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [1, 2, 30, 40]}]
    content = {"categories": [{"id": 1, "name": "dog"}], "videos": videos, "images": images, "annotations": labels}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    return tmp_path / "labels.json"


@pytest.mark.parametrize(("slots", "workers"), [(1, 0), (1, 3), (2, 3)])
def test_frames_of_video_files(clips: Path, slots: int, workers: int) -> None:
    data = load_coco_video(clips)
    assert [video.name for video in data.videos] == ["one.mp4", "second"]
    items = [item for batch in VideoStreams(data, slots, workers=workers) for item in batch]
    assert len(items) == 11 and {item.frame.file_name for item in items} >= {"one.mp4#0", "two.mp4#8"}
    for item in items:
        assert item.image is not None and abs(item.image.mean() - 20 * item.frame.frame_id) < 4


def test_data_sets_of_video_files_are_saved_and_loaded(clips: Path, tmp_path: Path) -> None:
    data = load_coco_video(clips)
    data.save(tmp_path / "else/where.json")
    again = load_coco_video(tmp_path / "else/where.json")
    assert again.videos == data.videos and again.image_root == tmp_path


def test_a_file_name_of_a_video_whose_frames_are_pictures_means_nothing(clips: Path) -> None:
    content = json.loads(clips.read_text())
    for image in content["images"][:6]:
        image |= {"file_name": f"{image['id']}.png", "width": 96, "height": 64}
    clips.write_text(json.dumps(content))
    data = load_coco_video(clips)
    assert [video.file_name for video in data.videos] == ["", "two.mp4"]
    assert data.videos[0].frames[0].file_name == "1.png"


def test_frames_before_a_fault_are_there_for_whoever_asks_later(clips: Path) -> None:
    """Threads overtake each other: one may find the end of a file before another asks for a frame of it."""
    data = load_coco_video(clips)
    video = data.videos[0]
    video.frames.append(Frame(50, "one.mp4#6", 96, 64, 6))
    with FrameReader(data) as reader:
        with pytest.raises(UserError, match="has only 6 frames"):
            reader.read(video, video.frames[6])
        assert [round(reader.read(video, frame).mean() / 20) for frame in video.frames[:6]] == list(range(6))


def test_broken_video_files(clips: Path, tmp_path: Path) -> None:
    data = load_coco_video(clips)
    data.videos[0].frames += [Frame(50 + i, f"one.mp4#{6 + i}", 96, 64, 6 + i) for i in range(2)]
    (tmp_path / "two.mp4").write_bytes(b"no video")
    items = [item for batch in VideoStreams(data, 2, workers=2) for item in batch]
    faults = {item.frame.file_name: item.fault for item in items if item.fault}
    assert set(faults) == {"one.mp4#6", "one.mp4#7", *(f"two.mp4#{i}" for i in range(0, 9, 2))}
    assert "one.mp4 has only 6 frames" in faults["one.mp4#7"] and "two.mp4" in faults["two.mp4#8"]


def test_frames_behind_damage_are_not_taken_for_others(tmp_path: Path) -> None:
    """A packet that cannot be decoded moves all later frames by one; their labels must not stay where they were."""
    path = tmp_path / "noise.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(path, quality=1) as writer:
        for _ in range(30):
            writer.write(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    frames = [Frame(i, f"noise.mp4#{i}", 96, 64, i, [Annotation(1, (1, 1, 9, 9))]) for i in range(30)]
    data = CocoVideo([(1, "a")], [Video(1, "noise", frames, "noise.mp4")], tmp_path)
    faults = [item.fault for (item,) in VideoStreams(data)]
    first = next(i for i, fault in enumerate(faults) if fault)
    assert 0 < first < 30 and all(faults[first:]) and "noise.mp4" in faults[-1]
