"""int8: linear layers and convolutions of exported graphs, calibrated on frames by NNCF (post-training)."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.video.transforms import Image
from eventful_det.detectors.protocol import VideoDetector
from eventful_det.engine.backends import SUFFIX, OpenVINO, import_package
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense

_FRAMES = 12  # at least, of longer videos; fewer than twice as many


class Recorder(OpenVINO):
    """OpenVINO in float32, which remembers what its graphs are run on."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        super().__init__(folder, "float32", threads)
        self.inputs: dict[str, list[list[NDArray[np.float32]]]] = {}

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Run a graph."""
        self.inputs.setdefault(name, []).append([tensor.numpy(force=True).copy() for tensor in inputs])
        return super().run(name, *inputs)


def quantise(detector: VideoDetector[Any], recorder: Recorder, folder: Path, frames: Sequence[Image]) -> None:
    """Replace the graphs of a folder by their like in int8.

    Args:
        detector: in the engine of the folder, run by `recorder`.
        recorder: see there.
        folder: with the graphs for OpenVINO.
        frames: `(h, w, 3)` uint8 RGB, which are run dense and gated.
    """
    nncf: Any = import_package("nncf")
    nncf.set_log_level(logging.ERROR)
    for rule in (None, Dense()):
        for _ in detector.stream(frames, rule=rule, scene_cuts=False, hold=1):
            pass
    core = import_package("openvino").Core()
    for name, inputs in recorder.inputs.items():
        path = folder / f"{name}{SUFFIX['openvino']}"
        data = nncf.Dataset([dict(enumerate(arrays)) for arrays in inputs])
        with contextlib.redirect_stdout(io.StringIO()):  # its progress
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
