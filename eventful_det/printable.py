"""Text from outside, made fit to be printed, stored and used as a name: without passwords and control characters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)((?:(?![a-z][a-z0-9+.-]*://).)*)", re.IGNORECASE | re.DOTALL)
# Passwords may hold any of : / ? # @ unescaped, so they reach up to the last @.
_LOGIN = re.compile(r"(?P<user>[^\s:/?#@]*:)(?!\d{1,5}/).*@|[^\s/?#@]*@", re.DOTALL)
_PARAMETER = re.compile(
    r"([\w.%-]*(?:pass|pwd|psw|token|secret|key|auth|sig|cred|session)[\w.%-]*=)[^&\s'\"]+", re.IGNORECASE
)
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_LONGEST = 100  # characters of a name of a folder


def printable(text: str) -> str:
    """Text without the passwords of the addresses in it, on one line.

    `user:password@` becomes `user:***@`, and so do values of parameters such as `pwd=` and `token=`. Bytes that are no
    UTF-8 become U+FFFD, control characters spaces.
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return _UNFIT.sub(" ", _ADDRESS.sub(_without_secrets, text))


def _without_secrets(address: re.Match[str]) -> str:
    scheme, rest = address.groups()
    rest = _LOGIN.sub(lambda login: f"{login['user'] or ''}***@", rest, count=1) if _LOGIN.match(rest) else rest
    return scheme + _PARAMETER.sub(r"\1***", rest)


def printable_values(values: Any) -> Any:
    """The same values, nested ones too, with every text `printable`."""
    if isinstance(values, str):
        return printable(values)
    if isinstance(values, dict):
        return {printable_values(key): printable_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [printable_values(value) for value in values]
    return values


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
