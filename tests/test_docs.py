"""The examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eventful_det.models import checkpoints
from eventful_det.models.detector import Detector

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", ["live.md"])
def test_examples(name: str, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of a page, one block after the other, with a detector that takes no time."""
    monkeypatch.setattr(checkpoints, "load_detector", lambda: tiny_detector)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)
