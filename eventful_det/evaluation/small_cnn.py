"""A small CNN of others, as an ONNX file: what a user could run instead of a gated ViT."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from eventful_det.data.classes import COCO_NAMES, COCO_TO_VID
from eventful_det.data.coco_video import CocoVideo, Video
from eventful_det.data.frame_reader import FrameReader
from eventful_det.data.labelling.teacher import Teacher
from eventful_det.data.video.transforms import Image
from eventful_det.detectors.results import Detections, FrameCost
from eventful_det.errors import UserError
from eventful_det.evaluation.detection import Entry, category_ids, coco_results
from eventful_det.evaluation.efficiency import peak_memory, reset_peak_memory
from eventful_det.evaluation.sweep.runs import Method, MethodRun, VideoRun
from eventful_det.runtime.motion import BoxMover

_NMS = 0.55  # overlap from which two answers are one object

Look = Callable[[Image], tuple[Detections, float]]
"""Detects in the next frame that it is given, and tells how many seconds that took."""


def cnn_look(cnn: Teacher, names: Sequence[str]) -> Look:
    """A COCO-trained ONNX detector, its classes those of `names` that it knows.

    Raises:
        UserError: it knows none of them.
    """
    ours = [COCO_TO_VID.get(name, name) for name in COCO_NAMES]
    labels = np.array([names.index(name) if name in names else -1 for name in ours], np.int64)
    if (labels < 0).all():
        raise UserError(f"{cnn.path} knows none of the classes of the weights")

    def look(image: Image) -> tuple[Detections, float]:
        began = time.perf_counter()
        answers = cnn(image)
        answers.labels = labels[answers.labels]
        answers = answers.where(answers.labels >= 0)
        values: list[Tensor] = [torch.from_numpy(v) for v in (answers.boxes, answers.scores, answers.labels)]
        kept = batched_nms(values[0], values[1].float(), values[2], _NMS)
        found = Detections(values[0][kept], values[1][kept].float(), values[2][kept])
        return found, time.perf_counter() - began

    return look


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


def run_cnn(cnn: Teacher, data: CocoVideo, names: Sequence[str], hold: int) -> MethodRun:
    """Run a CNN on every `hold`-th frame of whole videos, and move its boxes in between as our own are moved.

    Args:
        cnn: a COCO-trained detector.
        data: what to run on.
        names: classes to look for.
        hold: 1 = every frame, without tracks.

    Raises:
        UserError: it knows none of the classes, or a frame cannot be read.
    """
    categories, look = category_ids(data, names), cnn_look(cnn, names)
    macs = {"backbone": onnx_macs(cnn.path)}
    reset_peak_memory(torch.device("cpu"))

    def run(video: Video, reader: FrameReader) -> VideoRun:
        results: list[Entry] = []
        seconds: list[float] = []
        mover = BoxMover()
        for i, frame in enumerate(video.frames):
            image = reader.read(video, frame)
            began = time.perf_counter()
            if hold > 1:
                mover.move(image)
            if i % hold:
                found = mover.boxes()
            else:
                found = look(image)[0]
                found = mover.key(found) if hold > 1 else found
            seconds.append(time.perf_counter() - began)
            results += coco_results({frame.image_id: found}, categories)
        costs = [
            FrameCost(macs if i % hold == 0 else {"backbone": 0}, macs, int(i % hold == 0), 1, i == 0, {"backbone": s})
            for i, s in enumerate(seconds)
        ]
        return VideoRun(video, results, costs, seconds, 0, peak_memory(torch.device("cpu")))

    method = Method(cnn.path.stem, hold, hold=hold)
    with FrameReader(data) as reader:
        return MethodRun.of(method, data, [run(video, reader) for video in data.videos if video.frames])
