"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eventful_det.errors import UserError

JsonObject = dict[str, Any]
"""An object of a JSON file, as it was read or is to be written."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends; its folder is made when needed.

    When the block raises, nothing is left of it and `path` is as it was.

    Raises:
        UserError: the disk is full, or the file cannot be written; the message names `path`.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:100]}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name without its bytes
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        if any(text in str(error) for text in (os.strerror(errno.ENOSPC), "PytorchStreamWriter", "IoError")):
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
        raise
    finally:
        with suppress(OSError):
            part.unlink()
