"""What people may have opened: their uploads, files of one folder, cameras, addresses. Nothing else on the server."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eventful_det.data.video import VIDEO_SUFFIXES, VideoSource, open_source
from eventful_det.data.video.decoder import MAX_PIXELS, Decoder, VideoFile
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.secrets import mask_secrets
from eventful_det.serving.playback import Playback

# Containers that hold their own video. Playlists, scripts and session descriptions, which would make FFmpeg read
# other files or addresses, are not among them.
_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,h264,hevc,gif",
    "protocol_whitelist": "file",
}
_SUFFIXES = (*VIDEO_SUFFIXES, ".mts", ".ogv", ".gif")  # that are listed
_GRANT = 1920 * 1088  # pixels of a frame that every file may have, whatever its header says
_SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "srt")
_SYNTHETIC = re.compile(r"synthetic(:\d{1,9})?")


@dataclass(frozen=True)
class OpenedSource:
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


def play(place: str | Path, title: str) -> OpenedSource:
    """A source at its own pace: cameras and live streams as they are, all others by the clock, over and over.

    Raises:
        UserError: it cannot be opened.
    """
    source = open_source(place)
    if source.live:
        return OpenedSource(source, title)
    with source:
        drawn = _SYNTHETIC.fullmatch(str(place)) is not None  # once; later there is a detector that needs the time
        reopen = partial(open_source, [frame.image for frame in source] if drawn else place)
    return OpenedSource(Playback(reopen, title), title)


class SourceOpener:
    """Opens sources for people who are not trusted with the server's files.

    All files together may have frames of `MAX_PIXELS`, as each is decoded in memory of its own; frames that outgrow
    what their file was granted when it was opened are skipped.

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
        self._granted: dict[object, int] = {}  # pixels of a frame, of every file that is open
        self._granting = threading.Lock()

    @property
    def directory(self) -> Path:
        """Where uploads are; made and removed by this object."""
        return Path(self._directory.name)

    def close(self) -> None:
        """Remove all uploads."""
        self._directory.cleanup()

    def offers(self) -> JsonObject:
        """What may be opened, as JSON values."""
        names = ("cameras", "urls", "synthetic", "max_bytes")
        return {"files": list(self.files()), **{name: getattr(self, name) for name in names}}

    def files(self) -> dict[str, Path]:
        """Videos of the media folder by what they are called; hidden ones are left out."""
        if self.media is None:
            return {}
        paths = [p.relative_to(self.media) for p in self.media.rglob("*") if p.suffix.lower() in _SUFFIXES]
        seen = [p for p in paths if not any(part.startswith(".") for part in p.parts)]
        return {os.fsencode(p).decode(errors="replace"): self.media / p for p in sorted(seen) if self._is_ours(p)}

    def open(self, text: str) -> OpenedSource:
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
        files = self.files()
        if text in files:
            return self._play_file(files[text], Path(text).name)
        known = "" if self.media is None else "a file of the server's media folder, "
        raise UserError(f"{text!r} is no source; expected {known}a camera number, an address, or synthetic:1")

    async def receive(self, title: str, chunks: AsyncIterator[bytes]) -> OpenedSource:
        """Store an upload under a name of our own and open it.

        Raises:
            UserError: it is no video, or cannot be stored, and nothing of it is kept; or there are too many uploads.
        """
        if len(list(self.directory.iterdir())) >= self.max_uploads:
            raise UserError(f"there are {self.max_uploads} uploads already; remove one first")
        path = self.directory / f"{secrets.token_hex(16)}.upload"
        remove = partial(path.unlink, missing_ok=True)
        title = "".join(c for c in Path(title.replace("\\", "/")).name if c.isprintable())[:80] or "upload"
        try:
            with path.open("xb") as file:
                async for chunk in chunks:
                    file.write(chunk)
            return await asyncio.to_thread(self._play_file, path, title, remove)  # decoding must not hold others up
        except BaseException as error:
            remove()
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise UserError(f"{title} cannot be stored: {error.strerror}") from error
            raise

    def _play_file(self, path: Path, title: str, remove: Callable[[], None] = lambda: None) -> OpenedSource:
        """Play a file that somebody chose, once a frame of it could be decoded."""
        ticket = object()

        def release() -> None:
            self._granted.pop(ticket, None)
            remove()

        with self._granting:  # one after the other, which bounds the memory that looking at them takes
            probe = _open_file(path, title, MAX_PIXELS)
            probe.close()
            pixels = max(_GRANT, probe.pixels)
            if sum(self._granted.values()) + pixels > MAX_PIXELS:
                raise UserError(f"{title} has frames too large to be watched beside the other files; remove one first")
            with _open_file(path, title, pixels) as source:
                next(iter(source))
            self._granted[ticket] = pixels
        return OpenedSource(Playback(partial(_open_file, path, title, pixels), title), title, release)

    def _is_ours(self, path: Path) -> bool:
        """Whether a path of the media folder leads to a file in it, symbolic links followed."""
        assert self.media is not None
        full = self.media / path
        return full.is_file() and full.resolve().is_relative_to(self.media)


def _open_file(path: Path, title: str, max_pixels: int) -> VideoFile:
    """A video in one of the known containers, whose larger frames are skipped.

    Raises:
        UserError: it is none.
    """
    try:
        source = VideoFile(Decoder(str(path), options=_OPTIONS, max_pixels=max_pixels))
    except UserError as error:
        raise UserError(f"{title} is not a video that can be played here (MP4, MOV, WebM, MKV, AVI, ...)") from error
    source.name = title
    return source


def public_name(source: str) -> str:
    """What a source is called: the name of a file, an address without its password."""
    return mask_secrets(source) if "://" in source else Path(source).name
