"""tools/command_line.py: names are taken literally, whatever a user can get wrong is one line."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import common
import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from running import ROOT, options_of

import eventful_det
from eventful_det.errors import UserError

FOREIGN = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in y
eventful_det.errors.UserError: cannot read the image a.jpg: it is cut short
"""
NAMES = [
    "my clip (1).mp4", "José.mp4", "人.mp4", "it's.mp4", "cam#1.mp4", "a, b.mp4", "a=b.mp4", "[cam1].mp4", "50%.mp4",
    'say "hi".mp4', "$HOME ${x} \\${y} {z}.mp4", "back\\slash\\", "~me", "0001", "null.mp4", "x[/y]", "true", "1e3",
    "-1", "a:b@c", "!&*|<>;`.mp4", " lead and trail ", "b\udcff.mp4", "'", '"', "'a", "[", "{a: 1}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such\nthing"), "error: no such thing"),
        (UserError(FOREIGN), "error: cannot read the image a.jpg: it is cut short"),
        (UserError("cannot open rtsp://admin:S3#cret@cam/s"), "error: cannot open rtsp://admin:***@cam/s"),
        (PermissionError(13, "Permission denied", "/root/x"), "error: Permission denied: /root/x"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (
            ModuleNotFoundError("", name="uvicorn.config"),
            "error: there is no uvicorn here, which this needs: python -m pip install fastapi uvicorn websockets",
        ),
    ],
)
def test_errors_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        command_line.guard(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_which_a_library_makes_an_error(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def convert() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise RuntimeError("Conversion is failed for: aten::mul") from None

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            command_line.guard(convert)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert stop.value.code == 128 + number and capsys.readouterr().err == "stopped\n"


def test_options_are_refused_under_hydras_own_flags_too() -> None:
    with hydra.initialize_config_dir(str(command_line.CONFIGS), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        with pytest.raises(UserError, match="^device: no"):
            command_line.refuse("eval_net", options_of("eval_net", "device=cpu"), ("device", "task"), "no")
        assert GlobalHydra.instance().hydra is running
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_literally(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name.replace("/", "_")).touch()
    name = name.replace("/", "_")
    (given,) = options_of("demo", "--", name, name).source[:1]
    assert given == name
    assert options_of("demo", f"source={name}", "--output", name).source == name


def test_lists_and_null() -> None:
    assert options_of("demo", "source=[0,a.mp4]").source == (0, "a.mp4")
    assert options_of("demo", "classes=[7]").classes == (7,)
    assert options_of("demo", "--classes", "person,dog").classes == ("person", "dog")
    assert options_of("demo", "format=mot,coco").format == ("mot", "coco")
    assert options_of("count_flops", "--k", "80,160").k == (80, 160)
    assert options_of("demo", "--output", "a,b", "--weights", "c,d").output == "a,b"
    assert options_of("demo", "weights=null").weights is None
    assert options_of("demo", "source='a b'").source == "a b"
    assert options_of("convert_weights", "a.pkl", "b.pth").output == "b.pth"


@pytest.mark.parametrize("text", ["no", "off", "0", "false", "No", "yes", "on", "1", "true", "True"])
def test_switches(text: str) -> None:
    value = text.lower() in ("yes", "on", "1", "true")
    assert options_of("demo", f"rescore={text}").rescore is value
    assert options_of("demo", "--rescore", text, "--track").rescore is value
    assert options_of("demo", "--track").track is True
    assert options_of("serve", f"expose={text}").expose is value


@pytest.mark.parametrize(
    ("tool", "argument", "message"),
    [
        ("demo", "max_frames=abc", "max_frames must be a whole number of at least 1 or null, got 'abc'"),
        ("demo", "max_frames=nan", "max_frames must be a whole number"),
        ("demo", "max_frames=0", "max_frames must be a whole number"),
        ("demo", "max_frames=(", "max_frames must be a whole number"),
        ("demo", "hold=1.5", "hold must be a whole number of at least 1"),
        ("demo", "short_side=-5", "short_side must be a whole number from 32"),
        ("demo", "width=100000", "width must be a whole number from 320 to 7680, got 100000"),
        ("demo", "conf=nan", "min_score must be a number from 0 to 1 or null"),
        ("demo", "silence=0", "silence must be a number above 0"),
        ("demo", "reconnect=-1", "reconnect must be a number of at least 0"),
        ("demo", "compare=maybe", "compare must be true or false, got 'maybe'"),
        ("demo", "output=", "output needs a value"),
        ("demo", "sorce=a.mp4", "unknown option 'sorce'; did you mean source?"),
        ("demo", "+sorce=a.mp4", "unknown option 'sorce'; did you mean source?"),
        ("demo", "--max-frame=3", "unknown option 'max_frame'; did you mean max_frames?"),
        ("demo", "gate=row", "there is no gate/row; did you mean rows?"),
        ("demo", "gate/policy=x", "there is no gate/policy/x; known: focus, fraction,"),
        ("demo", "--iou=0.5", "unknown option 'iou'; known: "),
        ("demo", "-o", "unknown option -o; options are --name value"),
        ("demo", "source.x=1", "unknown option source.x; source holds no further options"),
        ("demo", "~source", "give source as well"),
        ("train_net", "mix=[{", "mix must be a list, each a group of options"),
        ("demo", "--output", "--output needs a value"),
        ("serve", "port=abc", "port must be a whole number from 0 to 65535, got 'abc'"),
        ("serve", "expose=2", "expose must be true or false, got '2'"),
        ("serve", "upload_mb=0", "upload_mb must be a number above 0"),
        ("convert_weights", "dtype=int8", "dtype must be 'float32' or 'float16' or 'bfloat16'"),
        ("convert_weights", "notes=5", "notes must be a group of options"),
        ("eval_net", "eval.hold=0", "eval.hold must be a whole number of at least 1"),
        ("eval_net", "eval.scale=nan", "eval.scale must be a number from 0.05"),
        ("eval_net", "streams=many", "streams must be a whole number"),
        ("eval_net", "data.rot=a", "data: unknown option 'rot'; did you mean root?"),
        ("train_net", "train.lr=-1", "train.lr must be a number above 0, got -1"),
        ("train_net", "train.stepz=1", "train: unknown option 'stepz'; did you mean steps?"),
        ("train_net", "val_every=0", "val_every must be a whole number of at least 1"),
        ("train_net", "mix=[{train: a, ratio: 0}]", "mix[0].ratio must be a number above 0"),
        ("train_net", "augment.sizes=[[0,5]]", "augment.sizes[0][0] must be a whole number from 32"),
        ("count_flops", "classes=0", "classes must be a whole number"),
        ("benchmark", "threads=0", "threads must be a whole number from 1"),
        ("benchmark", "streams=4", "streams must be a list, each a whole number"),
        ("benchmark", "demo.mp4", "'demo.mp4' cannot be understood; expected option=value"),
    ],
)
def test_values_are_checked_before_anything_starts(tool: str, argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        options_of(tool, argument)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_option_has_a_default_and_a_type() -> None:
    """The configs and the schemas agree: each composes, and reads as the tool's options."""
    for tool in command_line.COMMANDS.values():
        assert options_of(tool)
    for experiment in (path.stem for path in (command_line.CONFIGS / "experiment").glob("*.yaml")):
        tool = "eval_net" if experiment.startswith("sweep") else "train_net"
        assert options_of(tool, f"experiment={experiment}")
    for group in ("train", "eval"):
        tool = {"train": "train_net", "eval": "eval_net"}[group]
        for choice in (path.stem for path in (command_line.CONFIGS / group).glob("*.yaml")):
            assert options_of(tool, f"{group}={choice}")
    for rule in ("gate=rows", "gate=paper"):
        for policy in (path.stem for path in (command_line.CONFIGS / "gate/policy").glob("*.yaml")):
            assert common.build_gate(options_of("demo", rule, f"gate/policy={policy}").gate)


def test_a_closed_pipe_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        encoding = "utf-8"

        def write(self, _: str) -> Any:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    common.say("[/x] a line")
    common.say("another")


def test_help_and_unknown_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["eventful-det"])
    command_line.console_command()
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in command_line.COMMANDS)
    monkeypatch.setattr("sys.argv", ["eventful-det", "detect", "--help"])
    command_line.console_command()
    printed = capsys.readouterr().out
    assert "max_frames: null" in printed and "Detect in videos" in printed
    assert "eventful-det detect source=clip.mp4" in printed and "python tools/" not in printed
    assert "- gate: rows" in printed and "hydra" not in printed and "_self_" not in printed
    for tool in command_line.COMMANDS.values():
        assert "hydra" not in command_line._listed(tool)
    monkeypatch.setattr("sys.argv", ["eventful-det", "--version"])
    command_line.console_command()
    assert capsys.readouterr().out == f"eventful_det {eventful_det.__version__}\n"
    monkeypatch.setattr("sys.argv", ["eventful-det", "detct"])
    with pytest.raises(SystemExit):
        command_line.console_command()
    assert capsys.readouterr().err == "error: unknown command 'detct'; did you mean detect?\n"


def test_multirun_keeps_hydras_grammar(tmp_path: Path) -> None:
    import demo

    given = command_line.overrides(demo, ["-m", "hold=1,2", f"output={os.fspath(tmp_path)}/${{hold}}"], literal=False)
    assert given == ["-m", "++hold=1,2", f"++output={tmp_path}/${{hold}}"]


def test_the_console_command_works_anywhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "eventful_det", "count", "--model", "vitdet_tiny", "--k", "[8]", "--output", "a b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a b/results.json").is_file()


@pytest.mark.parametrize("tool", ["demo", "serve"])
def test_a_missing_library_for_ids_is_told_before_anything_is_loaded(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="track ids need the trackers library"):
        importlib.import_module(tool).run(options_of(tool, "track=true", "weights=none.safetensors"))
