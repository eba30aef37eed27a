"""The folder of an engine: its manifest, and the network that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.engine.backends import ONNXRuntime, OpenVINO, Precision, quickest_precision
from eventful_det.engine.recogniser import CompiledRecogniser
from eventful_det.engine.rf_detr import CompiledRFDETR, RFDETRConfig
from eventful_det.engine.vitdet.detector import CompiledViTDet
from eventful_det.errors import UserError
from eventful_det.files import JsonObject
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.options import from_values
from eventful_det.recognition.config import RecogniserConfig

MANIFEST, FORMAT = "engine.json", "eventful-det-engine/2"
_KEYS = {"engine", "model", "size", "buckets", "config"}


def load_engine(
    folder: Path,
    *,
    precision: Precision | Literal["auto"] = "float32",
    threads: int | None = None,
    warm_up: bool = True,
) -> CompiledViTDet | CompiledRFDETR | CompiledRecogniser:
    """A detector or a recogniser from a folder that `export_engine` wrote.

    Args:
        folder: of the engine.
        precision: in which it computes; "auto" = the quickest here.
        threads: of the CPU; None = as many as PyTorch uses.
        warm_up: compile everything now.

    Raises:
        UserError: the folder holds no engine, or what runs it is not installed.
    """
    about = read_manifest(folder)
    kind: type[OpenVINO] | type[ONNXRuntime] = OpenVINO if about["engine"] == "openvino" else ONNXRuntime
    if precision not in ("float32", "bfloat16", "auto"):  # what is int8 was made so when it was exported
        raise UserError(f"precision of an engine must be float32, bfloat16 or auto, got {precision}")
    if precision == "auto":
        precision = quickest_precision() if kind is OpenVINO else "float32"
    (height, width), buckets, backend = about["size"], tuple(about["buckets"]), kind(folder, precision, threads)
    network: CompiledViTDet | CompiledRFDETR | CompiledRecogniser
    if about["model"] == "vitdet":
        config = ModelConfig.from_dict(about["config"])
        network = CompiledViTDet(config, (height, width), Windows(buckets), backend)
    elif about["model"] == "recogniser":
        network = CompiledRecogniser(RecogniserConfig.from_dict(about["config"]), buckets, backend)
    else:
        network = CompiledRFDETR(from_values(RFDETRConfig, about["config"], "config"), height, buckets, backend)
    if warm_up:
        network.warm_up()
    return network


def is_engine(folder: Path) -> bool:
    """Whether it is the folder of an engine."""
    return (folder / MANIFEST).is_file()


def holds_recogniser(folder: Path) -> bool:
    """Whether the engine in a folder recognises actions."""
    return bool(read_manifest(folder)["model"] == "recogniser")


def read_manifest(folder: Path) -> JsonObject:
    """What is in an engine's folder.

    Raises:
        UserError: it is none.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if about["format"] != FORMAT or not set(about) >= _KEYS:
            raise KeyError("format")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder} holds no engine; eventful-det export writes one") from error
    return dict(about)
