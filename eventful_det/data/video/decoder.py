"""Videos in files and behind addresses, decoded by FFmpeg."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import ExitError, FFmpegError
from av.stream import Disposition
from av.video import VideoStream
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from eventful_det.data.source import VideoFrame, VideoSource
from eventful_det.data.video.live import CapturedFrame, LiveClock
from eventful_det.errors import UserError
from eventful_det.secrets import mask_secrets

MAX_PIXELS = 8192 * 8192  # of a frame; larger ones are attacks rather than videos
SILENCE = 10.0  # seconds to wait for an address to open, and for more of its data
_SEGMENTED = {"hls", "dash"}  # come in bursts of seconds, of which the newest frame alone would be a slide show
_OPTIONS = {
    "rtsp": {"rtsp_transport": "tcp"},  # loses no packets
    "rtsps": {"rtsp_transport": "tcp"},
    "http": {"reconnect": "1", "reconnect_delay_max": "4"},  # of files: FFmpeg goes on where the connection broke
    "https": {"reconnect": "1", "reconnect_delay_max": "4"},
}
_TIMED = {"matroska", "mov", "avi", "flv"}  # formats whose header holds the duration
_WHOLE = 0.95  # share of the frames named by the header from which on a video counts as whole
_ASPECTS = (0.2, 5.0)  # of pixels that are believed
Skip = Callable[[str, object], None]


class Decoder:
    """One opened video.

    Args:
        url: a file or an address.
        silence: seconds to wait for an address to open, and for more of its data.
        options: of FFmpeg, for opening it.
        max_pixels: of a frame; larger ones are not decoded, so that they take no memory.

    Attributes:
        pixels: of a frame as it is shown, as the header says; 0 if it does not.
        fps: frames per second, or None if unknown.
        frames: estimate of their number, or None if unknown.
        remote: it is behind an address.
        live: it has no end that is known.
        tap: called with each packet before it is decoded, in the thread that reads.

    Raises:
        UserError: it cannot be opened, or holds no video.
    """

    def __init__(
        self,
        url: str,
        silence: float = SILENCE,
        *,
        options: Mapping[str, str] = MappingProxyType({}),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name, self.remote, self._silence = mask_secrets(url), "://" in url, silence
        limit = {"max_pixels": str(max_pixels)}
        transport = _OPTIONS.get(url.partition("://")[0].lower(), {}) if self.remote else {}
        options = {**transport, **options, **limit}
        try:
            self._container = open_container(url, options, silence if self.remote else None)
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"cannot open {self.name} as a video: {_reason(error)}") from error
        weakref.finalize(self, self._container.close)
        self._stream = best_video(self._container, self.name)
        self._stream.codec_context.options = limit
        self.pixels = round(self._stream.width * self._stream.height * self._painter().stretch)
        self.tap: Callable[[Any], None] | None = None
        self._clock = float(self._stream.time_base or 0)
        seconds = None if self._container.duration is None else self._container.duration / av.time_base
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.frames = self._stream.frames or (round(seconds * self.fps) if seconds and self.fps else None)
        self._told = self._stream.frames or (self.frames if self._has_duration() else None)
        self.live = self.remote and seconds is None and self._container.format.name not in _SEGMENTED

    def read(self, skip: Skip) -> Iterator[VideoFrame]:
        """All frames, in order. `skip` is told what cannot be decoded, and why."""
        first: int | None = None
        picture, count, lost = self._painter(), 0, 0

        def lose(what: str, error: object) -> None:
            nonlocal lost
            lost += 1
            skip(what, error)

        for packet in self._packets(lose):
            for frame in self._decode(packet, lose):
                first = frame.pts if first is None else first
                timed = first is not None and frame.pts is not None
                count += 1
                yield VideoFrame(picture(frame), (frame.pts - first) * self._clock if timed else None)
        if not lost and self._told and count < _WHOLE * self._told:
            skip("the rest", f"it ends after {count} of {self._told} frames that its header names; it was cut short")

    def read_live(self, skip: Skip) -> Iterator[CapturedFrame | None]:
        """The frames of a live stream as they come; None in place of one that came too late to be worth decoding."""
        clock, picture = LiveClock(), self._painter()
        captured, asked = None, time.monotonic()
        seen = asked
        for packet in self._packets(skip):
            if packet is not None:
                stamp = None if packet.dts is None else packet.dts * self._clock
                captured = clock.admit(stamp, packet.is_keyframe, asked)
            frames = [] if captured is None else self._decode(packet, skip)
            if captured is None:
                yield None
            else:
                for frame in frames:
                    yield CapturedFrame(captured, partial(picture, frame))
            if frames or captured is None:
                seen = time.monotonic()
            elif time.monotonic() - seen > self._silence:
                raise UserError(f"{self.name} sends nothing that can be decoded")
            asked = time.monotonic()

    def close(self) -> None:
        """Close the file or connection."""
        self._container.close()

    def _has_duration(self) -> bool:
        """Whether its header says how long the video is; otherwise the duration is that of the sound, or estimated."""
        alone = len(self._container.streams) == 1
        return alone and bool(_TIMED & set(self._container.format.name.split(",")))

    def _painter(self) -> _Painter:
        aspect = self._stream.sample_aspect_ratio
        return _Painter(float(aspect) if aspect else 1.0)

    def _decode(self, packet: Any, skip: Skip) -> list[Any]:
        try:
            return self._stream.codec_context.decode(packet)
        except FFmpegError as error:
            skip("a packet", _reason(error))
            return []

    def _packets(self, skip: Skip) -> Iterator[Any]:
        """Packets, then None, which flushes the decoder."""
        while True:
            try:
                # An empty packet would put the decoder into its final state; some AVI files hold them midway.
                for packet in self._container.demux(self._stream):
                    if packet.size:
                        if self.tap is not None:
                            self.tap(packet)
                        yield packet
                break
            except IndexError:  # PyAV stumbles over packets of streams that turn up midway; it can go on behind them
                continue
            except FFmpegError as error:
                if self.remote:
                    raise UserError(f"{self.name} broke off: {_reason(error)}") from error
                skip("the rest", _reason(error))
                break
        yield None


class VideoFile(VideoSource):
    """A video with an end: every frame, in order."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.name, decoder.fps, decoder.frames)
        self.remote, self.pixels = decoder.remote, decoder.pixels
        self.decoder = decoder

    def _read(self) -> Iterator[VideoFrame]:
        return self.decoder.read(self._skip)

    def _release(self) -> None:
        self.decoder.close()


class _Painter:
    """Turns decoded frames into RGB pictures as they are meant: upright, not mirrored, with square pixels.

    Args:
        aspect: width of a stored pixel relative to its height.
    """

    def __init__(self, aspect: float) -> None:
        self._reformatter = VideoReformatter()
        self._matrix: NDArray[np.int32] | None = None
        self._rotation: float | None = None  # by which it was found
        self._aspect = aspect if _ASPECTS[0] <= aspect <= _ASPECTS[1] and abs(aspect - 1) > 0.01 else 1.0
        self.stretch = max(self._aspect, 1 / self._aspect)

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """`(h, w, 3)` uint8 RGB."""
        width, height = round(frame.width * max(1, self._aspect)), round(frame.height * max(1, 1 / self._aspect))
        scaled = self._reformatter.reformat(frame, width=width, height=height, format="rgb24")
        image = np.asarray(scaled.to_ndarray(), np.uint8)
        if frame.rotation != self._rotation:  # asking for more makes a circle, which keeps the frame in memory for long
            matrix = frame.side_data.get("DISPLAYMATRIX")
            self._matrix = None if matrix is None else np.frombuffer(bytes(matrix), np.int32)
            self._rotation = frame.rotation
        return np.ascontiguousarray(image if self._matrix is None else _displayed(image, self._matrix))


def _displayed(image: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """A picture `(h, w, 3)` turned and mirrored by a display matrix `(9,)` of FFmpeg, to whole quarters of a turn.

    A stored pixel (x, y) is shown at (a x + c y, b x + d y), with a, b, _, c, d as the first five numbers.
    """
    a, b, _, c, d = matrix[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def open_container(url: str, options: dict[str, str] | None = None, timeout: float | None = None) -> InputContainer:
    """FFmpeg's view of a file or address; titles in whatever encoding are no reason to refuse it.

    Raises:
        FFmpegError, OSError, ValueError: it cannot be opened.
    """
    try:
        return av.open(url, timeout=timeout, options=options or {}, metadata_errors="replace")
    except TypeError:  # PyAV 19 and later always replace what they cannot decode
        return av.open(url, timeout=timeout, options=options or {})


def best_video(container: InputContainer, name: str) -> VideoStream:
    """The video stream that players show: no cover picture, the default one, the largest.

    Args:
        container: from `open_container`.
        name: of the file, for messages.

    Raises:
        UserError: there is none, or no decoder for it.
    """
    videos = [v for v in container.streams.video if not Disposition(v.disposition) & Disposition.attached_pic]
    if not videos or container.format.name == "tty":  # FFmpeg renders text files as pictures
        raise UserError(f"{name} holds no video")
    decodable = [video for video in videos if video.codec_context is not None]
    if not decodable:
        raise UserError(f"{name}: there is no decoder for its video")

    def rank(video: VideoStream) -> tuple[bool, int]:
        return bool(Disposition(video.disposition) & Disposition.default), video.width * video.height

    return max(decodable, key=rank)


def _reason(error: BaseException) -> str:
    """What FFmpeg says, without its codes and our path."""
    if isinstance(error, ExitError):  # raised by PyAV's timeouts
        return "timed out"
    return str(getattr(error, "strerror", None) or error)
