"""The `Windows` rule with its network as CUDA graphs: one launch in place of some hundreds.

All shapes follow from the number of windows, and nothing in `run_windows` waits for the device, so that it can be
recorded once for each number on the list and replayed on every frame after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.whole_windows.network import WindowTables, run_windows
from eventful_det.gating.whole_windows.rule import Windows
from eventful_det.gating.windows import Grid

_DEVICES = ("cuda",)
_WARM_UP = 3  # runs before the recording, in which libraries choose their kernels
_LOG = logging.getLogger(__name__)
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Captured:
    """A function of tensors as a CUDA graph, for inputs of the shapes given.

    Args:
        run: must not wait for the device.
        inputs: an example.
    """

    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with torch.cuda.device(inputs[0].device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    run(self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside):
                self.outputs = run(self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results for other inputs, valid until the next call."""
        for own, tensor in zip(self.inputs, inputs, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        return self.outputs


@dataclass(frozen=True)
class CapturedWindows(Windows):
    """`Windows` with a CUDA graph for each number of windows; as it is on CPUs and where recording fails.

    Caches are copied into a graph's own memory, so one graph serves all streams.

    Attributes:
        graphs: what was recorded, by weights (of the patch embedding and the linear layers), grid and shapes; of other
            weights than the last nothing is kept. It belongs to this value and to its copies.
    """

    graphs: dict[tuple[object, ...], tuple[ViTSpec, WindowTables, Run]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def run(self, vit: ViTSpec, tables: WindowTables, grid: Grid, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Windows.run`."""
        if inputs[0].device.type not in _DEVICES or torch.is_grad_enabled():
            return super().run(vit, tables, grid, inputs)
        layers = [layer for block in vit.blocks for part in block.layers for layer in part]
        own = [vit.projection.weight, *(layer.weight for layer in layers)]
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in own)
        key = (weights, grid, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if any(known[0] != weights for known in self.graphs):
            self.graphs.clear()
        if key not in self.graphs:  # weights and tables are kept, for the graph reads them where they are
            self.graphs[key] = vit, tables, self._captured(vit, tables, grid, inputs)
        return self.graphs[key][-1](inputs)

    @torch.inference_mode(False)  # whose tensors could not be written to outside of it
    @torch.no_grad()
    def _captured(self, vit: ViTSpec, tables: WindowTables, grid: Grid, inputs: Sequence[Tensor]) -> Run:
        def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return run_windows(vit, tables, grid, tensors[0], tensors[1], tensors[2:])

        try:
            return Captured(run, inputs)
        except RuntimeError as error:
            _LOG.warning("no CUDA graph of %d windows (%s): they run as they are", len(inputs[1]), error)
            return run
