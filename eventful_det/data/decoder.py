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
from av.error import ExitError, FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from eventful_det.data.live import CapturedFrame, LiveClock
from eventful_det.data.source import VideoFrame, VideoSource, public_name
from eventful_det.errors import UserError

MAX_PIXELS = 8192 * 8192  # of a frame; larger ones are attacks rather than videos
SILENCE = 10.0  # seconds to wait for an address to open, and for more of its data
_SEGMENTED = {"hls", "dash"}  # come in bursts of seconds, of which the newest frame alone would be a slide show
_OPTIONS = {
    "rtsp": {"rtsp_transport": "tcp"},  # loses no packets
    "rtsps": {"rtsp_transport": "tcp"},
    "http": {"reconnect": "1", "reconnect_delay_max": "4"},  # of files: FFmpeg goes on where the connection broke
    "https": {"reconnect": "1", "reconnect_delay_max": "4"},
}
Skip = Callable[[str, object], None]


class Decoder:
    """One opened video.

    Args:
        url: a file or an address.
        silence: seconds to wait for an address to open, and for more of its data.
        options: of FFmpeg, for opening it.
        max_pixels: of a frame; larger ones are not decoded, so that they take no memory.

    Attributes:
        pixels: of a frame, as the header says; 0 if it does not.
        fps: frames per second, or None if unknown.
        frames: estimate of their number, or None if unknown.
        remote: it is behind an address.
        live: it has no end that is known.

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
        self.name, self.remote, self._silence = public_name(url), "://" in url, silence
        limit = {"max_pixels": str(max_pixels)}
        transport = _OPTIONS.get(url.partition("://")[0].lower(), {}) if self.remote else {}
        options = {**transport, **options, **limit}
        try:
            self._container = av.open(
                url, timeout=silence if self.remote else None, options=options, metadata_errors="replace"
            )
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"cannot open {self.name} as a video: {_reason(error)}") from error
        weakref.finalize(self, self._container.close)
        videos = self._container.streams.video
        if not videos or self._container.format.name == "tty":  # FFmpeg renders text files as pictures
            raise UserError(f"{self.name} holds no video")
        self._stream = videos[0]
        if self._stream.codec_context is None:
            raise UserError(f"{self.name}: there is no decoder for its video")
        self._stream.codec_context.options = limit
        self.pixels = self._stream.width * self._stream.height
        self._clock = float(self._stream.time_base or 0)
        seconds = None if self._container.duration is None else self._container.duration / av.time_base
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.frames = self._stream.frames or (round(seconds * self.fps) if seconds and self.fps else None)
        self.live = self.remote and seconds is None and self._container.format.name not in _SEGMENTED

    def read(self, skip: Skip) -> Iterator[VideoFrame]:
        """All frames, in order. `skip` is told what cannot be decoded, and why."""
        first: int | None = None
        picture = _Painter()
        for packet in self._packets(skip):
            for frame in self._decode(packet, skip):
                first = frame.pts if first is None else first
                timed = first is not None and frame.pts is not None
                yield VideoFrame(picture(frame), (frame.pts - first) * self._clock if timed else None)

    def read_live(self, skip: Skip) -> Iterator[CapturedFrame | None]:
        """The frames of a live stream as they come; None in place of one that came too late to be worth decoding."""
        clock, picture = LiveClock(), _Painter()
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
                yield from (packet for packet in self._container.demux(self._stream) if packet.size)
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
        self._decoder = decoder

    def _read(self) -> Iterator[VideoFrame]:
        return self._decoder.read(self._skip)

    def _release(self) -> None:
        self._decoder.close()


class _Painter:
    """Turns decoded frames into upright RGB pictures."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """`(h, w, 3)` uint8 RGB."""
        image = np.asarray(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _reason(error: BaseException) -> str:
    """What FFmpeg says, without its codes and our path."""
    if isinstance(error, ExitError):  # raised by PyAV's timeouts
        return "timed out"
    return str(getattr(error, "strerror", None) or error)
