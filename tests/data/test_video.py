"""Frames from anywhere, and video files that survive."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import weakref
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition
from videos import Image, damage, display, encode, encode_change, encode_side_by_side, rotate, truncate

from eventful_det.data.synthetic import SceneOptions, render_video
from eventful_det.data.video import VideoSource, open_source
from eventful_det.data.video.decoder import Decoder
from eventful_det.data.video.pictures import UnreadablePicture, read_image
from eventful_det.data.video.writer import VideoWriter
from eventful_det.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FRAMES = 40


@pytest.fixture(scope="module")
def images() -> list[Image]:
    options = SceneOptions(width=160, height=96, frames=FRAMES, cut_fraction=0)
    return [frame.image for frame in render_video(options, seed=1)]


def difference(a: Image, b: Image) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


def top_level_boxes(path: Path) -> list[str]:
    data, place, names = path.read_bytes(), 0, []
    while place < len(data):
        names.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4], "big")
    return names


def rejection(source: Any) -> str:
    """The one line that a source is rejected with."""
    with pytest.raises(UserError) as caught:
        list(open_source(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mkv", "ffv1", "yuv444p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.ts", "mpeg2video", "yuv420p"),
    ],
)
def test_every_frame_of_every_codec(tmp_path: Path, images: list[Image], name: str, codec: str, pix_fmt: str) -> None:
    with open_source(encode(tmp_path / name, images, codec, pix_fmt)) as source:
        assert source.fps == pytest.approx(25, abs=0.1)
        frames = list(source)
    assert len(frames) == FRAMES and source.skipped == 0
    assert all(frame.image.dtype == np.uint8 and frame.image.flags.c_contiguous for frame in frames)
    assert all(difference(f.image, i) < 8 for f, i in zip(frames, images, strict=True))
    assert [f.timestamp for f in frames] == pytest.approx([i / 25 for i in range(FRAMES)], abs=1e-3)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "ffv1")])
def test_frames_go_without_the_garbage_collector(tmp_path: Path, images: list[Image], name: str, codec: str) -> None:
    """It does not know how large they are, and comes late."""
    path = encode(tmp_path / name, images, codec)
    gc.collect()
    gc.disable()
    before = decoded_frames()
    try:
        with open_source(path) as source:
            assert sum(1 for _ in source) == FRAMES
        assert decoded_frames() - before <= 2
    finally:
        gc.enable()


def decoded_frames() -> int:
    """Decoded frames that are in memory."""
    return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_of_the_container(tmp_path: Path, images: list[Image], angle: int) -> None:
    path = rotate(encode(tmp_path / "a.mp4", images[:3]), angle)
    for frame, image in zip(open_source(path), images, strict=False):
        assert difference(frame.image, np.rot90(image, -angle // 90)) < 8


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_mirrored_pictures(tmp_path: Path, images: list[Image], matrix: tuple[int, int, int, int]) -> None:
    """A stored pixel (x, y) is shown where the matrix says."""
    a, b, c, d = matrix
    path = display(encode(tmp_path / "a.mp4", images[:2]), *matrix)
    (frame, _), (height, width, _) = list(open_source(path)), images[0].shape
    for x, y in ((0, 0), (width - 1, 0), (30, 70), (width - 1, height - 1)):
        column, row = a * x + c * y, b * x + d * y  # below 0: counted from the far edge
        column, row = column - (a + c < 0), row - (b + d < 0)
        assert np.abs(frame.image[row, column].astype(int) - images[0][y, x]).max() < 40
    flat = images[0] if a else images[0].swapaxes(0, 1)
    assert difference(frame.image, flat[:: b + d, :: a + c]) < 8


@pytest.mark.parametrize(
    ("aspect", "shape"), [("4/3", (96, 213)), ("1/2", (192, 160)), ("1/1", (96, 160)), ("1/90", (96, 160))]
)
def test_pixels_are_square(tmp_path: Path, images: list[Image], aspect: str, shape: tuple[int, int]) -> None:
    path = encode(tmp_path / "a.mkv", images[:2], aspect=Fraction(aspect))
    image = next(iter(open_source(path))).image
    assert image.shape[:2] == shape
    assert Decoder(str(path)).pixels == pytest.approx(shape[0] * shape[1], rel=0.01), "which uploads are judged by"
    assert difference(image, cv2.resize(images[0], shape[::-1], interpolation=cv2.INTER_CUBIC)) < 10


def test_the_video_that_players_show(tmp_path: Path, images: list[Image]) -> None:
    """Not a cover picture, rather the default than another, rather a large one than a small one."""
    small = [cv2.resize(image, (80, 48)) for image in images[:5]]
    default, cover, none = Disposition.default, Disposition.attached_pic, Disposition(0)
    for name, streams, shape in (
        ("a.mkv", [(small, none), (images[:5], none)], (96, 160)),
        ("b.mkv", [(images[:5], none), (small, default)], (48, 80)),
        ("c.mp4", [(images[:1], cover), (small, none)], (48, 80)),
    ):
        frames = list(open_source(encode_side_by_side(tmp_path / name, streams)))
        assert [frame.image.shape[:2] for frame in frames] == [shape] * 5, name
    only = encode_side_by_side(tmp_path / "d.mp4", [(images[:1], cover)])
    assert "holds no video" in rejection(only)


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_video_that_ends_before_its_header_says_is_cut_short(
    tmp_path: Path, images: list[Image], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = encode(tmp_path / name, images, "mpeg4")
    assert open_source(path).frames == FRAMES and len(list(open_source(path))) == FRAMES and not caplog.records
    source = open_source(truncate(path, 0.6))
    count = len(list(source))
    assert FRAMES // 3 < count < FRAMES - 5 and source.skipped == 1
    assert f"ends after {count} of {FRAMES} frames" in caplog.text and "cut short" in caplog.text


def test_damage_in_the_middle_is_skipped(tmp_path: Path, images: list[Image], caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(damage(encode(tmp_path / "a.mp4", images, movflags="faststart")))
    frames = list(source)
    assert FRAMES // 2 <= len(frames) < FRAMES
    assert source.skipped >= 1 and len(frames) + source.skipped >= FRAMES - 2
    assert difference(frames[-1].image, images[-1]) < 8  # it went on behind the damage
    assert len([record for record in caplog.records if record.name.startswith("eventful_det")]) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_truncated_file(tmp_path: Path, images: list[Image], name: str) -> None:
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    path = encode(tmp_path / name, images, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    assert FRAMES // 2 <= len(list(open_source(path))) < FRAMES


def test_size_change_within_a_file(tmp_path: Path, images: list[Image]) -> None:
    both = encode_change(tmp_path / "both.ts", images[:10])
    shapes = [frame.image.shape for frame in open_source(both)]
    assert len(shapes) >= 9  # the decoder may drop the frame that it holds back at the change
    assert [shape for shape, _ in itertools.groupby(shapes)] == [(96, 160, 3), (64, 96, 3)]


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "note.txt").write_text("hello\n" * 100)
    assert "cannot open" in rejection(tmp_path / "noise.mp4")
    assert "cannot open" in rejection(tmp_path / "empty.mp4")
    assert "holds no video" in rejection(tmp_path / "note.txt")
    assert "no such file or folder" in rejection(str(tmp_path / "missing.mp4"))
    assert "webcam 97 cannot be opened" in rejection("97")
    assert "webcam 97 cannot be opened" in rejection(97)
    for number in (-1, 100, 10**20, np.int64(-5)):
        assert f"there is no webcam {number}" in rejection(number)
    assert "float" in rejection(1.5) and "bool" in rejection(True)
    assert "no such file or folder: '²'" in rejection("²") and "no such file or folder" in rejection("a\0[b]\n.mp4")
    assert "Connection refused" in rejection("http://127.0.0.1:9/a.mp4")
    assert "Connection refused" in rejection("rtsp://127.0.0.1:9/a")


def test_titles_of_other_times_and_codecs_of_nobody(tmp_path: Path, images: list[Image]) -> None:
    path = encode(tmp_path / "old.avi", images[:3], "mjpeg", "yuvj420p")
    data = path.read_bytes()
    titled = data.replace(b"ISFT", b"INAM", 1).replace(b"Lavf", b"\xe9\xe8ab", 1)  # Latin-1
    assert titled != data
    path.write_bytes(titled)
    assert len(list(open_source(path))) == 3
    path.write_bytes(data.replace(b"MJPG", b"Q9X7"))
    assert "no decoder" in rejection(path)


def test_pictures(tmp_path: Path, images: list[Image]) -> None:
    assert "no pictures" in rejection(tmp_path)
    for i, size in ((10, (80, 60)), (2, (160, 96)), (1, (33, 51))):
        cv2.imwrite(str(tmp_path / f"frame_{i}.png"), cv2.resize(images[i], size)[..., ::-1])
    cv2.imwrite(str(tmp_path / "frame_11.jpg"), images[11][..., 0])  # grey
    (tmp_path / "frame_3.png").write_bytes(b"not a picture")
    (tmp_path / "frame_4.jpg").write_bytes((tmp_path / "frame_11.jpg").read_bytes()[:-200])  # still being copied
    (tmp_path / "readme.txt").write_text("not a frame")
    with open_source(tmp_path) as source:
        assert (source.frames, source.fps) == (6, None)
        shapes = [frame.image.shape for frame in source]
    assert shapes == [(51, 33, 3), (96, 160, 3), (60, 80, 3), (96, 160, 3)]
    assert source.skipped == 2
    (only,) = open_source(tmp_path / "frame_2.png")
    assert np.array_equal(only.image, images[2]) and only.timestamp is None
    assert len(list(open_source(f"{tmp_path}/frame_1*.*"))) == 3
    assert "no pictures" in rejection(f"{tmp_path}/nothing_*.png")


def test_regular_files_each_once(tmp_path: Path, images: list[Image]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    for circle in ("circle", "another", "third"):  # whoever followed each would look into 3 ** 40 folders
        (tmp_path / circle).symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden").mkdir()
    cv2.imwrite(str(tmp_path / ".hidden/d.png"), images[0])
    assert len(list(open_source(tmp_path))) == 1
    assert len(list(open_source(f"{tmp_path}/**/*.png"))) == len(list(open_source(f"{tmp_path}/**"))) == 1
    assert "no such file" in rejection(tmp_path / "b.png")


def test_files_with_names_of_any_bytes(tmp_path: Path, images: list[Image]) -> None:
    folder = tmp_path / os.fsdecode(b"Jos\xe9 [1]\n")
    folder.mkdir()
    encode(tmp_path / "a.mp4", images[:3]).rename(folder / os.fsdecode(b"\xff.mp4"))
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    (tmp_path / "a.png").rename(folder / os.fsdecode(b"\xff.png"))
    for path, count in ((folder / os.fsdecode(b"\xff.mp4"), 3), (folder, 1)):
        with open_source(path) as source:
            assert len(list(source)) == count
            assert "Jos\ufffd [1] " in source.name and source.name.isprintable()
    (tmp_path / "0001").mkdir()
    cv2.imwrite(str(tmp_path / "0001/a.png"), images[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert len(list(open_source("0001"))) == 1, "a folder, no webcam"
        encode(tmp_path / "a.mp4", images[:3]).rename("~nobody.mp4")
        assert len(list(open_source("~nobody.mp4"))) == 3, "a name, nobody's home"


def test_a_claim_of_a_huge_picture_is_skipped(tmp_path: Path, images: list[Image]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    data = (tmp_path / "a.png").read_bytes()
    for name, side in (("b", 20_000), ("c", 60_000), ("d", 2**31 - 1)):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
        (tmp_path / f"{name}.png").write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    source = open_source(tmp_path)
    assert len(list(source)) == 1 and source.skipped == 3


def test_what_follows_a_jpeg_does_not_matter_but_its_end_does(tmp_path: Path, images: list[Image]) -> None:
    path = tmp_path / "a.jpg"
    for options in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]):
        whole = cv2.imencode(".jpg", images[0], options)[1].tobytes()
        for tail in (b"", b"\xff\xda", whole[: len(whole) // 2], bytes(999)):
            path.write_bytes(whole + tail)
            assert read_image(path).shape == images[0].shape
        preview = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
        for head in (whole[:2], whole[:2] + preview):
            path.write_bytes(head + whole[2:-2])
            with pytest.raises(UnreadablePicture, match="cut short"):
                read_image(path)


def test_arrays(images: list[Image]) -> None:
    source = open_source(images)
    assert source.frames == FRAMES and open_source(source) is source
    assert all(frame.image is image for frame, image in zip(source, images, strict=True))
    assert len(list(open_source(iter(images)))) == FRAMES
    assert "frame 1 is float32 (4, 5, 3)" in rejection([images[0], np.zeros((4, 5, 3), np.float32)])
    assert "frame 0 is uint8 (96, 160)" in rejection([images[0][..., 0]])
    assert "give files one by one" in rejection(["a.png"])
    (alone,) = open_source(images[0])
    assert np.array_equal(alone.image, images[0])
    assert "no frame" in rejection([])


def test_synthetic() -> None:
    with open_source("synthetic:3") as source, open_source("synthetic:3") as again, open_source("synthetic") as other:
        assert (source.frames, source.fps) == (150, 25.0)
        three = [list(itertools.islice(s, 3)) for s in (source, again, other)]
    assert np.array_equal(three[0][2].image, three[1][2].image) and three[0][2].timestamp == 0.08
    assert not np.array_equal(three[0][2].image, three[2][2].image)


def test_reading_holds_few_frames(tmp_path: Path, images: list[Image]) -> None:
    alive: list[weakref.ref[Image]] = []
    for frame in open_source(encode(tmp_path / "a.mp4", images)):
        alive.append(weakref.ref(frame.image))
        assert sum(a() is not None for a in alive) <= 2


def test_close_midway(tmp_path: Path, images: list[Image]) -> None:
    source = open_source(encode(tmp_path / "a.mp4", images))
    frames = iter(source)
    next(frames)
    source.close()
    source.close()
    del frames


def test_written_file_is_an_ordinary_mp4(tmp_path: Path, images: list[Image]) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, fps=30000 / 1001) as writer:
        for image in images:
            writer.write(image)
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", FRAMES)
        assert float(stream.average_rate or 0) == pytest.approx(30000 / 1001)
        assert container.duration == pytest.approx(FRAMES * 1001 / 30000 * av.time_base, rel=0.02)
    frames = list(open_source(path))
    assert len(frames) == FRAMES
    assert all(difference(f.image, i) < 8 for f, i in zip(frames, images, strict=True))
    assert top_level_boxes(path) == ["ftyp", "free", "mdat", "moov"]  # no fragments: seekable in every player


def test_colours_survive(tmp_path: Path) -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 180, 30), (128, 128, 128)], np.uint8)
    image = np.repeat(np.repeat(colours[None], 32, axis=1), 64, axis=0)
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(image)
    (frame,) = open_source(tmp_path / "a.mp4")
    assert np.abs(frame.image[32, 16::32].astype(int) - colours).max() < 8


def test_odd_and_changing_sizes(tmp_path: Path) -> None:
    white = partial(np.full, fill_value=255, dtype=np.uint8)
    with VideoWriter(tmp_path / "a.mp4") as writer:
        for shape in ((51, 33, 3), (102, 66, 3), (20, 66, 3)):
            writer.write(white(shape))
    frames = [frame.image for frame in open_source(tmp_path / "a.mp4")]
    assert [f.shape for f in frames] == 3 * [(52, 34, 3)]
    assert frames[0].min() > 240 and frames[1][:, 1:-1].min() > 230
    assert frames[2][:15].max() < 40 and frames[2][26].min() > 200 and frames[2][-15:].max() < 40


def test_frames_are_shown_at_their_times(tmp_path: Path, images: list[Image]) -> None:
    given = [0.0, 0.04, 0.5, 0.52, 30.0, 30.04, 2.0, 2.04, None, 2.12]  # a gap, and a clock that is set back
    with VideoWriter(tmp_path / "a.mp4", fps=25) as writer:
        for image, timestamp in zip(images, given, strict=False):
            writer.write(image, timestamp)
    shown = [frame.timestamp for frame in open_source(tmp_path / "a.mp4")]
    assert shown == pytest.approx([0, 0.04, 0.5, 0.52, 30.0, 30.04, 30.08, 30.12, 30.16, 30.2], abs=1e-4)


def test_a_video_begins_at_0_and_a_leap_of_the_clock_is_no_gap(tmp_path: Path, images: list[Image]) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=25) as writer:
        for image, timestamp in zip(images, [7.0, 7.04, 95443.7, 95443.9], strict=False):
            writer.write(image, timestamp)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].start_time == 0
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown == pytest.approx([0, 0.04, 0.08, 0.28], abs=1e-4)


def test_file_of_a_killed_writer_plays(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    code = (
        "import os, sys, signal, numpy as np\n"
        "from eventful_det.data.video.writer import VideoWriter\n"
        "writer = VideoWriter(sys.argv[1], 10)\n"
        "for i in range(60): writer.write(np.full((64, 64, 3), i, np.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert process.returncode == -signal.SIGKILL
    assert 30 <= len(list(open_source(path))) < 60
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time == 0


def test_writer_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*missing"):
        VideoWriter(tmp_path / "missing" / "a.mp4")
    with VideoWriter(tmp_path / "a.mp4"):
        pass  # no frame: no error


def test_sources_are_context_managers() -> None:
    with open_source("synthetic") as source:
        assert isinstance(source, VideoSource)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_full_disk(images: list[Image]) -> None:
    with pytest.raises(UserError, match="No space left"), VideoWriter("/dev/full") as writer:
        for image in images:
            writer.write(image)
