"""H.264 video files that play everywhere, even when the program that wrote them died.

::

    with VideoWriter("out.mp4", fps=25) as writer:
        writer.write(image)
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import IO, Annotated, Any

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from eventful_det.data.video.transforms import resize
from eventful_det.errors import UserError
from eventful_det.options import Range

Rate = Annotated[int, Range(1, 1000)]  # frames per second

# Fragments, so that the file plays however its writing ends; `close` turns them into an ordinary seekable mp4.
# Negative offsets, so that it begins at 0 although the encoder holds frames back.
OPTIONS = {"movflags": "hybrid_fragmented+frag_keyframe+negative_cts_offsets", "flush_packets": "1"}
_TICKS = 90_000  # per second, in which the times of frames are written
_GAP = 3600.0  # seconds that a frame is shown at most; a longer leap is one of the clock


class VideoWriter:
    """Writes RGB frames of any size as H.264 (yuv420p, BT.709) in mp4, in constant memory.

    The first frame sets the size of the video, made even; frames of other sizes are letterboxed into it. The file
    is playable up to the last second at any time.

    Args:
        path: of the mp4 file; replaced if it exists.
        file: written to in its place; can seek.
        fps: frames per second, of frames that come without a time.
        quality: x264's constant rate factor; 18 looks flawless, 28 is small.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float = 25.0, quality: int = 20, file: IO[bytes] | None = None
    ) -> None:
        self.path = Path(path)
        self.frames = 0
        self.fps = Fraction(fps).limit_denominator(1001)
        self.quality = quality
        try:
            if file is None:
                self.path.open("wb").close()  # FFmpeg would complain only at the first frame
            self._container = av.open(file or str(path), "w", format="mp4", options=OPTIONS)
        except (FFmpegError, OSError) as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        self._stream: Any = None
        self._ticks, self._shift = -1, 0  # of the last frame; by which times given are late

    def write(self, image: NDArray[np.uint8], timestamp: float | None = None) -> None:
        """Append a frame.

        Args:
            image: `(h, w, 3)` uint8 RGB.
            timestamp: seconds at which it is shown, relative to that of the first frame; None = a frame after the
                last one. Gaps stay; where times run backwards or leap by more than an hour, the next frame follows.

        Raises:
            UserError: the file cannot be written, for example because the disk is full.
        """
        if self._stream is None:
            self._start(*image.shape[:2])
        picture = _letterbox(image, self._stream.height, self._stream.width)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        frame.pts = self._time(timestamp)
        try:
            self._container.mux(self._stream.encode(frame))
        except FFmpegError as error:
            self._stream = None  # FFmpeg may crash when more is written behind a header that it could not write
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.frames += 1

    def close(self) -> None:
        """Finish the file.

        Raises:
            UserError: the file cannot be written.
        """
        stream, self._stream = self._stream, None
        try:
            try:
                if stream is not None:
                    self._container.mux(stream.encode(None))
            finally:
                self._container.close()
        except FFmpegError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time(self, timestamp: float | None) -> int:
        """When to show the next frame, in ticks."""
        step = round(_TICKS / self.fps)
        following = self._ticks + step if self._ticks >= 0 else 0
        given = following if timestamp is None else round(timestamp * _TICKS) + self._shift
        if self._ticks < 0 or not self._ticks < given <= self._ticks + _GAP * _TICKS:
            self._shift += following - given
            given = following
        self._ticks = given
        return given

    def _start(self, height: int, width: int) -> None:
        second = str(max(1, round(self.fps)))
        options = {"preset": "veryfast", "crf": str(self.quality), "g": second}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, _TICKS)
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = 1  # BT.709
        self._stream = stream


def _letterbox(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Fit a picture into `(height, width, 3)`: one pixel of padding repeats the edge, borders are black."""
    down, right = height - image.shape[0], width - image.shape[1]
    if (down, right) == (0, 0):
        return image
    if 0 <= down <= 1 and 0 <= right <= 1:
        return np.asarray(cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_REPLICATE), np.uint8)
    scale = min(height / image.shape[0], width / image.shape[1])
    image = resize(image, max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
