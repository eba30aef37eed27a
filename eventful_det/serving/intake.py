"""What people may have opened: their uploads, files of one folder, cameras, addresses. Nothing else on the server."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from av.error import FFmpegError

from eventful_det.data.decoder import best_video, open_container
from eventful_det.data.video import VideoSource, open_source
from eventful_det.errors import UserError
from eventful_det.serving.playback import Playback

# Containers that hold their own video. Playlists, scripts and session descriptions, which would make FFmpeg read
# other files or addresses, are not among them.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,h264,hevc,gif"
_SUFFIXES = [
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".ts",
    ".mts",
    ".mpg",
    ".mpeg",
    ".flv",
    ".ogv",
    ".wmv",
    ".3gp",
    ".gif",
]  # that are listed
_SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "srt")
_SYNTHETIC = re.compile(r"synthetic(:\d{1,9})?")
_MAX_PIXELS = 8192 * 8192  # of a frame; larger ones are attacks rather than videos


class TooLarge(UserError):
    """An upload is larger than allowed."""


@dataclass(frozen=True)
class Opened:
    """A source that may be watched.

    Attributes:
        source: of frames.
        title: for people.
        name: like the title, of letters, digits, dots, dashes and underscores only.
        release: removes what is left of it on the server; may be called again.
    """

    source: VideoSource
    title: str
    release: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.title).strip("-.")[:48] or "stream"


def play(place: str | Path, title: str, release: Callable[[], None] = lambda: None) -> Opened:
    """A source at its own pace: cameras and live streams as they are, all others by the clock, over and over.

    Raises:
        UserError: it cannot be opened.
    """
    source = open_source(place)
    if source.live:
        return Opened(source, title, release)
    with source:
        drawn = _SYNTHETIC.fullmatch(str(place)) is not None  # once; later there is a detector that needs the time
        reopen = partial(open_source, [frame.image for frame in source] if drawn else place)
    return Opened(Playback(reopen, title), title, release)


def _play_checked(path: Path, title: str, release: Callable[[], None] = lambda: None) -> Opened:
    check_video(path, title)
    return play(path, title, release)


class Intake:
    """Opens sources for people who are not trusted with the server's files.

    Args:
        media: folder whose videos may be watched; None = none.
        cameras: whether webcams of the server may be watched.
        urls: whether the server may connect to addresses.
        synthetic: whether the detector can see something in synthetic clips.
        max_bytes: of an upload.
        max_uploads: that are coming in or are watched.
    """

    def __init__(
        self,
        *,
        media: Path | None = None,
        cameras: bool = True,
        urls: bool = True,
        synthetic: bool = True,
        max_bytes: int = 512 * 2**20,
        max_uploads: int = 16,
    ) -> None:
        if media is not None and not media.is_dir():
            raise UserError(f"media={media} is no folder")
        self.media = None if media is None else media.resolve()
        self.cameras, self.urls, self.synthetic = cameras, urls, synthetic
        self.max_bytes, self.max_uploads = max_bytes, max_uploads
        self._directory = tempfile.TemporaryDirectory(prefix="eventful_det-")  # readable by its owner only

    @property
    def directory(self) -> Path:
        """Where uploads are; made and removed by this object."""
        return Path(self._directory.name)

    def close(self) -> None:
        """Remove all uploads."""
        self._directory.cleanup()

    def offers(self) -> dict[str, Any]:
        """What may be opened, as JSON values."""
        names = ("cameras", "urls", "synthetic", "max_bytes")
        return {"files": self.files(), **{name: getattr(self, name) for name in names}}

    def files(self) -> list[str]:
        """Videos of the media folder, relative to it; hidden ones are left out."""
        if self.media is None:
            return []
        videos = (p for p in self.media.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file() and self._inside(p))
        paths = (p.relative_to(self.media) for p in videos)
        return sorted(str(p) for p in paths if not any(part.startswith(".") for part in p.parts))

    def open(self, text: str) -> Opened:
        """Open what somebody typed: a file of the media folder, a webcam number, an address, or synthetic[:SEED].

        Raises:
            UserError: there is no such source, or it may not be opened.
        """
        text = text.strip()
        if _SYNTHETIC.fullmatch(text):
            return play(text, text)
        if re.fullmatch(r"\d{1,3}", text):
            if not self.cameras:
                raise UserError("the cameras of this server may not be watched; start it with cameras=true")
            return play(text, f"camera {text}")
        scheme, found, rest = text.partition("://")
        if found:
            if not self.urls:
                raise UserError("this server does not connect to addresses; start it with urls=true")
            if scheme.lower() not in _SCHEMES:
                raise UserError(f"an address has to begin with one of {', '.join(s + '://' for s in _SCHEMES)}")
            return play(f"{scheme.lower()}://{rest}", public_name(text))
        return self._open_media(text)

    def check_size(self, length: str | None) -> None:
        """Refuse an upload that announces (`Content-Length`) more than `max_bytes`, before any of it comes.

        Raises:
            TooLarge: it does.
        """
        if length is not None and length.isdigit() and int(length) > self.max_bytes:
            raise TooLarge(self._too_large("the file"))

    async def receive(self, title: str, chunks: AsyncIterator[bytes]) -> Opened:
        """Store an upload under a name of our own and open it.

        Raises:
            TooLarge: it has more than `max_bytes`; nothing of it is kept.
            UserError: it is no video, and nothing of it is kept; or there are too many uploads.
        """
        if len(list(self.directory.iterdir())) >= self.max_uploads:
            raise UserError(f"there are {self.max_uploads} uploads already; remove one first")
        path = self.directory / f"{secrets.token_hex(16)}.upload"
        release = partial(path.unlink, missing_ok=True)
        title = "".join(c for c in Path(title.replace("\\", "/")).name if c.isprintable())[:80] or "upload"
        try:
            with path.open("xb") as file:
                async for chunk in chunks:
                    if file.tell() + len(chunk) > self.max_bytes:
                        raise TooLarge(self._too_large(title))
                    file.write(chunk)
            return await asyncio.to_thread(_play_checked, path, title, release)  # decoding must not hold others up
        except BaseException:
            release()
            raise

    def _too_large(self, title: str) -> str:
        return f"{title} is too large; this server takes up to {self.max_bytes / 2**20:.0f} MiB"

    def _open_media(self, text: str) -> Opened:
        known = "" if self.media is None else "a file of the server's media folder, "
        problem = UserError(f"{text!r} is no source; expected {known}a camera number, an address, or synthetic:1")
        if self.media is None or not text or "\0" in text:
            raise problem
        path = self.media / text
        with contextlib.suppress(OSError):
            if self._inside(path) and path.is_file():
                return _play_checked(path, path.name)
        raise problem

    def _inside(self, path: Path) -> bool:
        """Whether a path leads into the media folder, symbolic links followed."""
        return self.media is not None and path.resolve().is_relative_to(self.media)


def check_video(path: Path, title: str) -> None:
    """Make sure that a file is a video: open it in one of the known containers and decode a frame.

    Raises:
        UserError: it is not.
    """
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with open_container(str(path), options) as container:
            video = best_video(container, title)
            if video.width * video.height > _MAX_PIXELS:
                raise UserError(f"{title} has frames of {video.width}x{video.height} pixels; that is too large")
            if next(container.decode(video), None) is None:
                raise UserError(f"{title} holds no frame that can be decoded")
    except (FFmpegError, ValueError, IndexError) as error:
        raise UserError(f"{title} is not a video that can be played here (MP4, MOV, WebM, MKV, AVI, ...)") from error


def public_name(source: str) -> str:
    """What a source is called: the name of a file, an address without its password."""
    return re.sub(r"//[^/?#]*@", "//", source) if "://" in source else Path(source).name
