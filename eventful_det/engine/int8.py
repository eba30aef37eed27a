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


def quantise(detector: VideoDetector[Any], recorder: Recorder, folder: Path, images: Iterable[Image]) -> None:
    """Replace the graphs of a folder by their like in int8.

    Args:
        detector: in the engine of the folder, run by `recorder`.
        recorder: see there.
        folder: with the graphs for OpenVINO.
        images: `(h, w, 3)` uint8 RGB: a video, of which some frames are taken, dense and gated.

    Raises:
        UserError: there is no image, or NNCF is not installed.
    """
    nncf: Any = import_package("nncf")
    nncf.set_log_level(logging.ERROR)
    frames = spread(images, _FRAMES)
    if not frames:
        raise UserError("calibrate: the video has no frame; give another")
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
        weights = path.with_suffix(".bin")
        import_package("openvino").save_model(graph, path.with_suffix(".new.xml"), compress_to_fp16=False)
        path.with_suffix(".new.bin").replace(weights)  # not over those that are being read
        path.with_suffix(".new.xml").replace(path)


def spread(images: Iterable[Image], least: int) -> Sequence[Image]:
    """At least so many images where there are, evenly spread, and fewer than twice as many."""
    kept: list[Image] = []
    stride = 1
    for i, image in enumerate(images):
        if i % stride == 0:
            kept.append(image)
        if len(kept) == 2 * least:
            kept, stride = kept[::2], 2 * stride
    return kept
