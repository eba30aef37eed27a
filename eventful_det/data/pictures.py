"""Pictures from files; one that is not whole is an error, never a picture with a grey half."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from eventful_det.data.transforms import Image
from eventful_det.errors import UserError

_JPEG, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"


def read_image(path: str) -> Image:
    """Read a picture as `(h, w, 3)` uint8 RGB.

    Raises:
        UserError: the file is missing, empty, cut short or no picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror}") from None
    # OpenCV decodes half a JPEG without complaint and leaves the rest grey.
    if data.startswith(_JPEG) and data.rfind(_END) < data.rfind(_SCAN):
        raise UserError(f"cannot read the image {path}: it is cut short")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise UserError(f"cannot read the image {path}: {'not a readable picture' if data else 'the file is empty'}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
