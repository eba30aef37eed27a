"""Options as typed records: one schema says what may be given, and one function checks it.

::

    @dataclass(frozen=True)
    class Options:
        output: str
        max_frames: Count | None = None
        show: Share = 0.5

    read(Options, {"output": "out", "max_frames": "3"})  # Options("out", 3, 0.5)
    read(Options, {"output": "out", "show": "loud"})     # UserError: show must be a number from 0 to 1, got 'loud'

Values come from YAML files and command lines, so that text which spells a value of the type is taken for it. `check`
is for records that are made in Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eventful_det.errors import UserError
from eventful_det.printable import printable

T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NULL = type(None)


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included.

    Attributes:
        above: `low` itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, number: float) -> bool:
        return (self.low < number if self.above else self.low <= number) and number <= self.high

    def __str__(self) -> str:
        if self.above:
            return f" above {self.low:g}" + ("" if self.high == math.inf else f", at most {self.high:.15g}")
        if self.high == math.inf:
            return f" of at least {self.low:g}"
        return f" from {self.low:.15g} to {self.high:.15g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def read(kind: type[T], values: object, where: str = "") -> T:
    """A record of the dataclass `kind` from plain values, as YAML and command lines give them.

    Args:
        kind: its annotations are the schema: bool, int, float, str, None, Literal, `Annotated` with a `Range`, unions,
            tuples, dictionaries and further dataclasses. Values of any other type are passed on as they are.
        values: by name.
        where: what the names in messages begin with, such as "train.".

    Raises:
        UserError: a name is unknown or missing, or a value is none that its type allows.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.') or 'options'} must be a group of options, got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"unknown option {where}{printable(str(name))}; {nearest(str(name), fields, where)}")
    for name, field in fields.items():
        defaults = field.default, field.default_factory
        if name not in values and defaults == (dataclasses.MISSING, dataclasses.MISSING):
            raise UserError(f"{where}{name} is missing")
    hints = _hints(kind)
    return kind(**{name: convert(hints[name], value, f"{where}{name}") for name, value in values.items()})


def check(record: Any, where: str = "") -> None:
    """Convert the fields of a frozen dataclass to their types; for `__post_init__`.

    Raises:
        UserError: a value is none that its type allows.
    """
    for name, kind in _hints(type(record)).items():
        if name in record.__dataclass_fields__:
            object.__setattr__(record, name, convert(kind, getattr(record, name), f"{where}{name}"))


def nearest(name: str, known: Iterable[str], where: str = "") -> str:
    """What to say to somebody who gave a name that is not known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {where}{close[0]}?" if close else f"known: {', '.join(known)}"


def convert(kind: Any, value: Any, name: str) -> Any:
    """A value as `kind` has it; see `read`.

    Raises:
        UserError: it is none of this kind.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else read(kind, value, f"{name}.")
    if origin in (Union, UnionType):
        return _convert_union(kind, value, name)
    if origin in (tuple, Sequence) or getattr(origin, "__name__", "") == "Sequence":
        return _convert_tuple(kind, value, name)
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise _mismatch(kind, value, name)
        return {str(key): convert(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    try:
        return _convert_plain(kind, value)
    except (ValueError, OverflowError):
        raise _mismatch(kind, value, name) from None


def field_type(kind: Any, path: str) -> Any:
    """The type of an option by its dotted path in a schema.

    Raises:
        UserError: there is no such option.
    """
    known: list[str] = []
    for part in path.split("."):
        options = [option for option in _alternatives(kind) if dataclasses.is_dataclass(option)]
        where = "".join(f"{name}." for name in known)
        if options:
            hints = {field.name: _hints(options[0])[field.name] for field in dataclasses.fields(options[0])}
            if part not in hints:
                raise UserError(f"unknown option {where}{printable(part)}; {nearest(part, hints, where)}")
            kind = hints[part]
        elif mapping := [option for option in _alternatives(kind) if get_origin(option) is dict]:
            kind = get_args(mapping[0])[1]
        elif kind is not Any:
            raise UserError(f"unknown option {where}{printable(part)}; {where.rstrip('.')} holds no further options")
        known.append(part)
    return kind


def is_scalar(kind: Any) -> bool:
    """Whether values of a type are written without brackets: numbers, words, text, null."""
    return all(
        option in (bool, int, float, str, _NULL) or get_origin(option) is Literal for option in _alternatives(kind)
    )


def takes_text(kind: Any) -> bool:
    """Whether any text may be a value of a type."""
    return str in _alternatives(kind)


def is_switch_word(text: str) -> bool:
    """Whether text spells a bool."""
    return text.strip().lower() in _TRUE + _FALSE


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, without their ranges."""
    if get_origin(kind) in (Union, UnionType):
        return [one for option in get_args(kind) for one in _alternatives(option)]
    return [get_args(kind)[0]] if get_origin(kind) is Annotated else [kind]


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind, include_extras=True)
    return _HINTS[kind]


def _convert_union(kind: Any, value: Any, name: str) -> Any:
    options = [option for option in get_args(kind) if option is not _NULL]
    if value is None and len(options) < len(get_args(kind)):
        return None
    if len(options) == 1:
        return convert(options[0], value, name)
    exact = [option for option in options if type(value) in _alternatives(option)]
    for option in exact + options:
        try:
            return convert(option, value, name)
        except UserError:
            continue
    raise _mismatch(kind, value, name)


def _convert_tuple(kind: Any, value: Any, name: str) -> tuple[Any, ...]:
    inner = get_args(kind)
    endless = len(inner) == 1 or inner[-1] is ...
    if not isinstance(value, (list, tuple)) or not (endless or len(value) == len(inner)):
        raise _mismatch(kind, value, name)
    kinds = itertools.repeat(inner[0]) if endless else inner
    return tuple(convert(one, item, f"{name}[{i}]") for i, (one, item) in enumerate(zip(kinds, value, strict=False)))


def _convert_plain(kind: Any, value: Any) -> Any:
    """A number, a word, text or null.

    Raises:
        ValueError, OverflowError: it is not of this kind.
    """
    if get_origin(kind) is Annotated:
        base, *limits = get_args(kind)
        found = _convert_plain(base, value)
        if not all(found in limit for limit in limits if isinstance(limit, Range)):
            raise ValueError
        return found
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == str(value)), None) or _fail()
    if kind is bool:
        word = str(value).strip().lower()
        return True if word in _TRUE else False if word in _FALSE else _fail()
    if kind in (int, float):
        return _convert_number(kind, value)
    if kind is str:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return text if text and "\0" not in text and isinstance(value, (str, int, float)) else _fail()
    return (value if value is None else _fail()) if kind is _NULL else value


def _convert_number(kind: type[int] | type[float], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        _fail()
    if kind is int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value, re.ASCII):
            return int(value)
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < sys.maxsize else _fail()
    number = float(value)
    return number if math.isfinite(number) else _fail()


def _fail() -> Any:
    raise ValueError


def _mismatch(kind: Any, value: Any, name: str) -> UserError:
    return UserError(f"{printable(name)} must be {describe(kind)}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = printable(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 100 else f"{text[:97]}..."


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(inner[0]) + "".join(str(limit) for limit in inner[1:])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(describe, inner)))
    if origin is tuple or getattr(origin, "__name__", "") == "Sequence":
        if len(inner) == 1 or inner[-1] is ...:
            return f"a list whose entries are each {describe(inner[0])}"
        return f"[{', '.join(map(describe, inner))}]"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", _NULL: "null"}
    return words.get(kind, "a group of options")
