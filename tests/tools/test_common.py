"""tools/common.py: whatever a user can get wrong is one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import import_tool

from eventful_det.errors import UserError

FOREIGN = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in y
eventful_det.errors.UserError: cannot read the image a.jpg: it is cut short
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such\nthing"), "error: no such thing"),
        (UserError(FOREIGN), "error: cannot read the image a.jpg: it is cut short"),
        (PermissionError(13, "Permission denied", "/root/x"), "error: Permission denied: /root/x"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
    ],
)
def test_errors_are_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise error

    wrapped: Callable[[Any], None] = import_tool("common", monkeypatch).tool(fail)
    with pytest.raises(SystemExit) as stop:
        wrapped(OmegaConf.create())
    assert stop.value.code == 2 and capsys.readouterr().err == line + "\n"
