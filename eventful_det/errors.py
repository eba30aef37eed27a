"""The one exception users are meant to read, and text that can be shown anywhere."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)((?:(?![a-z][a-z0-9+.-]*://).)*)", re.IGNORECASE | re.DOTALL)
# Passwords may hold any of : / ? # @ unescaped, so they reach up to the last @.
_LOGIN = re.compile(r"(?P<user>[^\s:/?#@]*:)(?!\d{1,5}/).*@|[^\s/?#@]*@", re.DOTALL)
_PARAMETER = re.compile(
    r"([\w.%-]*(?:pass|pwd|psw|token|secret|key|auth|sig|cred|session)[\w.%-]*=)[^&\s'\"]+", re.IGNORECASE
)


def printable(text: object) -> str:
    """Text that every terminal, file, font and C library takes, on one line, without the passwords of addresses.

    File names that are not UTF-8 reach Python as lone surrogates, and names in files of others hold what they like.
    White space becomes blanks; whatever else cannot be printed becomes U+FFFD. In addresses `user:password@` becomes
    `user:***@`, and so do values of parameters such as `pwd=` and `token=`.

    Args:
        text: a path, a name or a message; anything else is turned into text.
    """
    shown = _ADDRESS.sub(_without_secrets, str(text))
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in shown)


def _without_secrets(address: re.Match[str]) -> str:
    scheme, rest = address.groups()
    rest = _LOGIN.sub(lambda login: f"{login['user'] or ''}***@", rest, count=1) if _LOGIN.match(rest) else rest
    return scheme + _PARAMETER.sub(r"\1***", rest)


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was wrong, what was expected, how to fix it. Tools print it without a
    traceback and exit non-zero.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))
