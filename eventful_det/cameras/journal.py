"""Events on disk, in order, so that nobody waits for whoever reads them: a bounded journal in files of JSON lines.

Everybody who delivers events keeps an offset in the journal and moves it on when one was taken: at least once, across
restarts, and in no memory. What is older than the journal is long is gone, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from eventful_det.cameras.events import Event
from eventful_det.files import written_whole

_FILES = 8  # that a full journal is made of
_WAITING = 1000  # events that wait in memory for a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors for which old files may go
_LOG = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An event as it was written, without its line's end; and where the next one begins."""

    line: bytes
    following: int


class Journal:
    """Events that are kept up to so many bytes. `append` and `read` may be used from any thread.

    Args:
        folder: made when needed; its files are called by the offset of their first byte.
        most: bytes.
        make_room: called when the disk is full; whether it could free something.
    """

    def __init__(self, folder: Path, most: int, make_room: Callable[[], bool] = lambda: False) -> None:
        self.folder, self._make_room = folder, make_room
        self._size = max(1, most // _FILES)
        self._lock, self._appended = threading.Lock(), threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._full = False
        self.lost = 0
        folder.mkdir(parents=True, exist_ok=True)
        starts = self._starts()
        self._start = starts[-1] if starts else 0
        path = self._path(self._start)
        self.end = self._start + (_whole_lines(path) if path.exists() else 0)
        self._file: IO[bytes] | None = None

    def append(self, event: Event) -> None:
        """Write an event; on a disk that stays full it waits in memory for the next one, where there is a bound."""
        with self._lock:
            self._waiting.append(json.dumps(event.record()).encode() + b"\n")
            if len(self._waiting) > _WAITING:
                self._waiting.popleft()
                self.lost += 1
            self._flush()
        with self._appended:
            self._appended.notify_all()

    def flush(self) -> None:
        """Try again to write what waits."""
        with self._lock:
            self._flush()

    def wait(self, seconds: float) -> None:
        """Until something is appended, at most so long."""
        with self._appended:
            self._appended.wait(seconds)

    @property
    def begin(self) -> int:
        """Offset of the oldest event."""
        return next(iter(self._starts()), self._start)

    def read(self, offset: int) -> Entry | None:
        """The event at an offset, or the oldest one if that is gone; None if there is none yet."""
        with self._lock:
            starts, end = self._starts(), self.end
            if offset >= end or not starts:
                return None
            offset = max(offset, starts[0])
            start = max(one for one in starts if one <= offset)
            with self._path(start).open("rb") as file:
                file.seek(offset - start)
                line = file.readline()
            if not line.endswith(b"\n"):  # the next file begins here
                later = [one for one in starts if one > start]
                return None if not later else Entry(b"", later[0])
            return Entry(line[:-1], offset + len(line))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._flush()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _flush(self) -> None:
        while self._waiting:
            try:
                self._write(self._waiting[0])
            except OSError as error:
                self._discard_file()
                if error.errno in FULL and self._make_room():
                    continue
                if not self._full:
                    _LOG.warning("events cannot be written: %s", error.strerror or error)
                self._full = True
                return
            self._waiting.popleft()
            self._full = False

    def _write(self, line: bytes) -> None:
        if self._file is None or self.end - self._start >= self._size:
            if self._file is not None:
                self._file.close()
            if self.end - self._start >= self._size:
                self._start = self.end
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            self._file = self._path(self._start).open("r+b" if self._path(self._start).exists() else "wb", buffering=0)
            self._file.truncate(self.end - self._start)  # half a line of a process that was killed
            self._file.seek(0, os.SEEK_END)
            for start in self._starts()[:-_FILES]:
                self._path(start).unlink(missing_ok=True)
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the disk is full")
        self.end += len(line)

    def _discard_file(self) -> None:
        """After an error: the next write opens the file anew, and cuts off what was written by half."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _starts(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:015d}.jsonl"


class Bookmark:
    """How far somebody has read a journal, in a file.

    Args:
        journal: that is read.
        name: of the reader, and of its file in the journal's folder.
    """

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._path = journal, journal.folder / f"{name}.offset"
        self.lost = 0  # bytes that were gone before they could be delivered
        try:
            self._offset = min(int(self._path.read_text()), journal.end)
        except (OSError, ValueError):
            self._offset = journal.end  # who is new is told of what happens from now on
            self._save()

    @property
    def behind(self) -> int:
        """Bytes that are not delivered yet."""
        return max(0, self._journal.end - self._offset)

    def next(self) -> Entry | None:
        """The first event that is not delivered yet; None if all are."""
        begin = self._journal.begin
        if self._offset < begin:
            self.lost += begin - self._offset
            self._offset = begin
        entry = self._journal.read(self._offset)
        while entry is not None and not entry.line:
            entry = self._journal.read(entry.following)
        return entry

    def advance(self, entry: Entry) -> None:
        """An event was delivered."""
        self._offset = entry.following
        self._save()

    def _save(self) -> None:
        with contextlib.suppress(ValueError), written_whole(self._path) as part:  # of a full disk: told twice at worst
            part.write_text(str(self._offset))


def _whole_lines(path: Path) -> int:
    """Bytes of a file up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1
