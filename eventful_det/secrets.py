"""Passwords and tokens stay out of what is printed, logged, stored, shown or used as a name."""

from __future__ import annotations

import re

# From "://" to the last "@" before another address: passwords hold "/", "?", "#", "@" and blanks unescaped. Where no
# colon ends a user's name, white space ends the address.
_LOGIN = re.compile(
    r"(:/(?:/|(?=[^\s/:]*:)))([^/:@]{0,999}:(?:(?!://).){0,999}|(?:(?!://)\S){0,999})@(?=([^\s/?#]*))", re.DOTALL
)
_PARAMETER = re.compile(
    r"(?i)((?:^|[?&;#\s,'\"{\[/=])[+~]*(?:[\w.-]*(?:passw(?:or)?d|passphrase|pwd|token|secret|credentials?|signature|api[_-]?key)"
    r"|(?:[\w.-]*[._-])?(?:pass|(?:login)?pas|psk|psw|pw|key|auth|sig|session(?:id)?)))=[^\s&]+"
)
_HOST = re.compile(r"[^:@]*(:\d+)?/")  # a host, its port and a path
_HIDDEN = "***"


def mask_secrets(text: str) -> str:
    """A text in which the passwords of addresses, and values of parameters such as `pwd=` and `token=`, are ***.

    User names, hosts and paths stay. Where it cannot be told what is a password, too much is hidden rather than too
    little.
    """
    return _PARAMETER.sub(rf"\1={_HIDDEN}", _LOGIN.sub(_mask_login, text))


def _mask_login(match: re.Match[str]) -> str:
    slashes, login, host = match.groups()
    if _HOST.match(login) and not re.search(r"[.:\]]|^localhost$", host):
        return match[0]  # rtsp://host:554/a@b: the @ is one of the path
    user, colon, _ = login.partition(":")
    return f"{slashes}{user}:{_HIDDEN}@" if colon else f"{slashes}{_HIDDEN}@"
