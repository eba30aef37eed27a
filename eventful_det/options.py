"""Options as frozen dataclasses: the annotation of a field says what it may be, and `convert_fields` sees to it.

@dataclass(frozen=True)
class TrainOptions:
    steps: Count = 3000
    schedule: Literal["cosine", "step"] = "cosine"

    def __post_init__(self) -> None:
        convert_fields(self, "train")

from_values(TrainOptions, {"steps": "many"}, "train")  # UserError: train.steps must be a whole number ...
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from eventful_det.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above`, `low` itself is none of them."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.above:
            return f" above {self.low:g}" + (f" and up to {self.high:g}" if self.high < math.inf else "")
        return f" from {self.low:g} to {self.high:g}" if self.high < math.inf else f" of at least {self.low:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]

_ENTRIES = 100_000  # of a list
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert_fields(record: object, name: str) -> None:
    """Hold the fields of a frozen dataclass to their annotations; call it from `__post_init__`.

    Raises:
        UserError: one does not fit; the message calls it `name.field`.
    """
    for key, hint in _hints(type(record)).items():  # type: ignore[arg-type]
        object.__setattr__(record, key, convert(getattr(record, key), hint, f"{name}.{key}" if name else key))


def from_values(cls: type[T], values: Mapping[str, object], name: str) -> T:
    """A dataclass from plain values, as they stand in JSON and YAML.

    Raises:
        UserError: an option is unknown, missing or does not fit; the message calls it `name.option`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    refuse_unknown(values, fields, name)
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [key for key, f in fields.items() if key not in values and (f.default, f.default_factory) == absent]
    if missing:
        raise UserError(f"{name}{': ' if name else ''}give {', '.join(missing)} as well")
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{key: convert(value, hints[key], f"{name}.{key}" if name else key) for key, value in values.items()})


def refuse_unknown(given: Iterable[str], known: Iterable[str], name: str) -> None:
    """Refuse a name that is not known, with the nearest one that is.

    Raises:
        UserError: there is one.
    """
    for key in given:
        if key not in known:
            raise UserError(f"{name}{': ' if name else ''}unknown option {_short(key)}; {nearest(key, known)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """What to say to somebody who gave a name that is not known."""
    known = sorted(known)
    if not known:
        return "it has none"
    near = difflib.get_close_matches(str(name), known, 1, 0.7)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def find_type(kind: object, path: str) -> object:
    """The type of an option by its dotted path in a dataclass; Any where nothing is known of it.

    Raises:
        UserError: there is no such option.
    """
    place = ""
    for part in path.split("."):
        records = [option for option in alternatives(kind) if dataclasses.is_dataclass(option)]
        mappings = [option for option in alternatives(kind) if _is_mapping(get_origin(option))]
        if records:
            hints: dict[str, Any] = _hints(records[0])  # type: ignore[arg-type]
            refuse_unknown([part], hints, place)
            kind = hints[part]
        elif mappings:
            kind = get_args(mappings[0])[1]
        elif kind is not Any:
            raise UserError(f"unknown option {place}.{part}; {place} holds no further options")
        place = f"{place}.{part}".strip(".")
    return kind


def alternatives(kind: object) -> list[object]:
    """The members of a union, without their ranges; of another type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return [one for option in get_args(kind) for one in alternatives(option)]
    return [get_args(kind)[0]] if get_origin(kind) is Annotated else [kind]


def convert(value: object, hint: object, name: str) -> object:
    """A value as its type says: lists become tuples, whole numbers floats, words such as "no" truth values.

    Args:
        value: what the user gave.
        hint: a type: `bool`, `int`, `float`, `str`, a `Literal`, a tuple, a mapping with text as keys, a dataclass, a
            union of these, or one of them `Annotated` with a `Range`; anything else is checked with `isinstance`.
        name: what messages call the value.

    Raises:
        UserError: the value is of another type, out of range, or no finite number.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, name, hint)
    if isinstance(value, (list, tuple, Mapping)) and len(value) > _ENTRIES:
        raise UserError(f"{name} has {len(value)} entries, more than {_ENTRIES}")
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(
                convert(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(zip(value, inner, strict=True))
            )
    elif _is_mapping(origin) and isinstance(value, Mapping):
        return {convert(key, str, name): convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_values(hint, value, name)  # type: ignore[arg-type]
    elif origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
    elif origin is Annotated:
        converted = convert(value, arguments[0], name) if _fits(value, arguments[0]) else None
        if converted is not None and all(converted in limit for limit in arguments[1:]):
            return converted
    elif _fits(value, cast(type, hint)):
        if isinstance(value, str) and hint is bool:
            return _WORDS[value.lower()]
        return cast(Callable[[object], object], hint)(value) if hint in (bool, int, float) else value
    raise UserError(f"{name} must be {_describe(hint)}, got {_short(value)}")


def _convert_union(value: Any, kinds: tuple[Any, ...], name: str, hint: Any) -> Any:
    nested = [kind for kind in kinds if dataclasses.is_dataclass(kind) or _is_mapping(get_origin(kind))]
    if isinstance(value, Mapping) and len(nested) == 1:
        return convert(value, nested[0], name)  # whose messages say more
    for kind in sorted(kinds, key=lambda kind: kind is not type(value)):  # 1.0 stays a number with a fraction
        try:
            return convert(value, kind, name)
        except UserError:
            continue
    raise UserError(f"{name} must be {_describe(hint)}, got {_short(value)}")


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _fits(value: Any, kind: type) -> bool:
    """Whether a value can be taken as one of a plain type."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _WORDS)
    if kind is int:
        whole = number and (isinstance(value, Integral) or float(value).is_integer())
        return whole and abs(value) <= sys.maxsize
    if kind is float:
        try:
            return number and math.isfinite(value)
        except OverflowError:  # a whole number beyond the largest float
            return False
    if kind is type(None):
        return value is None
    return isinstance(value, get_origin(kind) or kind)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(arguments[0]) + "".join(map(str, arguments[1:]))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        return (
            f"a list, each {_describe(inner)}"
            if inner
            else f"a list of {len(arguments)}: {', '.join(map(_describe, arguments))}"
        )
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if dataclasses.is_dataclass(hint) or _is_mapping(origin):
        return "a group of options"
    return words.get(hint) or f"a {getattr(origin or hint, '__name__', hint)}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4,300 digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, ranges included."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
