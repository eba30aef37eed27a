"""Files of tensors: recognised by their content, read safely, and loaded with every key accounted for.

Nothing here runs what a file says, and nothing is made that is larger than the file: safetensors hold tensors only, and
pickles, bare or inside of PyTorch's files, are read by `safe_pickle`.
"""

from __future__ import annotations

import functools
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from eventful_det.detectors.checkpoints.safe_pickle import RefusedError, Storage, read_pickle, stored
from eventful_det.detectors.hub import WEIGHTS
from eventful_det.detectors.rf_detr.sizes import NAMES
from eventful_det.errors import UserError, first_line
from eventful_det.files import written_whole

_INNER = ("model", "state_dict", "model_state")  # where checkpoints keep the weights, beside optimisers and the like
_HEADER = 10_000_000  # bytes of the header of a safetensors file, at most
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what PyTorch's files began with before they were archives
_CHECKSUM = "crc32"  # in the metadata of our safetensors


FORMAT = "eventful-det/1"  # of a detector of ours, in the metadata of its safetensors
DEFAULT = "vitdet_tiny_vid"
SYNTHETIC = "vitdet_tiny_synthetic"


@dataclass(frozen=True)
class Contents:
    """What a file of tensors holds.

    Attributes:
        tensors: by name, float32; all numbers are finite.
        notes: of a safetensors file the metadata.
        others: what else is beside the tensors in a checkpoint: plain data, not looked at yet.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, str] = field(default_factory=dict)
    others: dict[str | int, object] = field(default_factory=dict)


def find_weights(source: str | os.PathLike[str] | None = None) -> Path:
    """The file of a path, of the name of shipped weights, or of the shipped default.

    Raises:
        UserError: there is none.
    """
    source = str(DEFAULT if source is None else source)
    path = Path(source)
    if path.is_dir():
        path /= WEIGHTS
    if path.is_file():
        return path
    shipped = Path(str(resources.files("eventful_det"))) / "weights"
    named = shipped / f"{source}.safetensors"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.safetensors"))) or "none"
    raise UserError(
        f"no weights {source!r}: neither a file nor one of the shipped names ({names}) nor of {', '.join(NAMES)}"
    )


def is_ours(path: Path) -> bool:
    """Whether a file is a detector that `save_detector` wrote; its header alone is read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_tensors(path: str | os.PathLike[str]) -> Contents:
    """Read a safetensors file, a checkpoint of PyTorch or a pickle of arrays, whatever its name is.

    Raises:
        UserError: the file is missing, truncated, damaged, of another kind, asks for more than data, claims more
            tensors than it holds, or has numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}")
    try:
        contents = _read(path)
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(
            f"{path} is refused: it asks for {error}, but a weights file holds tensors, containers, strings and "
            "numbers only; running it could do anything. Save the weights alone: torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:
        raise UserError(f"{path} is not a whole file of weights ({first_line(error)}); get it again") from None
    if not contents.tensors:
        raise UserError(f"{path} holds no tensors")
    broken = [key for key, value in contents.tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds NaN or infinite numbers in {_some(broken)}; get it, or train it, again")
    return contents


def _read(path: Path) -> Contents:
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"PK\x03\x04":
            return _read_archive(path)
        if data[: len(_LEGACY)] == _LEGACY:
            return _read_legacy(path, data)
        if data[8:9] == b"{":
            return _read_safetensors(path, int.from_bytes(data[:8], "little"))
        return _named(path, read_pickle(data), _nowhere)


def _read_safetensors(path: Path, header: int) -> Contents:
    if header > _HEADER:
        raise ValueError(f"its header claims {header} bytes")
    try:
        with safe_open(str(path), framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    if _CHECKSUM in notes and notes[_CHECKSUM] != _checksum(tensors, notes):
        raise UserError(f"{path} is damaged: its checksum is not that of its contents; get it again")
    return Contents({key: value.float() for key, value in tensors.items()}, notes)


def _read_archive(path: Path) -> Contents:
    """What `torch.save` writes: the pickle and each storage in a file of its own, with checksums that are looked at."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is packed, or claims more than it holds")
        names = set(archive.namelist())
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("an archive without data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = read_pickle(BytesIO(archive.read(f"{root}data.pkl")), {})
        return _named(path, content, lambda key: archive.read(f"{root}data/{key}"))


def _read_legacy(path: Path, file: mmap.mmap) -> Contents:
    """What `torch.save` wrote before version 1.6: five pickles, then the storages, each behind its length."""
    storages: dict[str, Storage] = {}
    *_, content, keys = (read_pickle(file, storages) for _ in range(5))
    data = {}
    for key in cast(list[object], keys):
        if not isinstance(key, str):  # tuples of tuples could take for ever to hash
            raise RefusedError(f"a {type(key).__name__} as a key")
        data[key] = file.read(int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize)
    return _named(path, content, data.__getitem__)


def _nowhere(key: str) -> bytes:
    raise KeyError(key)


def _named(path: Path, content: Any, read: Callable[[str], bytes]) -> Contents:
    """The tensors among the contents of a pickle; `read` gives the bytes of a storage by its key."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, no named tensors")
    inner = next((key for key in _INNER if isinstance(content.get(key), dict)), None)
    named = content if inner is None else content[inner]
    records = {key: record for key, value in named.items() if isinstance(key, str) and (record := stored(value))}
    strange = [str(key) for key in named if key not in records]
    if strange:
        raise UserError(f"{path} holds no named tensors: {_some(strange)} among them is none")
    if sum(record.nbytes for record in records.values()) > 4 * path.stat().st_size + 2**20:  # some may share numbers
        raise ValueError("its tensors claim more than it holds")
    cached = functools.cache(read)
    tensors = {key: record.tensor(lambda storage: cached(storage.key)).float() for key, record in records.items()}
    return Contents(tensors, others={} if inner is None else {k: v for k, v in content.items() if k != inner})


class HasState(Protocol):
    """A module, as far as files know one."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""


def rounded(module: HasState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a module, on the CPU and in a type, as files hold it."""
    return {key: value.detach().cpu().to(dtype).contiguous() for key, value in module.state_dict().items()}


def metadata(notes: Mapping[str, object] | None, **own: str) -> dict[str, str]:
    """What a weights file says of itself: notes as text, and `format` and `config`, which no note can be."""
    return {str(key): str(note) for key, note in (notes or {}).items() if key not in ("format", "config")} | own


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    notes = {**notes, _CHECKSUM: _checksum(tensors, notes)}
    with written_whole(path) as part:
        part.write_bytes(save(dict(tensors), notes))


def _checksum(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    crc = 0
    for key in sorted(notes.keys() - {_CHECKSUM}):
        crc = zlib.crc32(f"{key}={notes[key]}\n".encode(), crc)
    for key in sorted(tensors):
        tensor = tensors[key]
        crc = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def compare(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str, allow: Sequence[str] = ()
) -> list[str]:
    """The allowed keys that do not fit a model whose state is `own`; see `load_exactly`."""
    odd = {
        "missing": sorted(set(own) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(own)),
        "of another shape": [key for key in tensors if key in own and tensors[key].shape != own[key].shape],
    }
    allowed = {key for keys in odd.values() for key in matching(keys, allow)}
    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in ((what, [key for key in keys if key not in allowed]) for what, keys in odd.items())
        if keys
    ]
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")
    return sorted(allowed)


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str, allow: Sequence[str] = ()) -> list[str]:
    """Load tensors into a module, accounting for every key.

    Args:
        module: what to fill.
        tensors: by name.
        source: what errors call the tensors.
        allow: patterns such as "roi_heads.box_predictor.*" of keys that may be missing, unexpected or of another
            shape; these stay as they are, or are left out.

    Returns:
        The allowed keys that were not loaded.

    Raises:
        UserError: other keys are missing or unexpected, or shapes differ; the message lists the first of each.
    """
    own = module.state_dict()
    left_out = compare(own, tensors, source, allow)
    module.load_state_dict(own | {key: value for key, value in tensors.items() if key not in left_out})
    return left_out


def matching(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The keys that match one of the patterns (`*` stands for anything)."""
    return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]


def without(tensors: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
    """The tensors whose key matches none of the patterns."""
    left_out = set(matching(tensors, patterns))
    return {key: value for key, value in tensors.items() if key not in left_out}


def _some(keys: Sequence[str]) -> str:
    shown = ("".join(c if c.isprintable() else "?" for c in key[:100]) for key in keys[:3])
    return f"{', '.join(shown)}{', ...' * (len(keys) > 3)}"
