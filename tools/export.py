"""Compile a detector or a recogniser for CPUs: a folder of graphs for OpenVINO or ONNX Runtime.

    python tools/export.py                                          # the shipped detector, for OpenVINO
    python tools/export.py model=vitdet_tiny_vid format=onnx size=[320,576] buckets=[0.125,0.25,0.5] output=engine
    python tools/export.py precision=int8 calibrate=my.mp4          # int8, which needs pip install nncf
    eventful-det detect video.mp4 --weights engine                  # then use the folder as weights

Needs `pip install '.[openvino]'` or `'.[onnx]'`. Frames are resized and padded to the size; see docs/engine.md.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import actions
from common import say

from eventful_det.data.video import open_source
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.vitdet.config import Side
from eventful_det.engine.export import Network, export_engine
from eventful_det.engine.folder import is_engine, read_manifest
from eventful_det.errors import UserError
from eventful_det.recognition.checkpoints import load_recogniser


@dataclass(frozen=True)
class Options:
    """What may be asked of the export; configs/export.yaml explains it."""

    positional: ClassVar = ("weights",)
    aliases: ClassVar = {"model": "weights"}  # Hydra would take model=... for a folder of configs

    weights: str | None
    format: Literal["openvino", "onnx"]
    size: tuple[Side, Side] | None
    buckets: tuple[int | float, ...]
    precision: Literal["float32", "int8"]
    calibrate: str | None
    output: str | None


def run(config: Options) -> None:
    """Load a network, write its folder."""
    if config.weights is not None and is_engine(Path(config.weights)):
        raise UserError(f"weights={config.weights} is an engine; export the network that it was made of")
    if (config.precision == "int8") != (config.calibrate is not None):
        raise UserError("int8 is calibrated on a video: give both precision=int8 and calibrate=my.mp4, or neither")
    network: Network
    if config.weights is not None and actions.recognises(None, config.weights):
        network = load_recogniser(config.weights)
    else:
        network = load_detector(config.weights)
    folder = Path(config.output or f"outputs/engine_{config.format}")
    with contextlib.ExitStack() as stack:
        images = None
        if config.calibrate is not None:
            source = stack.enter_context(open_source(config.calibrate))
            if source.live:
                raise UserError(f"calibrate={config.calibrate} has no end; give a recorded video")
            images = (frame.image for frame in source)
        export_engine(network, folder, format=config.format, size=config.size, buckets=config.buckets, calibrate=images)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    height, width = read_manifest(folder).size
    say(f"{folder}: {config.format}, {height} x {width} pixels, {megabytes:.0f} MB; use it as weights={folder}")


if __name__ == "__main__":
    from command_line import start

    start("export")
