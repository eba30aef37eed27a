"""serving/sources.py: what may be opened, and what may not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import av
import pytest
from served import Server, serving

from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError
from eventful_det.serving.sources import OpenedSource, SourceOpener

SECRET = "the server's own business"


def leftovers(server: Server) -> list[Path]:
    return list(server.opener.directory.iterdir())


def test_uploads_are_stored_under_names_of_our_own_and_removed(server: Server, clip: Path) -> None:
    answer = server.client.post("/api/uploads?name=../../../etc/my%20clip.mp4", content=clip.read_bytes())
    assert answer.status_code == 201 and answer.json() == {"name": "my-clip.mp4"}
    (stream,) = server.wait(lambda s: s["streams"][0]["frames"] > 3)["streams"]
    assert stream["title"] == "my clip.mp4"
    (stored,) = leftovers(server)
    assert stored.suffix == ".upload" and "clip" not in stored.name
    assert stored.parent.stat().st_mode & 0o077 == 0
    server.client.delete("/api/streams/my-clip.mp4")
    assert leftovers(server) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.mp4", b"some text that is no video\n" * 20, "not a video"),
        ("empty.mp4", b"", "not a video"),
        ("page.html", b"<!doctype html><script>alert(1)</script>", "not a video"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n", "not a video"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile '{clip}'\n", "not a video"),
        ("session.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n", "not a video"),
        ("cut.mp4", b"{half}", "not a video"),
    ],
)
def test_bad_uploads_get_a_clear_message(server: Server, clip: Path, name: str, content: bytes, message: str) -> None:
    half = clip.read_bytes()[:700]
    content = content.replace(b"{clip}", str(clip).encode()).replace(b"{half}", half)
    answer = server.client.post(f"/api/uploads?name={name}", content=content)
    assert answer.status_code == 400
    assert message in answer.json()["error"] and answer.json()["error"].startswith(name)
    assert str(server.opener.directory) not in answer.text
    assert leftovers(server) == [] and server.state()["streams"] == []


def test_large_uploads_are_refused(server: Server) -> None:
    announced = server.client.post("/api/uploads?name=big.mp4", content=b"x" * 200_001)
    assert announced.status_code == 413
    chunks = (b"x" * 10_000 for _ in range(50))  # does not say how much there is to come
    streamed = server.client.post("/api/uploads?name=big.mp4", content=chunks)
    assert streamed.status_code == 413
    assert "too large" in streamed.json()["error"]
    assert leftovers(server) == []


def remux(source: Path, target: Path) -> None:
    """Copy a video into another container."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)


def test_there_is_an_upper_limit_of_uploads(tiny_detector: Detector, clip: Path) -> None:
    with serving(tiny_detector, max_uploads=1) as server:
        first, second = (server.client.post("/api/uploads?name=a.mp4", content=clip.read_bytes()) for _ in range(2))
        assert first.status_code == 201 and second.status_code == 400
        assert "1 uploads already" in second.json()["error"] and len(leftovers(server)) == 1


@pytest.fixture
def tree(tmp_path: Path, clip: Path) -> Path:
    """A media folder beside things that are nobody's business."""
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    (media / "sub" / "inside.mp4").write_bytes(clip.read_bytes())
    (media / ".hidden.mp4").write_bytes(clip.read_bytes())
    (media / "notes.txt").write_text(SECRET)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n../outside.ts\n#EXT-X-ENDLIST\n"
    (media / "list.m3u8").write_text(playlist)  # FFmpeg would follow it
    remux(clip, tmp_path / "outside.ts")
    (tmp_path / "outside.mp4").write_bytes(clip.read_bytes())
    (media / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (media / "up").symlink_to(tmp_path)
    return media


def test_only_files_of_the_media_folder_are_opened(tiny_detector: Detector, tree: Path) -> None:
    with serving(tiny_detector, media=tree, cameras=False) as server:
        with av.open(str(tree / "list.m3u8")) as playlist:
            assert playlist.format.name == "hls" and next(playlist.decode(video=0)).width == 144
        offers = server.client.get("/api/sources").json()
        assert offers["files"] == ["sub/inside.mp4"]
        assert (offers["cameras"], offers["urls"]) == (False, True)
        server.watch("sub/inside.mp4")
        outside = tree.parent / "outside.mp4"
        for source in (
            "../outside.mp4",
            "sub/../../outside.mp4",
            str(outside),
            "link.mp4",
            "up/outside.mp4",
            "sub",
            "",
            ".",
            "sub/inside.mp4\0.mp4",
            "x" * 1900,
            "~/x.mp4",
            "sub/*.mp4",
            f"file://{outside}",
            f"FILE://{outside}",
            f"concat:{outside}",
            f"subfile,,start,0,end,0,,:{outside}",
            f"concat://{outside}",
            "list.m3u8",
            "notes.txt",
            "0",
        ):
            answer = server.client.post("/api/streams", json={"source": source})
            assert answer.status_code == 400, source
            assert SECRET not in answer.text
        assert len(server.state()["streams"]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems have no such names")
def test_names_that_are_no_text_are_shown_and_opened(tiny_detector: Detector, tmp_path: Path, clip: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.mp4")).write_bytes(clip.read_bytes())
    with serving(tiny_detector, media=tmp_path) as server:
        assert server.client.get("/api/sources").json()["files"] == ["b\ufffd.mp4"]
        assert server.watch("b\ufffd.mp4") == "b-.mp4"


def test_without_a_media_folder_there_are_no_files(clip: Path) -> None:
    opener = SourceOpener()
    with pytest.raises(UserError, match="is no source"):
        opener.open(str(clip))
    assert opener.files() == {}
    with pytest.raises(UserError, match="no folder"):
        SourceOpener(media=clip)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="urls=true"):
        SourceOpener(urls=False).open("http://127.0.0.1:9/video")
    with pytest.raises(UserError, match="begin with one of http://"):
        SourceOpener().open("gopher://127.0.0.1/")
    with pytest.raises(UserError, match="cannot open http://127.0.0.1:9/"):
        SourceOpener().open("HTTP://127.0.0.1:9/")
    with pytest.raises(UserError, match="cameras=true"):
        SourceOpener(cameras=False).open("0")


def test_names_for_programs() -> None:
    def named(title: str) -> str:
        return OpenedSource(None, title).name  # type: ignore[arg-type]

    assert named("my clip (1).mp4") == "my-clip-1-.mp4"
    assert named('a"b\n{c}') == "a-b-c"
    assert named("../..") == named("…") == "stream"
