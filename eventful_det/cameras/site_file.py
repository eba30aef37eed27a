"""Reading and editing `cameras.yaml`, with one clear line for each fault."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from yaml.error import MarkedYAMLError

from eventful_det.cameras.config import Camera, Limits, Line, Site, Zone
from eventful_det.errors import UserError, printable
from eventful_det.files import written_whole
from eventful_det.options import (
    alternatives,
    convert,
    from_values,
    nearest,
    refuse_unknown,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")  # of what becomes a topic, a label and a folder
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # in no name, address or password that others take
_LARGEST = 2**18  # bytes of a file
_NODES = 100_000  # values in a file, with what aliases repeat


class Faults(UserError):
    """A file that cannot be used. `faults`: a line for each, with the file and its line."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = [printable(fault) for fault in faults]


def read_site(path: Path, names: Sequence[str] | None = None) -> Site:
    """Read `cameras.yaml`. `${NAME}` in it stands for a variable of the environment.

    Args:
        path: of the file.
        names: classes that the detector knows; None = any may be asked for.

    Raises:
        UserError: it cannot be read, or has faults (`Faults`).
    """
    return parse_site(_text_of(path), path.name, names)


def parse_site(text: str, file: str, names: Sequence[str] | None = None) -> Site:
    """The same for the text of a file.

    Raises:
        Faults: it has some.
    """
    reader = _Reader()
    site = reader.read(text)
    if site is not None and names is not None:
        reader.check_classes(site, names)
    if reader.faults or site is None:
        raise Faults([f"{file}:{line}: {message}" for line, message in sorted(reader.faults)])
    return site


def edit_regions(path: Path, camera: str, regions: Mapping[str, object], names: Sequence[str] | None = None) -> None:
    """Exchange options of a camera in a file, such as its masks and zones; all else stays as it is written there.

    Raises:
        UserError: they are none, or stand where they cannot be exchanged; the file stays as it is.
    """
    text = _text_of(path)
    parse_site(text, path.name, names)
    path = path.resolve()  # a link stays one
    for key, value in regions.items():
        root: Any = yaml.compose(text, yaml.SafeLoader)
        try:
            node = _child(_child(root, "cameras")[1], camera)[1]
        except KeyError:  # it comes from <<, or is no longer there
            raise UserError(f"{path.name} has no camera {camera} of its own; edit the file") from None
        written = json.dumps(value)
        if _VARIABLE.search(written):  # whoever draws must not be told what stands in the environment
            raise UserError(f"{camera}: {key} must not name variables of the environment")
        try:
            key_node, old = _child(node, key)
        except KeyError:
            start = node.start_mark.index
            if node.flow_style:
                text = f"{text[: start + 1]}{key}: {written}, {text[start + 1 :]}"
            else:
                text = f"{text[:start]}{key}: {written}\n{' ' * node.start_mark.column}{text[start:]}"
        else:
            if old.start_mark.index < key_node.end_mark.index:  # *alias: it stands elsewhere
                raise UserError(f"{camera}: {key} is shared with others in {path.name}; edit the file")
            text = text[: key_node.end_mark.index] + f": {written}" + text[_end(old) :]
    parse_site(text, path.name, names)
    with written_whole(path) as part:
        part.touch(0o600)
        shutil.copymode(path, part)  # there may be passwords in it
        part.write_text(text, encoding="utf-8")


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST >> 10} KiB; is it a cameras.yaml?")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _child(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, Any]:
    """Key and value of a mapping; raises KeyError."""
    for key, value in node.value:
        if key.value == name:
            return key, value
    raise KeyError(name)


def _end(node: yaml.Node) -> int:
    """Where a value ends, without the comments behind it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


class _Reader:
    """Reads a file and collects its faults."""

    def __init__(self) -> None:
        self.faults: list[tuple[int, str]] = []
        self.lines: dict[str, int] = {}  # by dotted name
        self.hidden: set[int] = set()  # nodes with something from the environment, which no fault may tell

    def read(self, text: str) -> Site | None:
        """The site; None with faults."""
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                self.faults.append((1, "expected options, with `cameras:` at the left"))
                return None
            self._prepare(node, {})
            values = loader.construct_document(node)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
            mark = getattr(error, "problem_mark", None)
            problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
            if found := re.search(r"(alias|anchor|tag) '", problem):  # it may be a password that was not quoted
                problem = f"{problem[: found.end() - 2]}; text that begins with & * or ! has to stand in quotes"
            self.faults.append((mark.line + 1 if mark else 1, f"not YAML: {problem}"))
            return None
        self._check(Site, values, node, "")
        return None if self.faults else from_values(Site, values, "")

    def check_classes(self, site: Site, names: Sequence[str]) -> None:
        """Classes that nobody knows are faults."""
        for place, wanted in _wanted(site):
            for name in wanted or ():
                if name not in names:
                    where = f"{place}.classes"
                    line = self.lines.get(f"{where}.{name}", self.lines.get(where, 1))
                    self.faults.append((line, f"{where}: unknown class {name!r}; {nearest(name, names)}"))

    def _prepare(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Put variables of the environment in their places; names may be there once.

        Args:
            node: to look through.
            sizes: of nodes that were looked at, as aliases lead to them again; 0 while their turn lasts.

        Returns:
            How many values there are in it, with what aliases repeat.

        Raises:
            YAMLError: there are too many, or without end.
        """
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise MarkedYAMLError(None, None, "an alias stands in what it repeats", node.start_mark)
            return sizes[id(node)]
        size = sizes[id(node)] = 0
        if isinstance(node, yaml.ScalarNode):
            for name in _VARIABLE.findall(node.value):
                self.hidden.add(id(node))
                if name not in os.environ:
                    self.faults.append((node.start_mark.line + 1, f"there is no variable {name} in the environment"))
            node.value = _VARIABLE.sub(lambda found: os.environ.get(found[1], ""), node.value)
            if _CONTROL.search(node.value):
                self.faults.append((node.start_mark.line + 1, "text with a line break or a control character"))
        else:
            nodes = node.value
            if isinstance(node, yaml.MappingNode):
                nodes = [both for pair in node.value for both in pair]
                keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                twice = [key for i, (key, _) in enumerate(node.value) if key.value in keys[:i]]
                self.faults += [(key.start_mark.line + 1, f"{key.value} is there twice") for key in twice]
            size = sum(self._prepare(child, sizes) for child in nodes)
            if any(id(child) in self.hidden for child in nodes):
                self.hidden.add(id(node))
        if size > _NODES:
            raise MarkedYAMLError(None, None, f"more than {_NODES} values, with aliases", node.start_mark)
        sizes[id(node)] = size + 1
        return size + 1

    def _check(self, hint: Any, value: Any, node: yaml.Node, name: str) -> bool:
        """Whether a value is as its type says; its faults are kept."""
        before = len(self.faults)
        line = self.lines.setdefault(name, node.start_mark.line + 1)
        records = [kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)]
        mappings = [kind for kind in alternatives(hint) if get_origin(kind) is dict]
        try:
            if isinstance(value, Mapping) and isinstance(node, yaml.MappingNode) and (records or mappings):
                children = self._children(node, name)
                if records:
                    self._check_record(records[0], value, children, name)
                else:
                    kind = get_args(mappings[0])[1]
                    for key, child in children.items():
                        if kind in (Camera, Zone, Line):
                            self._check_name(key, name)
                        self._check(kind, value[key], child, f"{name}.{key}")
            else:
                convert(value, hint, name or "it")
        except UserError as error:
            text = str(error)
            if id(node) in self.hidden or name in ("mqtt.password", "webhook.secret", "webhook.url"):
                text = text.partition(", got ")[0]
            self.faults.append((line, text if text.startswith(name) else f"{name}: {text}"))
        return len(self.faults) == before

    def _check_name(self, key: str, name: str) -> None:
        if not _NAME.fullmatch(key):
            rule = f"a name has letters, digits, - and _ only, 48 at most, got {key[:60]!r}"
            self.faults.append((self.lines[f"{name}.{key}"], f"{name}: {rule}"))

    def _check_record(self, kind: Any, value: Mapping[str, Any], children: dict[str, yaml.Node], name: str) -> None:
        hints = get_type_hints(kind, include_extras=True)
        sound = True
        for key, child in children.items():
            try:
                refuse_unknown({key: None}, hints, name)
                sound &= self._check(hints[key], value[key], child, _dotted(name, key))
            except UserError as error:
                self.faults.append((child.start_mark.line + 1, str(error)))
        if sound:
            from_values(kind, {key: one for key, one in value.items() if key in hints}, name)

    def _children(self, node: yaml.MappingNode, name: str) -> dict[str, yaml.Node]:
        """The values of a mapping by their keys."""
        found: dict[str, yaml.Node] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{name}: the name {getattr(key, 'value', 'of a group')!r} has to stand in quotes")
            found[key.value] = child
            self.lines[_dotted(name, key.value)] = line
        return found


def _wanted(site: Site) -> Iterator[tuple[str, dict[str, Limits] | tuple[str, ...] | None]]:
    """Everything that names classes, with its dotted name."""
    for name, camera in site.cameras.items():
        yield f"cameras.{name}", camera.classes
        for zone, one in camera.zones.items():
            yield f"cameras.{name}.zones.{zone}", one.classes
        for line, other in camera.lines.items():
            yield f"cameras.{name}.lines.{line}", other.classes


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
