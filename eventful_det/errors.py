"""The one exception users are meant to read, and text that can be shown anywhere."""

from __future__ import annotations

from eventful_det.secrets import mask_secrets


def printable(text: object) -> str:
    """Text that every terminal, file, font and C library takes, on one line, without secrets.

    File names that are not UTF-8 reach Python as lone surrogates, and names in files of others hold what they like.
    White space becomes blanks; whatever else cannot be printed becomes U+FFFD.

    Args:
        text: a path, a name or a message; anything else is turned into text.
    """
    shown = mask_secrets(str(text))
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in shown)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was wrong, what was expected, how to fix it. Tools print it without a
    traceback and exit non-zero.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))
