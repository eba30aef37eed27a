"""A network as a folder of graphs for OpenVINO or ONNX Runtime."""

from __future__ import annotations

import io
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.video.transforms import Image
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.vitdet.config import Side
from eventful_det.detectors.vitdet.detector import DIVISOR, Detector
from eventful_det.engine.backends import SUFFIX, Backend, Format, Graph, OpenVINO, import_package, openvino_core
from eventful_det.engine.folder import MANIFEST, PARTS, Manifest, Model, is_engine, write_manifest
from eventful_det.engine.recogniser import CompiledRecogniser, recogniser_graphs
from eventful_det.engine.rf_detr import CompiledRFDETR, RFDETRConfig, rf_detr_graphs
from eventful_det.engine.vitdet.detector import CompiledViTDet, widescreen_size
from eventful_det.engine.vitdet.graphs import vitdet_graphs
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.whole_windows.rule import SHARES, Windows
from eventful_det.options import convert
from eventful_det.outputs import LOCK, owned
from eventful_det.recognition.recogniser import Recogniser

_OPSET = 18
_GRAPHS = "|".join({part for parts in PARTS.values() for part in parts})
_OWN = re.compile(rf"({_GRAPHS})(\.new)?\.(xml|bin|onnx)|(\.engine\.\d+\.part|engine)\.json|{re.escape(LOCK)}")
_INT8 = "dense", "backbone"  # graphs; those of the heads would cost accuracy, and save little
_FRAMES = 12  # that int8 is calibrated on, at least, of longer videos; fewer than twice as many


Network = Detector | EventfulRFDETR | Recogniser
"""What can be compiled."""
_MODELS: dict[Model, type[Network]] = {"vitdet": Detector, "rf_detr": EventfulRFDETR, "recogniser": Recogniser}


def export_engine(
    network: Network,
    folder: str | Path,
    *,
    format: Format = "openvino",
    size: tuple[int, int] | None = None,
    buckets: Sequence[float | int] = SHARES,
    calibrate: Iterable[Image] | None = None,
) -> None:
    """Write the graphs of a detector or a recogniser and a manifest; `load_engine(folder)` reads them.

    One graph serves all numbers of windows, or of tokens of an RF-DETR or a recogniser; its shapes are set when it is
    loaded. Weights are written twice, for dense frames and for gated ones.

    Args:
        network: in evaluation mode, on the CPU, in float32.
        folder: made, or takes the place of an earlier engine, when all is written, beside it until then.
        format: "openvino" or "onnx".
        size: (height, width) of the network's input in pixels: multiples of 32, or a square of whole windows for an
            RF-DETR; None = the model's own, of a ViTDet for frames of 16:9. A recogniser has no other than its own.
        buckets: numbers of windows or tokens for gated frames, see `Windows`.
        calibrate: frames of a video, `(h, w, 3)` uint8 RGB; layers are then int8. Of detectors, for OpenVINO.

    Raises:
        UserError: format, size or buckets cannot be, the folder holds other files than an engine's or is being written
            to, the network is of a kind that no engine knows, or a package that this needs is missing.
    """
    folder = Path(folder).resolve()
    convert(format, Format, "format")
    if not isinstance(network, Network) or isinstance(network, CompiledRecogniser):
        raise UserError(f"export takes a network in PyTorch, not a {type(network).__name__}")
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (is_engine(folder) and _is_ours(folder))):
        raise UserError(f"{folder} holds other files than a whole engine's, or is a file; give a new folder")
    if network.spec.dtype != torch.float32 or network.device.type != "cpu":
        raise UserError("export needs a network on the CPU in float32; precision is chosen when the engine is loaded")
    size = _checked(network, default_size(network) if size is None else size)
    rule = Windows(cast("tuple[float | int, ...]", convert(buckets, tuple[int | float, ...], "buckets")))
    if calibrate is not None and (format != "openvino" or isinstance(network, Recogniser)):
        raise UserError("int8 is for detectors in OpenVINO; leave precision and calibrate out")
    frames = None if calibrate is None else calibration_frames(calibrate)
    part = folder.with_name(f"{folder.name}.part")
    if is_engine(part):
        raise UserError(f"{part} is a whole engine, perhaps of an export that was ended; rename or remove it")
    with owned(part):
        if not _is_ours(part):
            raise UserError(f"{part} holds other files than an engine's; give another folder than {folder}")
        try:
            for left in part.iterdir():  # by an export that was killed
                if left.name != LOCK:
                    left.unlink()
            _write(network, part, format, size, rule, frames)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _take_over(part, folder)
        shutil.rmtree(part, ignore_errors=True)


def _take_over(part: Path, folder: Path) -> None:
    """Put an engine in the place of what a folder holds. The folder stays, since it may be a mount point."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for path in sorted(part.iterdir(), key=lambda path: path.name == MANIFEST):  # which makes it whole, last
        if path.name != LOCK:
            shutil.move(path, folder / path.name)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what an export writes."""
    return all(path.is_file() and _OWN.fullmatch(path.name) for path in folder.iterdir())


def _write(
    network: Network, folder: Path, format: Format, size: tuple[int, int], rule: Windows, frames: list[Image] | None
) -> None:
    with torch.no_grad():
        for graph in graphs_of(network, size):
            write = write_openvino if format == "openvino" else write_onnx
            write(graph, folder / f"{graph.name}{SUFFIX[format]}")
    if frames is not None and not isinstance(network, Recogniser):
        recorder = _Recorder(folder)
        _quantise(in_engine(network, size, rule.buckets, recorder), recorder, folder, frames)
    about = Manifest(
        engine=format,
        model=next(model for model, kind in _MODELS.items() if isinstance(network, kind)),
        size=size,
        buckets=rule.buckets,
        precision="float32" if frames is None else "int8",
        config=vars(RFDETRConfig.of(network) if isinstance(network, EventfulRFDETR) else network.config),
    )
    write_manifest(folder, about)


def graphs_of(network: Network, size: tuple[int, int]) -> Iterator[Graph]:
    """The graphs of a network for inputs of `size` (height, width) in pixels, in evaluation mode.

    Raises:
        UserError: the network is of a kind that no engine knows.
    """
    if isinstance(network, Recogniser):
        return recogniser_graphs(network)
    return vitdet_graphs(network, size) if isinstance(network, Detector) else rf_detr_graphs(network, size[0])


@overload
def in_engine(
    network: Recogniser, size: tuple[int, int], buckets: Sequence[float | int], backend: Backend
) -> CompiledRecogniser: ...


@overload
def in_engine(
    network: Detector | EventfulRFDETR, size: tuple[int, int], buckets: Sequence[float | int], backend: Backend
) -> CompiledViTDet | CompiledRFDETR: ...


def in_engine(
    network: Network, size: tuple[int, int], buckets: Sequence[float | int], backend: Backend
) -> CompiledViTDet | CompiledRFDETR | CompiledRecogniser:
    """A network whose graphs for inputs of `size` a backend runs."""
    if isinstance(network, Recogniser):
        return CompiledRecogniser(network.config, tuple(buckets), backend)
    if isinstance(network, Detector):
        return CompiledViTDet(network.config, size, Windows(tuple(buckets)), backend)
    return CompiledRFDETR(RFDETRConfig.of(network), size[0], tuple(buckets), backend)


def default_size(detector: Network) -> tuple[int, int]:
    """(height, width) of inputs: of a ViTDet those made of frames of 16:9, else the model's own."""
    if isinstance(detector, Recogniser):
        return detector.config.size
    if isinstance(detector, EventfulRFDETR):
        return detector.parts.side, detector.parts.side
    return widescreen_size(detector.config)


def _checked(detector: Network, size: tuple[int, int]) -> tuple[int, int]:
    """The size, if it can be one."""
    size = cast("tuple[int, int]", convert(size, tuple[Side, Side], "size"))
    if isinstance(detector, Recogniser):
        if size != detector.config.size:
            raise UserError(f"size=[{size[0]},{size[1]}]: this recogniser takes views of {detector.config.size} pixels")
        return size
    square = isinstance(detector, EventfulRFDETR)
    step = detector.spec.patch * detector.spec.regions if square else DIVISOR
    if any(side % step or side < step for side in size):
        raise UserError(f"size=[{size[0]},{size[1]}]: height and width must be multiples of {step} pixels")
    if square and size[0] != size[1]:
        raise UserError(f"size=[{size[0]},{size[1]}]: RF-DETR takes squares; give twice the same")
    return size


def write_openvino(graph: Graph, path: Path) -> None:
    """Write a graph for OpenVINO."""
    ov: Any = import_package("openvino")
    shapes = [
        [-1 if i in free else n for i, n in enumerate(x.shape)]
        for x, free in zip(graph.example, graph.free, strict=True)
    ]
    with _quiet():
        model = ov.convert_model(graph.module, example_input=graph.example, input=[ov.PartialShape(s) for s in shapes])
        ov.save_model(model, path, compress_to_fp16=False)


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph for ONNX Runtime."""
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


class _Recorder(OpenVINO):
    """OpenVINO in float32, which remembers what its graphs are run on."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        super().__init__(folder, "float32", threads)
        self.inputs: dict[str, list[list[NDArray[np.float32]]]] = {}

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Run a graph."""
        if name in _INT8:
            self.inputs.setdefault(name, []).append([tensor.numpy(force=True).copy() for tensor in inputs])
        return super().run(name, *inputs)


def _quantise(
    detector: CompiledViTDet | CompiledRFDETR, recorder: _Recorder, folder: Path, frames: Sequence[Image]
) -> None:
    """Replace the large graphs of a folder by their like in int8, by NNCF after training.

    Args:
        detector: in the engine of the folder, run by `recorder`.
        recorder: see there.
        folder: with the graphs for OpenVINO.
        frames: `(h, w, 3)` uint8 RGB, which are run dense and gated.
    """
    nncf: Any = import_package("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own way sets every handler of the root logger, too
    for rule in (None, Dense()):
        for _ in detector.stream(frames, rule=rule, scene_cuts=False, hold=1):
            pass
    core = openvino_core()
    for name in _INT8:
        inputs = recorder.inputs[name]
        path = folder / f"{name}{SUFFIX['openvino']}"
        data = nncf.Dataset([dict(enumerate(arrays)) for arrays in inputs])
        with redirect_stdout(io.StringIO()):  # its progress
            graph = nncf.quantize(
                core.read_model(path), data, subset_size=len(inputs), model_type=nncf.ModelType.TRANSFORMER
            )
        new = path.with_suffix(".new.xml")  # not over the weights that are being read
        import_package("openvino").save_model(graph, new, compress_to_fp16=False)
        new.with_suffix(".bin").replace(path.with_suffix(".bin"))
        new.replace(path)


def calibration_frames(images: Iterable[Image], least: int = _FRAMES) -> list[Image]:
    """At least so many images where there are, evenly spread, and fewer than twice as many.

    Raises:
        UserError: there is none, or NNCF is not installed.
    """
    import_package("nncf")
    kept: list[Image] = []
    stride = 1
    for i, image in enumerate(images):
        if i % stride == 0:
            kept.append(image)
        if len(kept) == 2 * least:
            kept, stride = kept[::2], 2 * stride
    if not kept:
        raise UserError("calibrate: the video has no frame; give another")
    return kept
