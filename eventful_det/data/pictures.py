"""Pictures from files; one that is not whole is an error, never a picture with a grey half."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from eventful_det.data.transforms import Image
from eventful_det.errors import UserError

_LOG = logging.getLogger(__name__)
_JPEG, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_ATTEMPTS = 10  # samples in a row that may hold an unreadable picture

Sample = TypeVar("Sample")


class UnreadablePicture(UserError):
    """A picture is missing, empty, cut short or no picture."""


def read_image(path: str) -> Image:
    """Read a picture as `(h, w, 3)` uint8 RGB.

    Raises:
        UnreadablePicture: the file is missing, empty, cut short or no picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadablePicture(f"cannot read the image {path}: {error.strerror}") from None
    # OpenCV decodes half a JPEG without complaint and leaves the rest grey.
    if data.startswith(_JPEG) and data.rfind(_END) < data.rfind(_SCAN):
        raise UnreadablePicture(f"cannot read the image {path}: it is cut short")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise UnreadablePicture(
            f"cannot read the image {path}: {'not a readable picture' if data else 'the file is empty'}"
        )
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


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
