"""Tiny ONNX detectors: bright blue 8x8 cells of a 64x64 input are objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, CELLS = 64, 64 + 16 + 4  # of YOLOX's three grids


def _save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: dict[str, int]) -> Path:
    x = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "teacher", [x], values, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def yolox_teacher(path: Path, classes: int = 2) -> Path:
    """YOLOX's layout; objectness is the mean of the first channel in a cell of stride 8, the class always the first."""
    probability = np.zeros((1, CELLS, classes), np.float32)
    probability[..., 0] = 1
    constants = {
        "first": np.array([0]), "grid": np.array([1, 64, 1]), "grey": np.float32([255]),
        "none": np.zeros((1, CELLS - 64, 1), np.float32), "classes": probability,
        "average": np.full((1, 1, 8, 8), 1 / 64, np.float32),
        "boxes": np.tile(np.float32([0.5, 0.5, 0, 0]), (1, CELLS, 1)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["images", "first"], ["blue"], axis=1),
        helper.make_node("Conv", ["blue", "average"], ["mean"], strides=[8, 8]),
        helper.make_node("Reshape", ["mean", "grid"], ["cells"]),
        helper.make_node("Div", ["cells", "grey"], ["sure"]),
        helper.make_node("Concat", ["sure", "none"], ["objectness"], axis=1),
        helper.make_node("Concat", ["boxes", "objectness", "classes"], ["output"], axis=2),
    ]
    return _save(path, nodes, constants, {"output": TensorProto.FLOAT})


def generic_teacher(path: Path) -> Path:
    """Boxes, scores and labels: two boxes, as sure as the picture is bright, the second half as sure."""
    constants = {
        "shares": np.float32([[1, 0.5]]) / 255, "axes": np.array([1, 2, 3]),
        "boxes": np.float32([[[0, 0, 32, 32], [32, 32, 64, 64]]]), "labels": np.array([[1, 0]]),
    }  # fmt: skip
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "shares"], ["scores"]),
        helper.make_node("Identity", ["boxes"], ["found"]),
        helper.make_node("Identity", ["labels"], ["kinds"]),
    ]
    del constants["axes"]
    kinds = {"found": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "kinds": TensorProto.INT64}
    return _save(path, nodes, constants, kinds)
