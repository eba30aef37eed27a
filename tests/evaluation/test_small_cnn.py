"""A small CNN beside the methods of a sweep: its multiply-adds, and its boxes between the frames it runs on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from teachers import yolox_teacher

from eventful_det.data.coco_video import Annotation, CocoVideo, Frame, Video
from eventful_det.errors import UserError
from eventful_det.evaluation.small_cnn import SmallCNN, onnx_macs
from eventful_det.evaluation.sweep import run_methods
from eventful_det.evaluation.sweep.runs import Method
from eventful_det.evaluation.sweep.summary import row_of


@pytest.fixture
def data(tmp_path: Path) -> CocoVideo:
    """A still person, blue on noise, that fills one cell of the teacher."""
    image = np.random.default_rng(0).integers(0, 60, (64, 64, 3), np.uint8)
    image[24:32, 40:48] = (0, 0, 255)
    frames = []
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image[..., ::-1])
        frames.append(Frame(i + 1, f"{i}.png", 64, 64, i, [Annotation(1, (40.0, 24.0, 48.0, 32.0), track_id=0)]))
    data = CocoVideo([(1, "person")], [Video(1, "one", frames)], tmp_path)
    data.renumber()
    return data


def test_boxes_are_found_and_move_between(data: CocoVideo, tmp_path: Path) -> None:
    teacher = yolox_teacher(tmp_path / "t.onnx")
    methods = [Method("t", hold, hold=hold) for hold in (1, 3)]
    each, third = map(row_of, run_methods(SmallCNN(teacher, ("person",)), data, methods))
    assert each.ap50 == third.ap50 == 1
    assert each.gmacs_total == pytest.approx(64 * 64 / 1e9) and each.relative_total == 1
    assert third.relative_total == pytest.approx(1 / 3) and third.frames == 6
    assert third.method == "t 3" and third.ms_mean > 0
    with pytest.raises(UserError, match="knows none of the classes"):
        SmallCNN(teacher, ("ring",))


def test_macs_of_an_onnx_model(tmp_path: Path) -> None:
    """A strided grouped convolution, a product of matrices and a layer with its weight transposed."""
    rng = np.random.default_rng(0)
    weights = {"conv": (6, 2, 3, 3), "wide": (6, 5), "last": (7, 5), "bias": (7,)}
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "wide"], ["d"]),
        helper.make_node("Gemm", ["d", "last", "bias"], ["y"], transB=1),
    ]
    tensors = [numpy_helper.from_array(rng.random(shape, np.float32), name) for name, shape in weights.items()]

    def saved(size: int | str) -> Path:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, size, size])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "model", [x], [y], tensors)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / f"{size}.onnx")
        return tmp_path / f"{size}.onnx"

    assert onnx_macs(saved(8)) == 6 * 4 * 4 * (2 * 3 * 3) + 5 * 6 + 7 * 5
    with pytest.raises(UserError, match="not known"):
        onnx_macs(saved("n"))
