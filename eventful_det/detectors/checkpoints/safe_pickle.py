"""Pickles of arrays and tensors: looked through, then read by `torch.load(weights_only=True)` or `pickle.Unpickler`.

Neither of these keeps a small file from taking for ever or all memory, and PyTorch's takes more than tensors.
"""

from __future__ import annotations

import codecs
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Sized
from typing import IO, Any

import numpy as np
import torch


class RefusedError(Exception):
    """A pickle asks for something that is not data."""


_LONGEST = 1_000_000  # steps of a pickle; a checkpoint of 1,000 tensors with its optimiser takes about 50,000
_FILL = "aesub\x90"  # opcodes that change what lies below their items
_NEVER = "P\x82\x83\x84io\x81\x92\x8b"  # those for other objects than ours, and for numbers of any length


def check_pickle(file: IO[bytes], size: int) -> None:
    """Look through a pickle, up to its end, without running it.

    Objects that hold each other many times make a small pickle large: a tuple of two tuples of two tuples and so on
    takes for ever to hash or print. So the lengths of objects are added up whenever one takes others.

    Args:
        file: at the pickle; a read must not be longer than what is left, as those of `mmap` and `BytesIO`.
        size: of the whole file.

    Raises:
        RefusedError: it names anything but data.
        Exception: it makes far more than the file holds, is cut short, or is no pickle; of whatever kind.
    """
    stack: list[tuple[list[int], Any]] = []  # each object's length, which may grow, and what it was made of
    marks: list[int] = []
    memo: dict[int, tuple[list[int], Any]] = {}
    room = 20 * size + 10_000_000
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name, before = opcode.name, opcode.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name or name == "MEMOIZE":
            if (place := len(memo) if argument is None else argument) > step:
                raise ValueError(f"object {place} after {step} steps")
            memo[place] = stack[-1]
        elif "GET" in name or name == "DUP":
            stack.append(stack[-1] if argument is None else memo[argument])
        else:
            many = pickletools.stackslice in before
            start = marks.pop() - before.index(pickletools.markobject) if many else len(stack) - len(before)
            if start < max(marks[-1:], default=0):
                raise ValueError("it takes more than there is")
            taken, stack[start:] = stack[start:], []
            parts = tuple(part for _, part in taken)
            made: Any = parts if opcode.arg is None else argument
            if name in ("GLOBAL", "STACK_GLOBAL"):
                made = _known(".".join(parts) if argument is None else argument.replace(" ", "."))
            elif opcode.code in _NEVER or (name == "REDUCE" and parts[0] == _ENCODE and parts[1][1:] != ("latin1",)):
                raise RefusedError(f"a {name} of other than data")
            total = 1 + sum(length[0] for length, _ in taken) + (len(argument) if isinstance(argument, Sized) else 0)
            if opcode.code in _FILL:
                room += taken[0][0][0]
                taken[0][0][0] = total
            stack += taken[:1] if opcode.code in _FILL else [([total], made)] * len(opcode.stack_after)
            room -= total
        if step == _LONGEST or room < 0:
            raise ValueError("its objects claim more than it holds")


_TORCH = re.compile(
    r"torch\.(Size|device|bool|(b?float|u?int)\d+|_utils\._rebuild_(tensor(_v2)?|parameter(_with_state)?)"
    r"|(Half|BFloat16|Float|Double|Char|Short|Int|Long|Byte|Bool)Storage)|builtins\.set"
)


def _known(name: str) -> str:
    """A name in a pickle as Python 3 and NumPy 1 have it.

    Raises:
        RefusedError: it is not one of containers, arrays and tensors.
    """
    plain = name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
    if plain not in _CALLS and not _TORCH.fullmatch(plain):
        raise RefusedError(name[:100])
    return plain


class _Dtype:
    """A number type, as `numpy.dtype` is pickled: its code, then its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"):
            raise RefusedError("arrays of a type that tensors do not have")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A `numpy.ndarray` as it is pickled: made, and then told all that it holds."""

    array = np.empty(0, np.float32)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, str | bytes]) -> None:
        _, shape, kind, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _frombuffer(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


_ENCODE = "_codecs.encode"  # how old protocols pickle bytes
_ARRAYS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": Array,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy.core.numeric._frombuffer": _frombuffer,
}
_CALLS = _ARRAYS | {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": dict,
    "builtins.bytes": bytes,
    _ENCODE: codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        call = _CALLS[_known(f"{module}.{name}")]
        return lambda *arguments: call(*arguments)  # a new one, as a pickle can set attributes of what it is given


def read_pickle(file: IO[bytes]) -> object:
    """What a pickle of arrays holds that was looked through; strings of Python 2 are latin1."""
    return _Unpickler(file, encoding="latin1").load()


def read_pytorch(path: str | os.PathLike[str]) -> object:
    """What a file of PyTorch holds whose pickles were looked through."""
    names = {name: call for known, call in _ARRAYS.items() for name in (known, known.replace(".core.", "._core."))}
    with torch.serialization.safe_globals([(call, name) for name, call in names.items()]):
        return torch.load(path, map_location="cpu", weights_only=True)
