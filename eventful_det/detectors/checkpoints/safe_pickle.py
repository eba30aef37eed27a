"""Pickles of tensors, read without running what they say.

A pickle is a program for a stack machine, and Python's machine calls whatever the program names. This one knows
containers, strings and numbers, and of calls only the handful that arrays and tensors are made of; in their place it
makes records that say where the numbers lie. It works in time and memory that grow with the file alone: there is no
recursion, only strings and small whole numbers are keys, and numbers are not touched before `Stored.tensor`.

`torch.load(weights_only=True)` would be shorter. It had holes (CVE-2025-32434, CVE-2026-24747), never ends on tuples of
tuples, and gives memory as it is where an old file lacks its numbers.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor


class RefusedError(Exception):
    """A pickle asks for something that is not data."""


class Stream(Protocol):
    """What a pickle is read from; a read must not be longer than what is left, as those of `mmap` and `BytesIO`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class Storage:
    """The raw numbers of one or more tensors, in a place that the reader of the file knows.

    Attributes:
        key: of the place.
        dtype: of the numbers.
        count: how many there are.
    """

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a file whose numbers are not read yet.

    Attributes:
        raw: where they are; of an array in the pickle itself the bytes, or text as old protocols have it.
        dtype: their type.
        shape: of the tensor.
        strides: in numbers.
        offset: of the first one.
        swapped: the bytes of a number are in the order that this machine does not have.
    """

    raw: Storage | bytes | bytearray | str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when it is made."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, read: Callable[[Storage], bytes]) -> Tensor:
        """The tensor itself.

        Args:
            read: gives the bytes of a storage.

        Raises:
            ValueError: they are less than the tensor needs.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        raw = read(self.raw) if isinstance(self.raw, Storage) else self.raw
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        size = self.dtype.itemsize
        part = bytearray(memoryview(raw)[self.offset * size : (self.offset + span) * size])
        if len(part) < span * size:
            raise ValueError(f"a tensor of shape {self.shape} has {len(part)} bytes only")
        if self.swapped:
            part = bytearray(np.frombuffer(part, f"u{size}").byteswap().tobytes())
        return torch.frombuffer(part, dtype=self.dtype).as_strided(self.shape, self.strides)


def read_pickle(file: Stream, storages: dict[str, Storage] | None = None) -> object:
    """What a pickle holds: dictionaries, lists, tuples, strings, numbers, None, and records of arrays and tensors.

    Args:
        file: read up to the end of the pickle.
        storages: takes the storages outside of the pickle that it speaks of, by key; None = there are none.

    Raises:
        RefusedError: it asks for anything else; nothing of it was run.
        Exception: it is cut short or no pickle, of whatever kind.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    instructions: Iterable[Any] = pickletools.genops(cast(IO[bytes], file))
    for number, (opcode, argument, _) in enumerate(instructions):
        if number == _LONGEST:
            raise RefusedError(f"more than {_LONGEST} steps")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "LIST" | "FROZENSET":
                stack.append(since_mark())
            case "DICT":
                stack.append(_set_items({}, since_mark()))
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _extend(stack, since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "GLOBAL" | "INST":
                stack.append(_known(*argument.split(" ", 1)))
                if opcode.name == "INST":
                    raise RefusedError(f"an instance of {argument}")
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if not callable(function) or not isinstance(arguments, tuple) or len(arguments) > _MOST:
                    raise RefusedError(f"a call of a {type(function).__name__}")
                stack.append(function(*arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], (_Dtype, _Array)):
                    stack[-1].build(state)
                elif not isinstance(stack[-1], dict):  # what a state dictionary says of its modules is left out
                    raise RefusedError(f"the state of a {type(stack[-1]).__name__.strip('_')}")
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages is None or storages.setdefault(storage.key, storage) != storage:
                    raise RefusedError("something outside of it")
                stack.append(storage)
            case _ if opcode.stack_after and opcode.stack_after[0].name in _PLAIN:
                stack.append(argument)
            case _:
                raise RefusedError("something outside of it" if opcode.name == "PERSID" else f"a {opcode.name}")
    raise ValueError("it has no end")


_LONGEST = 1_000_000  # steps of a pickle; a checkpoint of 1,000 tensors with its optimiser takes about 50,000
_MOST = 8  # dimensions of a tensor, and arguments of a call
_PLAIN = ("int", "int_or_bool", "bool", "float", "str", "bytes", "bytearray", "bytes_or_str")  # what needs no call


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError(f"items for a {type(stack[-1]).__name__}")
    stack[-1].extend(items)


def _set_items(target: Any, items: list[Any]) -> dict[str | int, Any]:
    """Set keys and values that follow each other; keys of other types could take for ever to compare."""
    if not isinstance(target, dict):
        raise ValueError(f"keys for a {type(target).__name__}")
    for key in items[::2]:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**31):
            raise RefusedError(f"a {type(key).__name__} as a key")
    target.update(zip(items[::2], items[1::2], strict=True))
    return target


def stored(value: object) -> Stored | None:
    """The record of an array or tensor, if `value` is one."""
    value = value.content if isinstance(value, _Array) else value
    return value if isinstance(value, Stored) else None


_NUMPY = {  # NumPy's names of the number types that tensors have
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i1": torch.int8, "i2": torch.int16,
    "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
_TORCH = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Dtype:
    """A number type, as `numpy.dtype` is pickled: its code, then its byte order."""

    swapped = False

    def __init__(self, code: Any, *_: object) -> None:
        if not isinstance(code, str) or code not in _NUMPY:
            raise RefusedError("arrays of a type that tensors do not have")
        self.dtype = _NUMPY[code]

    def build(self, state: Any) -> None:
        self.swapped = state[1] == (">" if np.little_endian else "<")


class _Array:
    """A `numpy.ndarray`, which is made empty and then told what it holds."""

    content: Stored | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        shape = _sizes(shape)
        strides = _strides(shape[::-1])[::-1] if fortran else _strides(shape)
        self.content = Stored(data, dtype.dtype, shape, strides, swapped=dtype.swapped)
        if not isinstance(data, (bytes, bytearray, str)) or self.content.nbytes != len(data):
            raise ValueError(f"an array of shape {shape} has other bytes than it needs")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.build((1, shape, dtype, order == "F", data))
    return array


def _latin1(text: Any, encoding: Any) -> Any:
    """Bytes as pickled by old protocols; they stay text until an array needs them."""
    if encoding != "latin1":
        raise RefusedError("an encoding other than latin1")
    return text


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Stored:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without numbers")
    size, stride, (offset,) = _sizes(size), _sizes(stride), _sizes((offset,))
    if len(size) != len(stride):
        raise ValueError(f"a tensor of shape {size} has {len(stride)} strides")
    return Stored(storage, storage.dtype, size, stride, offset)


def _storage(reference: Any) -> Storage:
    """What a persistent reference of PyTorch's stands for."""
    if not isinstance(reference, tuple) or len(reference) < 5 or not isinstance(reference[1], torch.dtype):
        raise RefusedError("something outside of it")
    _, dtype, key, _, count, *view = reference
    if not (isinstance(key, str) and isinstance(count, int)) or any(v is not None for v in view):
        raise RefusedError("something outside of it")
    return Storage(key, dtype, count)


def _sizes(numbers: Any) -> tuple[int, ...]:
    """Sizes or strides that a tensor can have."""
    if not isinstance(numbers, tuple) or len(numbers) > _MOST:
        raise ValueError("a tensor has an impossible shape")
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers):
        raise ValueError("a tensor has an impossible shape")
    return numbers


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _mapping(items: Any = None) -> dict[str | int, Any]:
    """Of an ordered dictionary or a counter; pairs move into it, so that they cannot fill many."""
    if items is None or isinstance(items, dict):
        return {} if items is None else items
    pairs, items[:] = items[:], []
    return _set_items({}, [part for key, value in pairs for part in (key, value)])


def _same(items: Any) -> Any:
    return items


_CALLS: dict[str, Callable[..., Any] | torch.dtype] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _latin1,
    "builtins.bytes": lambda: b"",  # how old protocols pickle b""
    "builtins.set": _same,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.numeric._frombuffer": _from_buffer,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": _same,
    "torch.device": lambda kind, *_: kind,
    **{f"torch.{name}": dtype for name, dtype in _TORCH.items()},
}


def _known(module: Any, name: Any) -> Any:
    """The stand-in of a name; every call in a pickle goes through here."""
    full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is none"
    known = _CALLS.get(full.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins."))
    if known is not None:
        return known
    if full.startswith("torch.") and isinstance(getattr(torch, full[6:], None), torch.dtype):
        return full
    raise RefusedError(full[:100])
