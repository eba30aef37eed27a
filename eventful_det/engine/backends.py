"""What runs graphs: OpenVINO, ONNX Runtime, or PyTorch itself, as it is or compiled.

OpenVINO is given the shapes beforehand: each graph is compiled once for each of them, at its first run.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError

if TYPE_CHECKING:
    import openvino

Format = Literal["openvino", "onnx"]
Precision = Literal["float32", "bfloat16"]
_GAIN = 1.2  # bfloat16 must be so much quicker, or it is not worth its rounding
_LOG = logging.getLogger(__name__)
SUFFIX: dict[Format, str] = {"openvino": ".xml", "onnx": ".onnx"}
Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Graph:
    """A part to compile.

    Attributes:
        name: of its file.
        module: that computes it.
        example: inputs.
        free: for each input the dimensions that depend on the number of windows or regions.
    """

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    free: tuple[tuple[int, ...], ...]


REMEMBERED = ("backbone", "pyramid")
"""Graphs whose outputs a stream keeps, in the type of its engine; those of others are float32."""


class Backend(ABC):
    """Runs the graphs of a detector on the CPU.

    Attributes:
        name: of the engine.
        precision: in which it computes.
        suffix: of the files that it reads.
        dtype: in which it remembers keys, values and maps. It takes these inputs and gives them; others are float32.
    """

    name: str
    suffix: str
    dtype = torch.float32
    _folder: Path  # that graphs are read from

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._folder, self.precision, self.threads)  # a copy compiles them anew

    def __init__(self, precision: Precision, threads: int | None) -> None:
        self.precision, self.threads = precision, threads or torch.get_num_threads()
        self._runs: dict[tuple[object, ...], Run] = {}

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Run a graph. Outputs are valid until its next run.

        Raises:
            UserError: it cannot be compiled here.
        """
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._runs:
            try:
                self._runs[key] = self._compile(name, inputs)
            except Exception as error:  # of the engine's own kinds
                problem = [type(error).__name__, *str(error).strip().splitlines()][-1]
                raise UserError(f"{self.name} cannot compile {name}: {problem}; export the engine again") from error
        return self._runs[key](inputs)

    def around(self) -> contextlib.AbstractContextManager[None]:
        """To be open while a step runs: PyTorch has one thread for what is between the graphs, which have theirs."""
        return _one_thread()

    @abstractmethod
    def _compile(self, name: str, inputs: Sequence[Tensor]) -> Run:
        """What runs a graph on inputs of these shapes."""


class OnCPU:
    """A network in an engine."""

    device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """This network, if the device is the CPU.

        Raises:
            UserError: it is another, or a type of numbers.
        """
        if str(device).partition(":")[0] != "cpu":
            raise UserError(f"a compiled engine runs on CPUs, in the precision it was loaded with; no .to({device})")
        return self


class OpenVINO(Backend):
    """OpenVINO's CPU plugin."""

    name, suffix = "openvino", SUFFIX["openvino"]

    def __init__(self, folder: Path, precision: Precision = "float32", threads: int | None = None) -> None:
        super().__init__(precision, threads)
        self.dtype = getattr(torch, precision)
        self._ov, self._folder = import_package("openvino"), folder
        self._core = openvino_core()
        self._models: dict[str, Any] = {}

    def _compile(self, name: str, inputs: Sequence[Tensor]) -> Run:
        if name not in self._models:
            self._models[name] = self._core.read_model(self._folder / f"{name}{self.suffix}")
        model = self._models[name].clone()
        model.reshape({i: list(tensor.shape) for i, tensor in enumerate(inputs)})
        if self.dtype == torch.bfloat16:
            self._set_types(model, inputs, name in REMEMBERED)
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
        }
        request = self._core.compile_model(model, "CPU", hints).create_infer_request()
        outputs = range(len(model.outputs))

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            given = [tensor.contiguous() for tensor in tensors]
            for i, tensor in enumerate(given):  # by `infer` itself it would take half a millisecond
                request.set_input_tensor(i, self._shared(tensor))
            request.infer({}, share_inputs=True, share_outputs=True)
            return [_read(request.get_output_tensor(i)) for i in outputs]

        return run

    def _set_types(self, model: Any, inputs: Sequence[Tensor], remembered: bool) -> None:
        """bfloat16 where tensors are, and of outputs that are remembered."""
        steps, low = self._ov.preprocess.PrePostProcessor(model), self._ov.Type.bf16
        for i, tensor in enumerate(inputs):
            if tensor.dtype == torch.bfloat16:
                steps.input(i).tensor().set_element_type(low)
        for i, output in enumerate(model.outputs):
            if remembered and output.get_element_type().is_real():
                steps.output(i).tensor().set_element_type(low)
        steps.build()

    def _shared(self, tensor: Tensor) -> Any:
        """The same memory as OpenVINO's."""
        if tensor.dtype != torch.bfloat16:
            return self._ov.Tensor(tensor.numpy(), shared_memory=True)
        return self._ov.Tensor(tensor.view(torch.int16).numpy(), self._ov.Shape(list(tensor.shape)), self._ov.Type.bf16)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For small operations: OpenMP's second thread waits for each in a loop, which keeps a core from all others.

    Where another program needed that core, too, frames took up to ten times as long.
    """
    threads = torch.get_num_threads()
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(threads)


def _set_threads(count: int) -> None:
    """Of PyTorch, for this thread of Python; `torch.set_num_threads` would speak to all that begin meanwhile, too."""
    with contextlib.suppress(AttributeError, TypeError):  # where PyTorch has another OpenMP, all stays as it is
        ctypes.CDLL(None).omp_set_num_threads(count)


def _read(result: Any) -> Tensor:
    """A tensor of OpenVINO's in the same memory; NumPy has no bfloat16."""
    tensor = torch.from_numpy(result.data)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor


class ONNXRuntime(Backend):
    """ONNX Runtime's CPU provider, in float32."""

    name, suffix = "onnxruntime", SUFFIX["onnx"]

    def __init__(self, folder: Path, precision: Precision = "float32", threads: int | None = None) -> None:
        if precision != "float32":
            raise UserError(f"ONNX Runtime computes in float32 on CPUs, not in {precision}; export format=openvino")
        super().__init__(precision, threads)
        self._ort, self._folder = import_package("onnxruntime"), folder
        self._sessions: dict[str, Any] = {}

    def _compile(self, name: str, inputs: Sequence[Tensor]) -> Run:
        if name not in self._sessions:
            options = self._ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
            options.log_severity_level = 3
            path, providers = self._folder / f"{name}{self.suffix}", ["CPUExecutionProvider"]
            self._sessions[name] = self._ort.InferenceSession(str(path), options, providers=providers)
        session = self._sessions[name]
        names = [entry.name for entry in session.get_inputs()]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            feeds = {key: tensor.contiguous().numpy() for key, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(result) for result in session.run(None, feeds)]

        return run


class Torch(Backend):
    """PyTorch, as it is or by `torch.compile`."""

    name = "torch"

    def __init__(
        self,
        graphs: Iterable[Graph],
        precision: Precision = "float32",
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(precision, threads)
        modules = {graph.name: graph.module for graph in graphs}
        self._modules = {
            key: torch.compile(module, dynamic=False) if compiled else module for key, module in modules.items()
        }
        self.name = "compile" if compiled else "torch"

    def around(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: the graphs are PyTorch's."""
        return contextlib.nullcontext()

    def _compile(self, name: str, inputs: Sequence[Tensor]) -> Run:
        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            low = torch.autocast("cpu", torch.bfloat16) if self.precision == "bfloat16" else contextlib.nullcontext()
            with torch.no_grad(), low:
                results = self._modules[name](*tensors)
            results = results if isinstance(results, tuple) else (results,)
            return [result.float() if result.is_floating_point() else result for result in results]

        return run


def import_package(module: str) -> ModuleType:
    """A module that is needed only here.

    OpenVINO and NNCF send statistics of their use to Intel, from forks of this process. Nothing is sent from here: they
    do without the package that does it.

    Raises:
        UserError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(f"this engine needs {module}: python -m pip install {module}") from error


@cache
def openvino_core() -> openvino.Core:
    """One for all engines of a process, which is never freed.

    Its CPU plugin gives the main thread a stack for signals. Two that are freed in the order in which they were made
    leave that stack freed and in use: then the next signal that Python handles, as Ctrl-C, ends the process.
    """
    return import_package("openvino").Core()


@cache
def quickest_precision() -> Precision:
    """bfloat16 where this CPU multiplies quicker in it, which a short timing tells; else float32."""
    x, weight = torch.rand(512, 768), torch.rand(768, 768)
    seconds = {dtype: _seconds(x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    precision: Precision = "bfloat16" if ratio > _GAIN else "float32"
    _LOG.info("precision: %s; products in bfloat16 are %.1f times as quick as in float32", precision, ratio)
    return precision


def torch_dtype(precision: Precision | Literal["auto"]) -> torch.dtype:
    """The type of a network's weights."""
    dtype: torch.dtype = getattr(torch, quickest_precision() if precision == "auto" else precision)
    return dtype


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The least of a few."""
    times = []
    with torch.no_grad():
        for _ in range(8):
            began = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - began)
    return min(times)
