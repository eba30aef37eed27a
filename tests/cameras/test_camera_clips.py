"""Clips around events: copied or encoded, playable, bounded, and never the end of the process."""

from __future__ import annotations

import errno
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from servers import HEIGHT, WIDTH, Server, why_not

from eventful_det.cameras.clips import Recorder
from eventful_det.cameras.config import Clips
from eventful_det.cameras.events import Event
from eventful_det.cameras.journal import Journal
from eventful_det.cameras.library import Library
from eventful_det.cameras.source import open_camera
from eventful_det.data.video.decoder import Decoder
from eventful_det.data.video.writer import VideoWriter


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds, a key frame in each; frame i is a grey of 40 + 3 i."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with VideoWriter(path, fps=10) as writer:
        for i in range(60):
            writer.write(np.full((64, 96, 3), 40 + 3 * i, np.uint8))
    return path


def greys(path: Path) -> list[int]:
    """The grey of each frame of a clip, as far as it can be played."""
    with av.open(str(path)) as container:
        return [round((float(frame.to_ndarray(format="rgb24").mean()) - 40) / 3) for frame in container.decode(video=0)]


def play(film: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, trigger: int) -> str:
    """Feed the packets of a film, at its pace on a clock of our own; something happens at frame `trigger`."""
    now = 1000.0
    monkeypatch.setattr("eventful_det.cameras.clips.time.monotonic", lambda: now)
    decoder, clip = Decoder(str(film)), ""
    decoder.tap = recorder.packet
    for count, _ in enumerate(decoder.read(lambda *_: None), 1):
        now += 0.1
        if count == trigger:
            clip = recorder.trigger()
    recorder.close()
    decoder.close()
    return clip


def test_a_clip_is_copied_from_the_key_frame_before_the_event_on(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    library = Library(tmp_path, Clips(before=1.0, after=1.0))
    clip = play(film, Recorder(library, "gate"), monkeypatch, 30)
    seen = greys(tmp_path / clip)
    assert 10 <= seen[0] <= 22 and seen[0] % 10 in (0, 9, 1), "it begins with a key frame, 1 s before or earlier"
    assert 38 <= seen[-1] <= 46
    whole = seen[:-3]  # at the end those lack that are coded after later ones
    assert whole == list(range(seen[0], seen[0] + len(whole)))
    with av.open(str(tmp_path / clip)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].start_time == 0


def test_memory_stays_bounded_without_events(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recorder = Recorder(Library(tmp_path, Clips(before=1.0)), "gate")
    play(film, recorder, monkeypatch, -1)
    assert len(recorder._packets) <= 21 and recorder._packets[0].key
    assert recorder._bytes == sum(len(one.data) for one in recorder._packets)
    assert not list(tmp_path.rglob("*.mp4"))


def test_frames_of_other_sources_are_encoded(tmp_path: Path, monkeypatch: Any) -> None:
    library, now = Library(tmp_path, Clips(before=1.0, after=1.0)), 0.0
    monkeypatch.setattr("eventful_det.cameras.clips.time.monotonic", lambda: now)
    recorder = Recorder(library, "gate")
    clip = ""
    for i in range(60):
        now = i / 10
        recorder.frame(np.full((64, 96, 3), 40 + 3 * i, np.uint8))
        if i == 30:
            clip = recorder.trigger()
    assert recorder._clip is None, "it ended by itself"
    seen = greys(tmp_path / clip)
    assert seen == list(range(21, 41))


def test_events_make_a_clip_longer_up_to_a_bound(tmp_path: Path, monkeypatch: Any) -> None:
    now = 0.0
    monkeypatch.setattr("eventful_det.cameras.clips.time.monotonic", lambda: now)
    recorder = Recorder(Library(tmp_path, Clips(before=0, after=1.0, longest=2.0)), "gate")
    clips = set()
    for i in range(50):
        now = i / 10
        recorder.frame(np.full((64, 96, 3), 40 + 3 * i, np.uint8))
        clips.add(recorder.trigger())
    recorder.close()
    assert [len(greys(tmp_path / clip)) for clip in sorted(clips)] == [20, 20, 9]


def test_a_camera_that_breaks_off_leaves_a_clip_that_plays(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recorder = Recorder(Library(tmp_path, Clips(before=1.0, after=60.0)), "gate")
    clip = play(film, recorder, monkeypatch, 50)
    assert greys(tmp_path / clip)[-1] == 59


def test_nothing_is_kept_where_nobody_wants_it(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recorder = Recorder(Library(tmp_path, Clips()), "gate", on=False)
    play(film, recorder, monkeypatch, 30)
    recorder.frame(np.zeros((64, 96, 3), np.uint8))
    assert not recorder._packets and not recorder._frames and not list(tmp_path.rglob("*.mp4"))


def old_clip(folder: Path, name: str, days: float, size: int = 1000) -> Path:
    path = folder / "gate" / f"{name}.mp4"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    at = time.time() - 86_400 * days
    os.utime(path, (at, at))
    return path


def test_old_clips_go_by_age_and_by_size(tmp_path: Path) -> None:
    library = Library(tmp_path, Clips(days=10, megabytes=0.0025))
    paths = [old_clip(tmp_path, f"c{i}", days) for i, days in enumerate((30, 3, 2, 1))]
    other = tmp_path / "gate" / "notes.txt"
    other.write_text("not ours")
    library.tidy()
    assert [path.exists() for path in paths] == [False, False, True, True] and other.exists()


def test_a_full_disk_takes_old_clips_first(tmp_path: Path, monkeypatch: Any) -> None:
    """The disk is full until two old clips are gone."""
    library = Library(tmp_path, Clips(before=0))
    old = [old_clip(tmp_path, f"c{i}", 5 - i) for i in range(3)]
    full_disk(monkeypatch, lambda: old[1].exists())
    recorder = Recorder(library, "yard")
    clip = recorder.trigger()
    for i in range(5):
        recorder.frame(np.full((64, 96, 3), 40 + 3 * i, np.uint8))
    recorder.close()
    assert [path.exists() for path in old] == [False, False, True]
    assert greys(tmp_path / clip) == [0, 1, 2, 3, 4] and library.lost == 0


def test_a_disk_that_stays_full_costs_the_clip_and_nothing_else(
    film: Path, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(tmp_path, Clips(before=1.0))
    full_disk(monkeypatch, lambda: True)
    play(film, Recorder(library, "gate"), monkeypatch, 30)
    recorder = Recorder(library, "yard")
    recorder.trigger()
    recorder.frame(np.zeros((64, 96, 3), np.uint8))
    recorder.close()
    assert recorder.snapshot(b"jpeg").endswith(".jpg")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and library.lost == 3
    assert "No space left" in caplog.text


def full_disk(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """Writing to clips fails while `full()`."""
    real = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            if full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = real(path, mode, *args, **options)
        return Full(file) if mode == "w+b" else file

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_the_clip_of_a_camera_plays_even_if_that_dies(kind: str, tmp_path: Path) -> None:
    if (reason := why_not(kind)) is not None:
        pytest.skip(reason)
    camera = Server(kind)
    recorder = Recorder(Library(tmp_path, Clips(before=1.0, after=60.0)), "gate")
    source = open_camera(camera.url, recorder.packet, fps=10)
    clips, began = [], time.monotonic()
    try:
        for count, frame in enumerate(source):
            if count in (20, 45):
                clips.append(recorder.trigger())
            if count == 35:
                camera.kill()
                camera.start()
            if count >= 60:
                assert frame.captured is not None
                break
    finally:
        source.close()
        recorder.close()
        camera.kill()
    assert time.monotonic() - began > 5, "10 frames a second, not 25"
    assert len(set(clips)) == 2, "another connection begins another clip"
    for clip in clips:
        with av.open(str(tmp_path / clip)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            frames = [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]
        assert len(frames) > 25 and frames[0].shape == (HEIGHT, WIDTH, 3)


def test_recording_that_is_turned_off_and_on_begins_anew(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recorder, now = Recorder(Library(tmp_path, Clips(before=1.0, after=1.0)), "gate"), 1000.0
    monkeypatch.setattr("eventful_det.cameras.clips.time.monotonic", lambda: now)
    decoder, clips = Decoder(str(film)), []
    decoder.tap = recorder.packet
    for count, _ in enumerate(decoder.read(lambda *_: None), 1):
        now += 0.1
        recorder.frame(np.zeros((64, 96, 3), np.uint8))
        recorder.on = not 20 < count < 40
        if count in (19, 45):
            clips.append(recorder.trigger())
    recorder.close()
    decoder.close()
    first, second = (greys(tmp_path / clip) for clip in clips)
    assert first[-1] < 30 and second[0] >= 39, "nothing of the time in between"
    assert second[:-3] == list(range(second[0], second[0] + len(second) - 3)), "copied; nothing else is in it"


def test_only_a_full_disk_costs_old_clips(tmp_path: Path, monkeypatch: Any) -> None:
    library = Library(tmp_path, Clips())
    old = old_clip(tmp_path, "c", 1)
    journal = Journal(tmp_path / "events", 10**6, library.make_room)
    monkeypatch.setattr(journal, "_path", lambda _: tmp_path)  # a folder
    journal.append(Event(kind="online", camera="gate"))
    (tmp_path / "yard").write_text("no folder")
    recorder = Recorder(library, "yard")
    recorder.snapshot(b"jpeg")
    clip = recorder.trigger()
    recorder.frame(np.zeros((64, 96, 3), np.uint8))
    recorder.close()
    assert old.exists() and library.lost == 2 and not (tmp_path / clip).exists()


def test_a_clock_that_goes_back_overwrites_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    class Stopped:
        @staticmethod
        def now(_: Any) -> datetime:
            return datetime(2026, 1, 1)

    monkeypatch.setattr("eventful_det.cameras.clips.datetime", Stopped)
    recorder = Recorder(Library(tmp_path, Clips()), "gate")
    assert (tmp_path / recorder.snapshot(b"one")).read_bytes() == b"one"
    recorder.snapshot(b"two")
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*.jpg")) == [b"one", b"two"]


def test_a_camera_whose_clock_and_size_change_stays_in_its_clip(tmp_path: Path, monkeypatch: Any) -> None:
    parts = []
    for first, (height, width) in ((0, (64, 96)), (20, (96, 128))):
        path = tmp_path / f"{first}.ts"
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=10, options={"g": "10", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for i in range(first, first + 20):
                grey = np.full((height, width, 3), 40 + 3 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode(None))
        parts.append(path.read_bytes())
    film = tmp_path / "film.ts"  # its second half begins at 0 again
    film.write_bytes(b"".join(parts))
    clip = play(film, Recorder(Library(tmp_path, Clips(before=1.0, after=60.0)), "gate"), monkeypatch, 5)
    seen = greys(tmp_path / clip)
    assert abs(seen[-1] - 39) <= 1 and len(seen) == 40 - seen[0]
    with av.open(str(tmp_path / clip)) as container:
        assert container.duration is not None and abs(container.duration / 1e6 - len(seen) / 10) < 0.5
