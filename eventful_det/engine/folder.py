"""The folder of an engine: its manifest, and the network that it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eventful_det.detectors.vitdet.config import ModelConfig, Side
from eventful_det.engine.backends import Format, ONNXRuntime, OpenVINO, Precision, quickest_precision
from eventful_det.engine.recogniser import CompiledRecogniser
from eventful_det.engine.rf_detr import CompiledRFDETR, RFDETRConfig
from eventful_det.engine.vitdet.detector import CompiledViTDet
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.options import Natural, convert, from_values
from eventful_det.outputs import LOCK, as_json, write_json
from eventful_det.recognition.config import RecogniserConfig

MANIFEST = "engine.json"
Model = Literal["vitdet", "rf_detr", "recogniser"]
PARTS: dict[Model, tuple[str, ...]] = {  # the graphs of each kind of network
    "vitdet": ("dense", "backbone", "pyramid", "proposals", "regions"),
    "rf_detr": ("dense", "backbone", "heads"),
    "recogniser": ("dense", "backbone", "temporal"),
}
_SUFFIXES: dict[Format, tuple[str, ...]] = {"openvino": (".xml", ".bin"), "onnx": (".onnx",)}


@dataclass(frozen=True)
class Manifest:
    """What an engine is, as its folder says.

    Attributes:
        engine: that runs the graphs.
        model: the kind of network.
        size: (height, width) of its inputs in pixels.
        buckets: numbers of windows or tokens that are compiled.
        precision: of the large graphs.
        config: of the network, by its kind.
        files: the graphs, each with its SHA-256.
        format: of the folder.
        digest: SHA-256 of all the rest.
    """

    engine: Format
    model: Model
    size: tuple[Side, Side]
    buckets: tuple[int | float, ...]
    precision: Literal["float32", "int8"]
    config: JsonObject
    files: Mapping[str, str] = field(default_factory=dict)
    format: Literal["eventful-det-engine/3"] = "eventful-det-engine/3"
    digest: str = ""


def load_engine(
    folder: str | Path,
    *,
    precision: Precision | Literal["auto"] = "float32",
    threads: int | None = None,
    warm_up: bool = True,
) -> CompiledViTDet | CompiledRFDETR | CompiledRecogniser:
    """A detector or a recogniser from a folder that `export_engine` wrote.

    Args:
        folder: of the engine, or its manifest.
        precision: in which it computes; "auto" = the quickest here.
        threads: of the CPU; None or 0 = as many as PyTorch uses.
        warm_up: compile everything now.

    Raises:
        UserError: the folder holds no engine, what runs it is not installed, or an option has no such value.
    """
    folder, about = _folder(Path(folder)), read_manifest(Path(folder))
    convert(threads, Natural | None, "threads")
    if set(about.files) != {f"{part}{end}" for part in PARTS[about.model] for end in _SUFFIXES[about.engine]}:
        raise UserError(f"{folder / MANIFEST} names other files than those of its model; export the engine again")
    for name, digest in about.files.items():
        path = folder / name
        if not path.is_file() or _file_digest(path) != digest:
            raise UserError(f"{path} is damaged or missing; export the engine again")
    kind: type[OpenVINO] | type[ONNXRuntime] = OpenVINO if about.engine == "openvino" else ONNXRuntime
    if precision not in ("float32", "bfloat16", "auto"):  # what is int8 was made so when it was exported
        raise UserError(f"precision of an engine must be float32, bfloat16 or auto, got {precision}")
    if precision == "auto":
        precision = quickest_precision() if kind is OpenVINO else "float32"
    backend, buckets = kind(folder, precision, threads), about.buckets
    network: CompiledViTDet | CompiledRFDETR | CompiledRecogniser
    if about.model == "vitdet":
        network = CompiledViTDet(ModelConfig.from_dict(about.config), about.size, Windows(buckets), backend)
    elif about.model == "recogniser":
        network = CompiledRecogniser(RecogniserConfig.from_dict(about.config), buckets, backend)
    else:
        network = CompiledRFDETR(from_values(RFDETRConfig, about.config, "config"), about.size[0], buckets, backend)
    if warm_up:
        network.warm_up()
    return network


def is_engine(folder: Path) -> bool:
    """Whether it is the folder of an engine, or its manifest."""
    return (_folder(folder) / MANIFEST).is_file()


def holds_recogniser(folder: Path) -> bool:
    """Whether the engine in a folder recognises actions."""
    return read_manifest(folder).model == "recogniser"


def write_manifest(folder: Path, about: Manifest) -> None:
    """Complete the folder of an engine, which holds nothing but its graphs, and its lock."""
    files = {path.name: _file_digest(path) for path in sorted(folder.iterdir()) if path.name != LOCK}
    values = vars(dataclasses.replace(about, files=files))
    write_json(folder / MANIFEST, values | {"digest": _digest(as_json(values))})


def read_manifest(folder: Path) -> Manifest:
    """What is in an engine's folder.

    Raises:
        UserError: it is none, or its manifest is another than was written.
    """
    path = _folder(folder) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        about: Any = convert(values, Manifest, MANIFEST)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} holds no whole engine: {error}; eventful-det export writes one") from error
    if about.digest != _digest(values):
        raise UserError(f"{path} was changed since its export, and its graphs were not; export the engine again")
    assert isinstance(about, Manifest)
    return about


def _folder(path: Path) -> Path:
    return path.parent if path.name == MANIFEST else path


def _digest(values: Any) -> str:
    """Of a manifest without its own."""
    text = json.dumps({key: value for key, value in values.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
