"""A compiled recogniser: its spatial model recomputes selected tokens, in numbers of a short list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eventful_det.engine.backends import Backend, Graph, OnCPU
from eventful_det.engine.detector import BucketCosts
from eventful_det.engine.rows import CompiledRows, RowsGraph, for_grid
from eventful_det.errors import UserError
from eventful_det.gating.dense import Dense
from eventful_det.gating.rules import DEFAULT_RULE, AnyRule, Rule, step_streams
from eventful_det.gating.selector import DEFAULT, RandomK, Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import State, StreamState, Update
from eventful_det.gating.windows import Grid
from eventful_det.recognition.config import RecogniserConfig
from eventful_det.recognition.recogniser import Recogniser


class CompiledRecogniser(OnCPU, Recogniser):  # type: ignore[misc]  # `to` of a module takes more
    """A recogniser whose spatial and temporal models are compiled graphs, for views of one size.

    Its own modules hold no weights: they tell sizes and costs. Gate and window are PyTorch's, in float32.

    Args:
        config: of the recogniser.
        buckets: numbers of tokens that are compiled, see `CompiledRows`.
        backend: runs the graphs.
    """

    def __init__(self, config: RecogniserConfig, buckets: tuple[float | int, ...], backend: Backend) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.backend = backend
        self.rows = CompiledRows(self.spec.shape, config.grid, buckets, backend, self.spec.pixel_std / 0.5)
        self.eval()

    def warm_up(self) -> None:
        """Compile what gated steps need, so that no step has to wait for it."""
        config, state = self.config, self.init_state()
        for count in self.rows.sizes:
            tubelet = torch.zeros(config.tubelet[0], config.channels, *config.size)
            self.step([tubelet], state, selector=RandomK(count))

    def spatial(self, views: Tensor) -> Tensor:
        """See `Recogniser.spatial`."""
        frames = self.tubelets(views)  # (B, T', c * tt, h, w)
        return torch.stack([torch.cat([self._dense(frame) for frame in view]) for view in frames])

    def temporal(self, outputs: Tensor) -> dict[str, Tensor]:
        """See `Recogniser.temporal`."""
        rows = [[logits.clone() for logits in self.backend.run("temporal", one[None])] for one in outputs]
        return {
            head: torch.cat(logits) for head, logits in zip(self.config.classes, zip(*rows, strict=True), strict=True)
        }

    def spatial_step(
        self,
        frames: Sequence[Tensor],
        state: State[StreamState],
        *,
        rule: AnyRule = DEFAULT_RULE,
        selector: Select = DEFAULT,
        flush: Sequence[bool] | bool = False,
    ) -> list[Update]:
        """See `Recogniser.spatial_step`.

        Raises:
            UserError: the rule is neither the default nor `Dense()`, or a view has another size.
        """
        if rule not in (DEFAULT_RULE, Dense()):
            raise UserError(f"this engine cannot follow {rule}; use {DEFAULT_RULE} or Dense()")
        for frame in frames:
            if frame.shape[-2:] != self.config.size:
                raise UserError(f"a view of {tuple(frame.shape[-2:])} pixels in an engine for {self.config.size}")
        own: Rule[Any] = _CompiledDense(self) if rule == Dense() else self.rows
        with self.backend.around():
            return step_streams(self.spec, frames, state, rule=own, selector=selector, flush=flush)

    def cost_model(self, rule: AnyRule) -> BucketCosts:  # type: ignore[override]
        """What steps will cost.

        Raises:
            UserError: under another rule than the engine's own.
        """
        if rule != DEFAULT_RULE:
            raise UserError("costs are known in advance under the engine's own rule only")
        window = sum(self.window_macs().values())
        return BucketCosts(self.rows.prices(lambda _: window), "heads", 0)

    def _dense(self, frame: Tensor) -> Tensor:
        """The dense spatial model on a frame `(c * tt, h, w)`, `(1, D)`."""
        (output,) = self.backend.run("dense", frame[None])
        return output.clone()


@dataclass(frozen=True)
class _CompiledDense(Dense):
    """`Dense`, by a graph."""

    recogniser: CompiledRecogniser

    def _run(self, vit: ViTSpec, frame: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = vit.grid(*frame.shape[-2:])
        return torch.zeros(*grid, 0), self.recogniser._dense(frame)  # of the tokens nothing is asked


class DenseGraph(nn.Module):
    """The dense spatial model on a tubelet `(1, c * tt, h, w)`, to its output `(1, D)`."""

    def __init__(self, recogniser: Recogniser, grid: Grid) -> None:
        super().__init__()
        self.recogniser, self.spec = recogniser, for_grid(recogniser.spec, grid)

    def forward(self, frame: Tensor) -> Tensor:
        _, prefix = self.spec.dense(frame[0])
        assert prefix is not None
        return prefix


class TemporalGraph(nn.Module):
    """The temporal model and the heads: spatial outputs `(1, T', D)` to logits `(1, classes)` of each head."""

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.recogniser.temporal(outputs).values())


def recogniser_graphs(recogniser: Recogniser) -> Iterator[Graph]:
    """The graphs of a recogniser for views of its own size, in evaluation mode."""
    config = recogniser.config
    _, height, width = config.tubelet
    if height != width:
        raise UserError(f"an engine needs square tubelets, not {height} x {width} pixels")
    spec, grid = recogniser.spec, config.grid
    frame = torch.zeros(1, spec.projection.in_channels, *config.size)
    yield Graph("dense", DenseGraph(recogniser, grid).eval(), (frame,), ((),))
    yield RowsGraph(recogniser, spec, grid, lambda rows: rows[: spec.prefix_count]).described()
    outputs = torch.zeros(1, config.steps, config.dim)
    yield Graph("temporal", TemporalGraph(recogniser).eval(), (outputs,), ((),))
