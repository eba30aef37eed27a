"""A folder of clips on a disk that may be full: old ones go by their age, and for the sake of room."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventful_det.cameras.config import Clips
from eventful_det.cameras.journal import FULL

if TYPE_CHECKING:
    from typing_extensions import Buffer

_RESERVE = 64 * 2**20  # bytes of the disk that are left free, or a hundredth of it
_SUFFIXES = {".mp4", ".jpg"}
_LOG = logging.getLogger(__name__)


class Library:
    """The clips of all cameras, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path, options: Clips) -> None:
        self.folder, self.options = folder, options
        self.lost = 0  # files that could not be written
        self._lock = threading.Lock()
        self._open: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def tidy(self) -> None:
        """Remove what is too old, or too much."""
        files = self._files()
        oldest = time.time() - 86_400 * self.options.days
        sizes: dict[Path, float] = {}
        for path, at, size in reversed(files):  # from the newest on
            sizes[path.parent] = sizes.get(path.parent, 0) + size
            if at < oldest or sizes[path.parent] > 1e6 * self.options.megabytes:
                self._remove(path)
        while self._short() and self.make_room():
            pass

    def make_room(self) -> bool:
        """Remove the oldest file; whether there was one."""
        return any(self._remove(path) for path, _, _ in self._files())

    def open(self, path: Path) -> ClipFile:
        """Write a file, which is not removed until it is closed; its folder is made when needed."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._open.add(path)
        return ClipFile(path, self)

    def release(self, path: Path, failed: bool) -> None:
        """A file is written, or could not be."""
        with self._lock:
            self._open.discard(path)
        if failed:
            self.lost += 1
            self._remove(path)

    def _files(self) -> list[tuple[Path, float, int]]:
        """Files that may be removed, with their times and sizes, oldest first."""
        found = []
        for path in self.folder.glob("*/*"):
            try:
                if path.suffix in _SUFFIXES and path not in self._open:
                    about = path.stat()
                    found.append((path, about.st_mtime, about.st_size))
            except OSError:
                continue
        return sorted(found, key=lambda one: one[1])

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink()
        except OSError:
            return False
        return True

    def _short(self) -> bool:
        usage = shutil.disk_usage(self.folder)
        return usage.free < min(_RESERVE, usage.total // 100)


class ClipFile(io.RawIOBase):
    """A file for FFmpeg, which must not know of a full disk: old clips go first; if there are none, this one does."""

    def __init__(self, path: Path, library: Library) -> None:
        super().__init__()
        self.path, self.failed = path, False
        self._library, self._at = library, 0
        self._file: Any = None
        self._file = self._try(lambda: path.open("w+b", buffering=0))

    def write(self, data: Buffer) -> int:
        """All of the data, or none if the file is given up."""
        view = memoryview(data)
        done = 0
        while done < len(view) and not self.failed:
            done += self._try(lambda: self._file.write(view[done:])) or 0  # noqa: B023
        self._at += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Bytes that were written."""
        data: bytes = b"" if self.failed else self._file.read(size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an offset."""
        if self.failed:
            return self._at
        self._at = self._file.seek(offset, whence)
        return self._at

    def tell(self) -> int:
        """The offset."""
        return self._at

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Close it; one that was given up is removed."""
        if not self.closed:
            super().close()
            if self._file is not None:
                self._file.close()
            self._library.release(self.path, self.failed)

    def _try(self, work: Any) -> Any:
        """Do it, and again while there is an old file to remove for it."""
        while True:
            try:
                return work()
            except OSError as error:
                if error.errno in FULL and self._library.make_room():
                    continue
                _LOG.warning("%s cannot be written: %s", self.path.name, error.strerror or error)
                self.failed = True
                return None
