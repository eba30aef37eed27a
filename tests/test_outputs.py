"""Folders of one run each, files without passwords, text that can be shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eventful_det.errors import UserError, printable
from eventful_det.outputs import file_names, owned, write_json

HOLDER = """
import sys
from pathlib import Path
from eventful_det.outputs import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_text_can_be_shown_anywhere() -> None:
    text = "two\nlines\tand \x1b[31m \udcff of rtsp://admin:S3#cr/et@cam/s"
    assert printable(text) == str(UserError(text)) == "two lines and \ufffd[31m \ufffd of rtsp://admin:***@cam/s"


def test_files_hold_no_secret(tmp_path: Path) -> None:
    write_json(tmp_path / "a/results.json", {"runs": {"rtsp://a:S3cret@b": ["rtsp://a:S3cret@b", 3, None]}})
    assert json.loads((tmp_path / "a/results.json").read_text()) == {
        "runs": {"rtsp://a:***@b": ["rtsp://a:***@b", 3, None]}
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]


def test_names_of_folders_are_safe_and_different() -> None:
    titles = ["..", ".", "", "a/b", "A", "a", "a", "rtsp://u:S3cret@c/s", "results.json", "José (1)", "x" * 300, "a\nb"]
    names = file_names(titles, {"results.json"})
    assert len({name.lower() for name in names}) == len(titles) and max(map(len, names)) <= 102
    assert all(name not in (".", "..") and not set(name) & set("/\\:*?\n") for name in names)
    assert names[3:7] == ["a_b", "A", "a-2", "a-3"] and "S3cret" not in names[7]
    assert names[8] == "results.json-2" and names[9] == "José__1_"


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    output = tmp_path / "runs/one"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=rf"output is in use by process {holder.pid}"), owned(output):
            pass
    finally:
        holder.kill()
        holder.wait()
    with owned(output):  # a killed run holds nothing
        pass
    assert not (tmp_path / "runs/one/.in_use").exists()


def test_a_folder_without_results_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "a/b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a/b"):
        (tmp_path / "a/b/results.json").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["results.json"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"), owned(tmp_path / "file/b"):
        pass
