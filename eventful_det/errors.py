"""The one exception users are meant to read."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was wrong, what was expected, how to fix it. Tools print it without a
    traceback and exit non-zero.
    """
