"""Pickles of arrays, read without running what they say.

A pickle is a program: to unpickle is to call what it names. This reader knows a handful of names, and gives each a
stand-in of its own, so that not even NumPy's unpickling code runs. What comes out is made of dictionaries, lists,
tuples, strings, numbers, None and tensors. Any other name is refused before anything is called.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from eventful_det.errors import UserError

_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}  # NumPy's names of the number types that tensors have


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of NumPy arrays in plain containers, as detectron2's model zoo has them; arrays become tensors.

    Raises:
        UserError: the file cannot be opened, is cut short or no pickle, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return _plain(_Reader(file, encoding="latin1").load())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except _RefusedError as error:
        raise UserError(
            f"{path} is refused: it asks for {error}, but a weights file holds arrays, containers, strings and "
            "numbers only; running it could do anything. Ask its author for a .pth or .safetensors file"
        ) from None
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole pickle of arrays ({reason}); download it again") from None


class _RefusedError(Exception):
    """A pickle asks for something that is not on the list."""


class _Dtype:
    """A number type, as `numpy.dtype` is pickled: its code, then its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _CODES:
            raise _RefusedError(f"arrays of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order if order in ("<", ">") else "="

    def array(self, data: bytes | bytearray | str, shape: tuple[int, ...], fortran: bool) -> torch.Tensor:
        """A tensor of raw values."""
        raw = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
        values = np.frombuffer(raw, np.dtype(self.order + self.code)).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(values.astype(self.code, order="C", copy=True))


class _Array:
    """A `numpy.ndarray` that is made empty and then told what it holds."""

    tensor: torch.Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = dtype.array(data, shape, fortran)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.tensor = dtype.array(data, shape, order == "F")
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as pickled by old protocols."""
    if encoding != "latin1":
        raise _RefusedError(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How old protocols pickle b"": as a call of `bytes`."""
    return b""


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; every call in a pickle goes through here."""
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """References to things outside of the file."""
        raise _RefusedError("something outside of it")


def _plain(node: Any) -> Any:
    """The tree with tensors for arrays."""
    if isinstance(node, _Array) and node.tensor is not None:
        return node.tensor
    if isinstance(node, dict):
        return {_plain(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_plain(item) for item in node)
    if node is None or isinstance(node, (str, bytes, bool, int, float)):
        return node
    raise _RefusedError(f"a bare {type(node).__name__.strip('_').lower()}")
