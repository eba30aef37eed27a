"""What a run leaves behind: in a folder of its own, whole or not there, without passwords."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from eventful_det.errors import UserError, printable
from eventful_det.files import written_whole

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

LOCK = ".in_use"  # in every folder that is being written to
_LONGEST = 100  # characters of the name of a folder


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Keep other processes out of an output folder for the length of the block.

    The folder is made; where nothing was written into it, it is removed again. The lock is advisory, and gone with the
    process that holds it, however that ends.

    Raises:
        UserError: another process writes there, or the folder cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / LOCK
    with reporting(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = _take(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> int:
    """The lock, as an open file that holds the process id."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by child processes, unlike flock
        except (BlockingIOError, PermissionError):
            owner = os.read(file, 20).decode(errors="replace").strip() or "another"
            os.close(file)
            raise UserError(f"{path.parent}: output is in use by process {owner}; choose another output") from None
        except OSError:
            pass  # a file system without locks
        try:
            current = os.path.samestat(os.stat(path), os.fstat(file))
        except FileNotFoundError:
            current = False
        if current:
            with contextlib.suppress(OSError):  # of a full disk, about which the results have to say more
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
            return file
        os.close(file)  # its owner was just removing it


@contextmanager
def reporting(place: Path) -> Iterator[None]:
    """Errors of files as one line that names the file.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or place}: {error.strerror or error}") from error


def markdown_table(lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first line is the header; all but the first `left` columns are aligned to the right."""
    header, *rows = lines
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, values: object, indent: int | None = 1) -> None:
    """Write a JSON file of what `as_json` makes of values, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, json.dumps(as_json(values), indent=indent) + "\n")


def as_json(value: object) -> object:
    """A value as JSON holds it: dataclasses as objects, `nan` as null, paths as text, and every text `printable`."""
    if isinstance(value, (str, os.PathLike)):
        return printable(str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {as_json(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_names(titles: Iterable[str], reserved: Iterable[str] = ()) -> list[str]:
    """Names for files or folders, one for each title and all different, wherever letters' case makes none.

    They hold letters, digits, `-`, `_` and inner dots only, and are none of those `reserved`.
    """
    names: list[str] = []
    taken = set(reserved)
    for title in titles:
        name = re.sub(r"[^\w.-]", "_", printable(title)).strip(". ")[:_LONGEST] or "source"
        numbered: Iterable[str] = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        name = next(one for one in numbered if one.lower() not in taken)
        taken.add(name.lower())
        names.append(name)
    return names


class Stdout:
    """Standard output. A closed pipe or a full disk silences it, an alphabet that it lacks becomes "?"."""

    def write(self, text: str) -> int:
        with self._silenced():
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._silenced():
            sys.stdout.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stdout, name)

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, AttributeError):
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def print_error(text: str, kind: str = "error: ") -> None:
    """Print an error in one line."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{kind}{' '.join(printable(text).split())}", file=sys.stderr, flush=True)
