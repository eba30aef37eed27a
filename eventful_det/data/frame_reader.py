"""The frames of a data set, from pictures and from video files alike."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from eventful_det.data.coco_video import CocoVideo, Frame, Video
from eventful_det.data.video import open_source
from eventful_det.data.video.pictures import UnreadablePicture, read_image
from eventful_det.data.video.transforms import Image
from eventful_det.errors import UserError

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 10  # samples in a row that may hold an unreadable picture
Sample = TypeVar("Sample")


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


class ForwardReader(Iterator[Image]):
    """The frames `(h, w, 3)` uint8 RGB of a video file of a data set, in order.

    Raises:
        UserError: from where the file is damaged, and behind its last frame: the data set names more. Which frames
            were lost cannot be told, and labels must not move to other frames.

    Attributes:
        next: number of the next frame, from 0.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._source, self.next = path, open_source(path), 0
        self._frames = iter(self._source)

    def __next__(self) -> Image:
        frame = next(self._frames, None)
        if frame is None:
            raise UserError(f"{self._path} has only {self.next} frames, but the data set names more")
        if self._source.skipped:
            raise UserError(f"{self._path} is damaged behind frame {self.next - 1}; the rest cannot be used")
        self.next += 1
        return frame.image

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()


class _VideoFile:
    """Frames of a video file by their number, decoded in order; those decoded before they are asked for are kept."""

    def __init__(self, path: Path, video: Video) -> None:
        self._path = path
        self._wanted = {frame.frame_id for frame in video.frames}
        self._decoded: dict[int, Image] = {}
        self._reader: ForwardReader | None = None
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
        self._reader = self._reader or ForwardReader(self._path)
        number = self._reader.next
        image = next(self._reader)
        if number in self._wanted:
            self._decoded[number] = image

    def _release(self) -> None:
        """Let go of the file."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def close(self) -> None:
        """Let go of the file and of the frames that nobody asked for."""
        self._release()
        self._decoded.clear()


def read_labelled(path: str | Path, frame: Frame) -> Image:
    """Read a picture of a data set, see `read_image`.

    Raises:
        UnreadablePicture: it cannot be read, or has another size than the data set says: its labels would not fit.
    """
    return check_size(read_image(path), frame)


def check_size(image: Image, frame: Frame) -> Image:
    """The picture of a frame, if it has the size that the data set says.

    Raises:
        UnreadablePicture: it has not; for example because it was resized, or turned where EXIF data asks for it.
    """
    height, width = image.shape[:2]
    if (width, height) != (frame.width, frame.height):
        told = f"{frame.width}x{frame.height}"
        raise UnreadablePicture(
            f"{frame.file_name} is {width}x{height}, but the data set says {told}; prepare it again"
        )
    return image


def first_readable(make: Callable[[int], Sample], n: int) -> Sample:
    """`make(n)`; where a picture of it cannot be read, `make(n + 1)`, and so on: one bad file must not end a training.

    Raises:
        UnreadablePicture: none of ten in a row can be read.
    """
    for attempt in range(n, n + _ATTEMPTS):
        try:
            return make(attempt)
        except UnreadablePicture as error:
            last = error
            _LOG.warning("%s; sample %d is left out", error, attempt)
    raise UnreadablePicture(f"{_ATTEMPTS} training samples in a row hold unreadable pictures, the last: {last}")
