"""The frames of a data set, from pictures and from video files alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.pictures import check_size, read_image
from eventful_det.data.transforms import Image
from eventful_det.data.video import VideoFrame, VideoSource, open_source
from eventful_det.errors import UserError


class FrameReader:
    """Reads the frames of a data set; may be asked by several threads.

    The frames of a video file have to be asked for in about their order, each once: the file is decoded once, and
    closed behind the last one.
    """

    def __init__(self, data: CocoVideo) -> None:
        self._data = data
        self._files: dict[int, _VideoFile] = {}
        self._lock = threading.Lock()

    def read(self, video: Video, frame: Frame) -> Image:
        """One frame `(h, w, 3)` uint8 RGB.

        Raises:
            UserError: it is missing or damaged, or has another size than the data set says: its labels would not fit.
        """
        if video.file_name:
            with self._lock:
                if video.id not in self._files:
                    self._files[video.id] = _VideoFile(self._data.image_root / video.file_name, video)
            image = self._files[video.id].read(frame.frame_id)
        else:
            image = read_image(self._data.image_path(frame))
        return check_size(image, frame)

    def close(self) -> None:
        """Close all video files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _VideoFile:
    """Frames of a video file by their number, decoded in order; those decoded before they are asked for are kept."""

    def __init__(self, path: Path, video: Video) -> None:
        self._path = path
        self._wanted = {frame.frame_id for frame in video.frames}
        self._decoded: dict[int, Image] = {}
        self._next = 0
        self._source: VideoSource | None = None
        self._frames: Iterator[VideoFrame] | None = None
        self._fault = ""
        self._lock = threading.Lock()

    def read(self, number: int) -> Image:
        with self._lock:
            try:
                while number not in self._decoded:
                    self._advance()
            except UserError as error:
                self._fault = str(error)  # the file is not tried again for every frame that it should hold
                raise
            finally:
                self._wanted.discard(number)
                image = self._decoded.pop(number, None)
                if not self._wanted or self._fault:
                    self._release()  # frames decoded before the fault are still asked for by other threads
            assert image is not None  # or it would have raised
            return image

    def _advance(self) -> None:
        """Decode the next frame."""
        if self._fault:
            raise UserError(self._fault)
        if self._frames is None:
            self._source = open_source(self._path)
            self._frames = iter(self._source)
        frame = next(self._frames, None)
        if frame is None:
            raise UserError(f"{self._path} has only {self._next} frames, but the data set names more")
        if self._source is not None and self._source.skipped:
            # Which frames were lost cannot be told, and labels must not move to other frames.
            raise UserError(f"{self._path} is damaged behind frame {self._next - 1}; the rest cannot be used")
        if self._next in self._wanted:
            self._decoded[self._next] = frame.image
        self._next += 1

    def _release(self) -> None:
        """Let go of the file."""
        if self._source is not None:
            self._source.close()
        self._source = self._frames = None

    def close(self) -> None:
        """Let go of the file and of the frames that nobody asked for."""
        self._release()
        self._decoded.clear()
