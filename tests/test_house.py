"""The rules of the house: no import circle, layers that know nothing above them, a typed and lazy public surface."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eventful_det
from eventful_det.detectors.vitdet.detector import Detector

ROOT = Path(eventful_det.__file__).parent
MODULES = {
    ".".join(("eventful_det", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}

LARGE = "torch.*,torchvision.*,timm.*,cv2.*,av.*,transformers.*,ray.*,huggingface_hub.*,IPython.*,matplotlib.*"
USER = """
import numpy as np
from eventful_det import BudgetOptions, Dense, Detections, Detector, Focus, Gmacs, LargestError, Latency, Paper
from eventful_det import Rescorer, Rows, Selector, Stream, StreamPool, StreamResult, load_detector

detector: Detector = load_detector()
stream: Stream = detector.stream("a.mp4", budget=0.25, rule=Rows(exact=True), timing=True)
for result in map(Rescorer(), stream):
    boxes: Detections = result.detections
    total: int = result.cost.total
    x1: float = boxes.boxes[0, 0].item()
stream.budget = Gmacs(40)
stream.budget = Selector(Focus(2.0), Latency(0.05))
with StreamPool(detector, options=BudgetOptions(bucket=2, max_age=100)) as pool:
    name: str = pool.add(np.zeros((2, 96, 96, 3), np.uint8), name="gate")
    results: list[StreamResult] = next(pool)
(step,) = detector.step([detector.input_transform(result.image)], detector.init_state(), rule=Dense())
detector.stream("a.mp4", rule=Paper(), budget=Selector(LargestError(), 96))
detector.stream("a.mp4", bugdet=1)
detector.stream("a.mp4", budget="much")
StreamPool(detector, rule="rows")
"""


def imports(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere, inside functions and for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    packages = {module[:at] for module in found for at, letter in enumerate(module) if letter == "."}  # run first
    found |= {package for package in packages if not name.startswith(f"{package}.")}
    return {module for module in found if module in MODULES and module not in (name, "eventful_det")}


GRAPH = {name: imports(name, path) for name, path in MODULES.items() if name != "eventful_det"}


def test_no_import_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_chains_of_imports_are_no_longer_than_they_were() -> None:
    length: dict[str, int] = {}
    for name in TopologicalSorter(GRAPH).static_order():  # what a module imports comes before it
        length[name] = 1 + max((length[other] for other in GRAPH.get(name, ())), default=0)
    assert max(length.values()) <= 23


def test_the_way_from_a_stream_to_attention(tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and files of ours between `next(stream)` and the attention product."""
    found: list[list[str]] = []

    def spy(*args: torch.Tensor, **options: object) -> torch.Tensor:
        frames = [frame.filename for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        found.append(frames)
        return attention(*args, **options)  # type: ignore[arg-type]

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert len(list(tiny_detector.stream("synthetic:1", max_frames=2))) == 2
    assert found and max(map(len, found)) <= 11 and max(len(set(files)) for files in found) <= 5


@pytest.mark.parametrize(
    ("room", "stranger"),
    [
        ("runtime", "detectors.vitdet"),
        ("runtime", "detectors.rf_detr"),
        ("evaluation", "detectors.vitdet"),
        ("detectors", "runtime"),
        ("gating", "detectors"),
    ],
)
def test_a_room_does_not_know_what_is_above_it(room: str, stranger: str) -> None:
    for name, known in GRAPH.items():
        if name == "eventful_det.detectors.streaming":
            continue  # `stream` is there for users
        if name.startswith(f"eventful_det.{room}."):
            assert not {one for one in known if one.startswith(f"eventful_det.{stranger}")}, name


def test_the_public_surface_is_there_and_loaded_when_asked_for() -> None:
    for name in eventful_det.__all__:
        assert getattr(eventful_det, name) is not None
    code = "import sys, eventful_det; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="nothing"):
        eventful_det.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_a_room_holds_at_most_a_dozen_files() -> None:
    rooms = Counter(path.parent.relative_to(ROOT).as_posix() for path in MODULES.values())
    assert not {room: files for room, files in rooms.items() if files > 12}


def test_no_public_signature_has_an_any() -> None:
    """Data of JSON files apart, which has a name: `JsonObject`."""
    found = [
        f"{name}.{function.name}"
        for name, path in MODULES.items()
        for function in public_functions(ast.parse(path.read_text()))
        for annotation in annotations(function)
        if any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))
    ]
    assert not found


def public_functions(place: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that users may call, `__init__` and its like included."""
    overloaded = set()
    for node in place.body:
        private = isinstance(node, ast.ClassDef | ast.FunctionDef) and re.match(r"_(?!_)", node.name)
        if isinstance(node, ast.ClassDef) and not private:
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not private:
            if is_overload(node):
                overloaded.add(node.name)
            elif node.name in overloaded:
                continue  # users see the overloads alone
            yield node


def is_overload(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "overload" for one in function.decorator_list)


def annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    """Those of all arguments and of the result."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    parts = [function.returns, *(argument.annotation for argument in arguments if argument is not None)]
    return [part for part in parts if part is not None]


@pytest.mark.slow
def test_a_users_script_is_typed(tmp_path: Path) -> None:
    """All of it is understood by mypy in its strictest mode, but for the three mistakes at its end."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert (ROOT / "py.typed").is_file()
    script = tmp_path / "user.py"
    script.write_text(USER)
    config = tmp_path / "mypy.ini"  # of the large libraries everything is Any: they would take most of the time
    config.write_text(f"[mypy]\nstrict = true\nfollow_imports = silent\n[mypy-{LARGE}]\nfollow_imports = skip\n")
    cache = ROOT.parent / ".mypy_cache" / "users_script"  # of what has not changed since the last time
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "--config-file", str(config), str(script)]
    there = {**os.environ, "MYPYPATH": str(ROOT.parent)}  # mypy does not see every kind of editable installation
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=there)
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    last = USER.count("\n")
    assert {int(line.split(":")[1]) for line in lines} == {last - 2, last - 1, last}, done.stdout
    assert "Any" not in done.stdout
