"""A detector as a folder of graphs for OpenVINO or ONNX Runtime."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.detector import DIVISOR, Detector
from eventful_det.engine.backends import SUFFIX, Backend, Format, import_package
from eventful_det.engine.folder import FORMAT, MANIFEST
from eventful_det.engine.graphs import Graph
from eventful_det.engine.rf_detr import CompiledRFDETR, RFDETRConfig
from eventful_det.engine.rf_detr_graphs import rf_detr_graphs
from eventful_det.engine.vitdet import CompiledViTDet
from eventful_det.engine.vitdet_graphs import vitdet_graphs
from eventful_det.errors import UserError
from eventful_det.gating.whole_windows import SHARES, Windows
from eventful_det.outputs import write_json

_OPSET = 18


def export_detector(
    detector: Detector | EventfulRFDETR,
    folder: Path,
    *,
    format: Format = "openvino",
    size: tuple[int, int] | None = None,
    buckets: Sequence[float | int] = SHARES,
) -> None:
    """Write the graphs of a detector and a manifest; `load_detector(folder)` reads them.

    One graph serves all numbers of windows, or of tokens of an RF-DETR; its shapes are set when it is loaded. Weights
    are written twice, for dense frames and for gated ones.

    Args:
        detector: in evaluation mode, on the CPU, in float32.
        folder: made if it is missing; files of an earlier export are replaced.
        format: "openvino" or "onnx".
        size: (height, width) of the network's input in pixels: multiples of 32, or a square of whole windows for an
            RF-DETR; None = the model's own, of a ViTDet for frames of 16:9.
        buckets: numbers of windows or tokens for gated frames, see `Windows`.

    Raises:
        UserError: the size or the buckets cannot be, the detector is of a kind that no engine knows, or a package that
            this needs is missing.
    """
    if detector.spec.dtype != torch.float32 or detector.device.type != "cpu":
        raise UserError("export needs a detector on the CPU in float32; precision is chosen when the engine is loaded")
    height, width = _checked(detector, default_size(detector) if size is None else size)
    rule = Windows(tuple(buckets))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # a folder without one is no engine, should this be cut short
    with torch.no_grad():
        for graph in graphs_of(detector, (height, width)):
            write = _write_openvino if format == "openvino" else _write_onnx
            write(graph, folder / f"{graph.name}{SUFFIX[format]}")
    about = {
        "format": FORMAT,
        "engine": format,
        "model": "vitdet" if isinstance(detector, Detector) else "rf_detr",
        "size": [height, width],
        "buckets": list(rule.buckets),
        "config": dataclasses.asdict(detector.config if isinstance(detector, Detector) else RFDETRConfig.of(detector)),
    }
    write_json(folder / MANIFEST, about)


def graphs_of(detector: Detector | EventfulRFDETR, size: tuple[int, int]) -> Iterator[Graph]:
    """The graphs of a detector for inputs of `size` (height, width) in pixels, in evaluation mode.

    Raises:
        UserError: the detector is of a kind that no engine knows.
    """
    return vitdet_graphs(detector, size) if isinstance(detector, Detector) else rf_detr_graphs(detector, size[0])


def in_engine(
    detector: Detector | EventfulRFDETR, size: tuple[int, int], buckets: Sequence[float | int], backend: Backend
) -> CompiledViTDet | CompiledRFDETR:
    """A detector whose graphs for inputs of `size` a backend runs."""
    if isinstance(detector, Detector):
        return CompiledViTDet(detector.config, size, Windows(tuple(buckets)), backend)
    return CompiledRFDETR(RFDETRConfig.of(detector), size[0], tuple(buckets), backend)


def default_size(detector: Detector | EventfulRFDETR) -> tuple[int, int]:
    """(height, width) of inputs: of an RF-DETR the model's own, of a ViTDet those made of frames of 16:9."""
    if isinstance(detector, EventfulRFDETR):
        return detector.parts.side, detector.parts.side
    config = detector.config
    short = min(config.short_side, round(config.long_side * 9 / 16))
    height, width = (-(-round(side) // DIVISOR) * DIVISOR for side in (short, short * 16 / 9))
    return height, width


def _checked(detector: Detector | EventfulRFDETR, size: tuple[int, int]) -> tuple[int, int]:
    """The size, if it can be one."""
    square = isinstance(detector, EventfulRFDETR)
    step = detector.spec.patch * detector.spec.regions if square else DIVISOR
    if any(side % step or side < step for side in size):
        raise UserError(f"size=[{size[0]},{size[1]}]: height and width must be multiples of {step} pixels")
    if square and size[0] != size[1]:
        raise UserError(f"size=[{size[0]},{size[1]}]: RF-DETR takes squares; give twice the same")
    return size


def _write_openvino(graph: Graph, path: Path) -> None:
    ov: Any = import_package("openvino")
    shapes = [
        [-1 if i in free else n for i, n in enumerate(x.shape)]
        for x, free in zip(graph.example, graph.free, strict=True)
    ]
    with _quiet():
        model = ov.convert_model(graph.module, example_input=graph.example, input=[ov.PartialShape(s) for s in shapes])
        ov.save_model(model, path, compress_to_fp16=False)


def _write_onnx(graph: Graph, path: Path) -> None:
    import_package("onnx")
    names = [f"input{i}" for i in range(len(graph.example))]
    axes = {name: {i: f"{name}_{i}" for i in free} for name, free in zip(names, graph.free, strict=True) if free}
    with _quiet():
        torch.onnx.export(
            graph.module,
            graph.example,
            str(path),
            input_names=names,
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of whatever depends on a shape, and of themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
