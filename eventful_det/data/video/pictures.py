"""Pictures from files; one that is not whole is an error, never a picture with a grey half."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL.Image

from eventful_det.data.video.transforms import Image
from eventful_det.errors import UserError

MAX_PIXELS = 1 << 27  # of a picture; more is taken for a damaged or malicious header
_JPEG, _END = b"\xff\xd8", b"\xd9"
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # all but escaped bytes, restarts and padding


class UnreadablePicture(UserError):
    """A picture is missing, empty, cut short or no picture, or not the one that its labels are for."""


def read_image(path: str | Path) -> Image:
    """Read a picture as `(h, w, 3)` uint8 RGB, upright.

    Raises:
        UnreadablePicture: the file is missing, empty, cut short or no picture, or claims to be huge.
    """
    return np.asarray(cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_grey(path: str | Path) -> Image:
    """Read a picture as `(h, w)` uint8; see `read_image`."""
    return _decode(path, cv2.IMREAD_GRAYSCALE)


def _decode(path: str | Path, flags: int) -> Image:
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise UnreadablePicture(f"cannot read the image {path}: it is no regular file")
        data = Path(path).read_bytes()
        if not data:
            raise ValueError("the file is empty")
        if data.startswith(_JPEG) and not _is_whole(data):
            raise ValueError("it is cut short")  # OpenCV decodes half of it without complaint and leaves the rest grey
        picture_size(io.BytesIO(data))
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is None:
            raise ValueError("not a readable picture")
    except UnreadablePicture:
        raise
    except (OSError, ValueError, cv2.error) as error:
        raise UnreadablePicture(f"cannot read the image {path}: {_reason(error)}") from None
    return np.asarray(image, dtype=np.uint8)


def picture_size(file: str | Path | IO[bytes]) -> tuple[int, int]:
    """Width and height that the header of a picture states, as stored: EXIF data may ask for a turn.

    Raises:
        ValueError: it is no picture, or claims more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(file) as opened:
                width, height = opened.size
    except PIL.UnidentifiedImageError:
        raise ValueError("not a readable picture") from None
    except PIL.Image.DecompressionBombError:
        width, height = MAX_PIXELS + 1, 1
    except SyntaxError as error:
        raise ValueError(str(error)) from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"it claims more than {MAX_PIXELS:,} pixels")
    return width, height


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG reaches its end marker. Previews within its segments, and what follows it, are not part of it."""
    place = len(_JPEG)
    while found := _MARKER.search(data, place):
        if found[1] == _END:
            return True
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, cv2.error):
        return "not a readable picture"
    return str(getattr(error, "strerror", None) or error)
