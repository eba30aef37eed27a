"""From a command line to a tool's typed options, and from whatever ends the tool to one line and an exit status.

A tool is a module with `Options`, a dataclass that is its schema, and `run(options)`. Its defaults are those of
`configs/NAME.yaml`. These are the same:

    python tools/demo.py source="my clip (1).mp4" output=out gate=paper
    eventful-det detect "my clip (1).mp4" --output out --gate paper

Values of options that hold a number, a word or text are taken literally; lists and mappings are written in Hydra's
grammar. Command lines with Hydra's own flags, such as -m, run under `hydra.main`; there values are Hydra's, so that
they can be swept.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eventful_det import __version__
from eventful_det.errors import UserError
from eventful_det.options import alternatives, find_type, from_values, nearest
from eventful_det.outputs import Stdout, print_error

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
COMMANDS = {
    "detect": "demo",
    "serve": "serve",
    "evaluate": "eval_net",
    "train": "train_net",
    "count": "count_flops",
    "benchmark": "benchmark",
    "convert": "convert_weights",
    "export": "export",
    "label": "pseudo_label",
}
_PAGE = "fastapi uvicorn websockets"
_PACKAGES = {"cv2": "opencv-python-headless", "fastapi": _PAGE, "uvicorn": _PAGE, "websockets": _PAGE}  # by module
_SWITCH = ("true", "yes", "on", "1", "false", "no", "off", "0")
_BARE = {"-m", "--multirun", "-i", "--info", "--hydra-help", "--resolve"}  # flags of Hydra
_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cd", "--config-dir"}
_KEY = re.compile(r"(~|\+{0,2})([\w.@/-]+)(?:=(.*))?", re.DOTALL)


def console_command() -> None:
    """`eventful-det COMMAND ...`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = [f"  {name:10} {_summary(tool)}" for name, tool in COMMANDS.items()]
        usage = "usage: eventful-det COMMAND [SOURCE ...] [--option value ...] [option=value ...]"
        _print("\n".join([usage, "", *lines, "", "eventful-det COMMAND --help lists its options."]))
        return
    if arguments[0] in ("-V", "--version"):
        _print(f"eventful_det {__version__}")
        return
    if arguments[0] not in COMMANDS:
        print_error(f"unknown command {arguments[0]!r}; {nearest(arguments[0], COMMANDS)}")
        sys.exit(2)
    start(COMMANDS[arguments[0]], arguments[1:])


def _print(text: str) -> None:
    print(text, file=Stdout())


def _summary(tool: str) -> str:
    return _listed(tool).split("\n")[0].strip("# ").partition(":")[0]


def _listed(tool: str) -> str:
    """The options of a tool with their defaults and comments, without what is there for Hydra."""
    text = CONFIGS.joinpath(f"{tool}.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^(hydra:.*(\n .*)*|  - (_self_|override hydra/.*))\n", "", text, flags=re.MULTILINE)
    return text.replace("defaults:\n\n", "").rstrip()


def start(tool: str, arguments: Sequence[str] | None = None) -> None:
    """Run a tool as its script does.

    A user's error is printed in one line and ends it with 2. Ctrl-C and a request to terminate end it in the same
    orderly way, with 128 + the signal's number.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    guard(lambda: _start(tool, given, as_command=arguments is not None))


def guard(work: Callable[[], None], tell: Callable[..., None] = print_error) -> None:
    """Do the work; what ends it early becomes one line, by `tell`, and an exit status."""
    stops: list[int] = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        if stops or isinstance(error, KeyboardInterrupt):  # OpenVINO makes errors of its own of an interrupt
            tell("stopped", kind="")
            sys.exit(128 + (stops[0] if stops else error.args[0] if error.args else signal.SIGINT))
        lines = _lines(error)
        if lines is None:
            raise
        for line in lines:
            tell(line)
        sys.exit(2)


def _lines(error: Exception | KeyboardInterrupt) -> list[str] | None:
    """What a user is told of an error; None = it is a fault of ours."""
    if isinstance(error, UserError):
        messages = getattr(error, "faults", [str(error)])  # of a file: a line for each
        return [message.rpartition("UserError: ")[2] for message in messages]  # of a data loader: without its traceback
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        if not name or name in sys.stdlib_module_names or name == "eventful_det":
            return None
        packages = _PACKAGES.get(name, name)
        return [f"there is no {name} here, which this needs: python -m pip install {packages}"]
    if isinstance(error, OSError):
        return [f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"]
    return None


def _start(tool: str, arguments: list[str], as_command: bool) -> None:
    module = importlib.import_module(tool)
    if {"-h", "--help"} & set(arguments):
        text = f"{inspect.getdoc(module)}\n\n{_listed(tool)}"
        for name, script in COMMANDS.items() if as_command else ():
            text = text.replace(f"python tools/{script}.py", f"eventful-det {name}")
        _print(text)
        return
    if _BARE & set(arguments) or {argument.partition("=")[0] for argument in arguments} & _WITH_VALUE:
        _run_hydra(tool, overrides(module, arguments, literal=False))
    else:
        module.run(options_of(tool, arguments))


def options_of(tool: str, arguments: Sequence[str]) -> Any:
    """The `Options` of a tool for a command line.

    Raises:
        UserError: something in it cannot be understood.
    """
    module = importlib.import_module(tool)
    given = overrides(module, arguments)
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command line with Hydra's own flags
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = _in_one_line(lambda: hydra.compose(tool, given))
    finally:
        GlobalHydra.instance().hydra = running
    return _typed(module, config)


def refuse(tool: str, options: Any, names: Sequence[str], why: str) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: one of these is not as the tool has it by itself.
    """
    usual = _usual(tool)
    given = [name for name in names if attrgetter(name)(options) != attrgetter(name)(usual)]
    if given:
        raise UserError(f"{', '.join(given)}: {why}")


@cache
def _usual(tool: str) -> Any:
    """A tool's options where nobody says otherwise; composed once, for `refuse` asks more than once in a run."""
    return options_of(tool, ())


def run_composed(tool: str, config: DictConfig) -> None:
    """Run a tool with a config that Hydra has composed."""
    module = importlib.import_module(tool)
    module.run(_typed(module, config))


def _run_hydra(tool: str, arguments: list[str]) -> None:
    def task(config: DictConfig) -> None:
        from command_line import run_composed  # by its name: Hydra's launchers pickle a task with all it refers to

        run_composed(tool, config)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors come here
    sys.argv = [sys.argv[0], *arguments]
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=tool)(task)
    _in_one_line(main)


def _typed(module: ModuleType, config: DictConfig) -> Any:
    return from_values(module.Options, _in_one_line(lambda: OmegaConf.to_container(config, resolve=True)), "")


def _in_one_line(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = re.split(r"\n\s*(?:See https|full_key|Config search path|Set the environment)", str(error))[0]
        text = " ".join(text.split())
        missing = re.fullmatch(r"In '.*': Could not find '(.*)/(.*)' Available options in '.*': (.*)", text)
        if missing:
            group, choice, choices = missing.groups()
            text = f"there is no {group}/{choice}; {nearest(choice, choices.split())}"
        raise UserError(text) from error


def overrides(module: ModuleType, arguments: Sequence[str], literal: bool = True) -> list[str]:
    """Overrides in Hydra's grammar for a command line.

    Args:
        module: the tool.
        arguments: SOURCE, `--option value`, `option=value` and Hydra's own.
        literal: quote what is to be taken literally.

    Raises:
        UserError: an option is unknown, or has no value.
    """
    given: list[str] = []
    positional: list[str] = []
    left = deque(arguments)
    while left:
        argument = _renamed(module, left.popleft())
        name = argument.partition("=")[0]
        if argument == "--":  # names follow, whatever they look like
            positional += left
            left.clear()
        elif argument in _BARE:
            given.append(argument)
        elif name in _WITH_VALUE:
            given += [argument] if "=" in argument else [argument, _value_of(argument, left)]
        elif name.startswith("--") and len(name) > 2:
            given.append(_override(module, _joined(module, argument[2:], left), literal))
        elif _is_override(module, argument):
            given.append(_override(module, argument, literal))
        elif re.fullmatch(r"-[A-Za-z]\w*", argument) and not os.path.lexists(argument):
            raise UserError(f"unknown option {argument}; options are --name value, and after -- come names of files")
        else:
            positional.append(argument)
    return _positional(module, positional) + given


def _renamed(module: ModuleType, argument: str) -> str:
    """An argument with the option's own name in place of another that the tool also knows it by."""
    name, equals, value = argument.partition("=")
    bare = name.lstrip("-")
    own = getattr(module.Options, "aliases", {}).get(bare) if equals or bare != name else None
    return argument if own is None else f"{name.removesuffix(bare)}{own}{equals}{value}"


def _value_of(argument: str, left: deque[str]) -> str:
    if not left:
        raise UserError(f"{argument} needs a value")
    return left.popleft()


def _joined(module: ModuleType, option: str, left: deque[str]) -> str:
    """`--option value` as `option=value`; `--switch` alone turns it on."""
    name, equals, value = option.partition("=")
    name = name if "/" in name else name.replace("-", "_")
    if equals:
        return f"{name}={value}"
    switch = not _is_group(name) and find_type(module.Options, name) is bool
    if switch and not (left and left[0].lower() in _SWITCH):
        return f"{name}=true"
    return f"{name}={_value_of(f'--{option}', left)}"


def _is_override(module: ModuleType, argument: str) -> bool:
    """Whether an argument sets an option; otherwise it is the name of something, whatever it is made of."""
    found = _KEY.fullmatch(argument)
    if found is None or (found[3] is None and found[1] != "~"):
        return False
    try:
        find_type(module.Options, found[2])
    except UserError:
        return not os.path.lexists(argument)
    return True


def _is_group(name: str) -> bool:
    return "/" in name or "@" in name or (CONFIGS / name).is_dir()


def _override(module: ModuleType, argument: str, literal: bool) -> str:
    """An override as Hydra reads it. Which options there are is checked here, and by the schema, but not by Hydra."""
    found = _KEY.fullmatch(argument)
    if found is None:
        raise UserError(f"{argument} cannot be understood; expected option=value")
    sign, name, value = found.groups()
    if _is_group(name) or name.partition(".")[0] == "hydra":
        return argument
    kind = find_type(module.Options, name)
    if sign != "~":
        sign = "++"  # also values that the config has not; the schema says which there are
        if literal and value != "null":
            value = _value(kind, name, value)
    text = f"{sign}{name}" + ("" if value is None else f"={value}")
    if not _is_readable(text) and literal and value is not None:
        text = f"{sign}{name}={_quoted(value)}"  # the schema says what is expected
    if not _is_readable(text):
        raise UserError(f"{argument} cannot be understood; see the examples of --help")
    return text


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _value(kind: Any, name: str, value: str) -> str:
    """A value as Hydra reads it: text literally, unless it is quoted or a list and no file is called so.

    `a,b` is a list where there may be one.
    """
    if re.fullmatch(r"[\w.%-]+(,[\w.%-]+)+", value) and not _is_scalar(kind) and not os.path.lexists(value):
        value = f"[{value}]"
    around = value[:1] + value[-1:] if len(value) > 1 and not os.path.lexists(value) else ""
    if not value:
        raise UserError(f"{name} needs a value")
    if around in ("''", '""') or not {str, bool} & set(alternatives(kind)):  # `1` turns a switch on, and is text
        return value
    return value if around == "[]" and not _is_scalar(kind) else _quoted(value)


def _is_scalar(kind: Any) -> bool:
    return not any(get_origin(option) is tuple for option in alternatives(kind))


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)
    return QuotedString(escaped, Quote.single).with_quotes()


def _positional(module: ModuleType, values: list[str]) -> list[str]:
    """The options that are given without their names."""
    names: tuple[str, ...] = getattr(module.Options, "positional", ())
    several = len(names) == 1 and not _is_scalar(find_type(module.Options, names[0]))
    if several and len(values) > 1:
        return [f"++{names[0]}=[{','.join(map(_quoted, values))}]"]
    if len(values) > len(names):
        extra = values[len(names)]
        raise UserError(f"{extra!r} cannot be understood; expected option=value or --option value")
    return [f"++{name}={_quoted(value)}" for name, value in zip(names, values, strict=False)]
