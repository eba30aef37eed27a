"""A small CNN of others, as an ONNX file: what a user could run instead of a gated ViT."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from eventful_det.data.classes import COCO_NAMES, COCO_TO_VID
from eventful_det.data.labelling.teacher import Teacher
from eventful_det.detectors.protocol import DEFAULT_RULE, AnyRule, CostModel, InputTransform
from eventful_det.detectors.results import Detections, FrameCost, StepResult
from eventful_det.errors import UserError
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, StreamState

_NMS = 0.55  # overlap from which two answers are one object


class SmallCNN:
    """A COCO-trained ONNX detector as a `VideoDetector` that recomputes every frame and remembers nothing.

    Args:
        path: of the model, see `Teacher`.
        names: classes to look for.
        threads: of ONNX Runtime.

    Raises:
        UserError: it knows none of the classes, or its file cannot be used.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str], threads: int = 1) -> None:
        self.names, self._cnn = tuple(names), Teacher(path, threads=threads)
        ours = [COCO_TO_VID.get(name, name) for name in COCO_NAMES]
        self._labels = np.array([names.index(name) if name in names else -1 for name in ours], np.int64)
        if (self._labels < 0).all():
            raise UserError(f"{path} knows none of the classes of the weights")
        side = max(self._cnn.size)
        self.input_transform = InputTransform(min(self._cnn.size), side, token=side)  # one token
        self._macs = {"backbone": onnx_macs(path)}

    def init_state(self, batch: int = 1) -> State[StreamState]:
        """Nothing for `batch` streams."""
        return State([None] * batch)

    def step(
        self,
        frames: Sequence[Tensor],
        state: State[StreamState],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
        timing: bool = False,
    ) -> list[StepResult]:
        """Detect in frames; see `VideoDetector.step`."""
        return [self._detect(frame) for frame in frames]

    def cost_model(self, rule: AnyRule) -> CostModel:
        """Every frame costs the same.

        Raises:
            UserError: always.
        """
        raise UserError("a CNN has no budget: all its frames cost the same")

    def _detect(self, frame: Tensor) -> StepResult:
        began = time.perf_counter()
        answers = self._cnn((255 * frame).round().byte().permute(1, 2, 0).numpy())
        answers.labels = self._labels[answers.labels]
        answers = answers.where(answers.labels >= 0)
        values: list[Tensor] = [torch.from_numpy(v) for v in (answers.boxes, answers.scores, answers.labels)]
        kept = batched_nms(values[0], values[1].float(), values[2], _NMS)
        found = Detections(values[0][kept], values[1][kept].float(), values[2][kept])
        seconds = {"backbone": time.perf_counter() - began}
        return StepResult(found, FrameCost(self._macs, self._macs, 1, 1, False, seconds), torch.ones(1, 1))


def onnx_macs(path: str | os.PathLike[str]) -> int:
    """Multiply-adds of the convolutions and matrix products of an ONNX model whose input has a fixed size.

    Raises:
        UserError: the package onnx is missing, or a size is not known.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("counting the MACs of an ONNX model needs the package onnx: pip install onnx") from None
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    } | {weight.name: list(weight.dims) for weight in graph.initializer}
    products = {"Conv": slice(1, None), "MatMul": slice(-2, -1), "Gemm": slice(0, 1)}  # what a weight's sums run over
    total = 0
    for node in graph.node:
        if node.op_type in products:
            transposed = any(fact.name == "transB" and fact.i for fact in node.attribute)
            summed = slice(1, 2) if transposed else products[node.op_type]
            result, weight = (shapes.get(name, []) for name in (node.output[0], node.input[1]))
            if not (result and weight and all(result) and all(weight)):  # 0 = unknown
                raise UserError(f"{path}: the size of {node.output[0]} is not known; export it with a fixed size")
            total += math.prod(result) * math.prod(weight[summed])
    return total
