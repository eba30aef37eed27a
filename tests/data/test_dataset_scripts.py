"""What all scripts of datasets/ have in common: numbers, printing and the folder they write to."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from running import script_main

from eventful_det.errors import UserError
from eventful_det.outputs import Stdout, owned

_ONE = ("train-videos", "train-frames", "val-videos", "val-frames", "workers")
SMALL = ["--width=96", "--height=96", *(f"--{name}=1" for name in _ONE)]


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("make_synthetic_vid.py", "--workers=-1"),
        ("make_synthetic_actions.py", "--fps=0"),
        ("make_synthetic_actions.py", "--val-clips=-5"),
        ("make_synthetic_actions.py", "--seed=-1"),
        ("prepare_motion.py", "--seed=-1"),
        ("prepare_motion.py", "--clips=1.5"),
        ("prepare_stills.py", "--seed=99999999999999999999"),
        ("prepare_stills.py", "--workers=many"),
        ("prepare_imagenet_vid.py", "--show=-1"),
        ("prepare_clips.py", "--max-frames=nan"),
        ("import_annotations.py", "--show=1e400"),
    ],
)
def test_numbers_are_held_to_their_ranges(
    script: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as ended:
        script_main(script)([*([] if script.startswith("make") else [place]), "--output", place, option])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: argument {option.partition('=')[0]}: it must be a whole number")
    assert told.count("\n") == 1
    assert not Path(place).exists()


@pytest.mark.parametrize("option", ["--noise=nan", "--width=100000", "--seed=-1", "--fps=0"])
def test_scenes_are_held_to_their_ranges(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script_main("make_synthetic_vid.py")(["--output", str(tmp_path / "set"), *SMALL, option]) == 2
    assert option[2:].partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


class _Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_printing_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "[not/markup]"
    for script, arguments in (
        ("make_synthetic_vid.py", ["--output", str(root), "--workers", "1", *SMALL]),
        ("prepare_imagenet_vid.py", [str(root), "--workers", "1"]),
    ):
        monkeypatch.setattr(sys, "stdout", _Closed())
        assert script_main(script)(arguments) == 0
    assert {path.name for path in (root / "annotations").glob("*[a-z].json")} >= {
        "imagenet_vid_train.json",
        "imagenet_vid_val.json",  # which follows what could not be printed of the first
    }


def test_letters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    Stdout().write("José \udcff")
    Stdout().flush()
    assert shown.getvalue() == b"Jos? ?"


def test_an_output_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(_: Path) -> int:
        raise UserError("output is in use by process 7; choose another output")

    monkeypatch.setattr("eventful_det.outputs._take", taken)
    with pytest.raises(UserError), owned(tmp_path):
        pass
    for script, source in (("make_synthetic_vid.py", []), ("prepare_clips.py", ["none.mp4"])):
        assert script_main(script)([*source, "--output", str(tmp_path / "out")]) == 2
        assert "in use by process 7" in capsys.readouterr().err
