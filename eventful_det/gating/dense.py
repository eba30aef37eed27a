"""The rule that recomputes everything on every frame, by the network's own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eventful_det.gating.macs import dense_macs
from eventful_det.gating.selector import Select
from eventful_det.gating.spec import ViTSpec
from eventful_det.gating.state import StreamState, Update
from eventful_det.gating.windows import Grid


@dataclass(frozen=True)
class Dense:
    """No gating: nothing is selected, nothing remembered."""

    @property
    def layout(self) -> tuple[str, ...]:
        """What the form of the state depends on."""
        return ("dense",)

    def init_stream(self, vit: ViTSpec, grid: Grid) -> StreamState:
        """The state of a stream whose frames have `grid` tokens."""
        return StreamState(self.layout, grid)

    def step(
        self,
        vit: ViTSpec,
        frames: Sequence[Tensor],
        states: Sequence[StreamState],
        select: Select,
        saliency: Sequence[Tensor | None],
    ) -> list[Update]:
        """Process the next frame `(3, h, w)` of every stream."""
        updates = []
        for frame, state in zip(frames, states, strict=True):
            flush, state.frame = state.frame == 0, state.frame + 1
            tokens, prefix = self._run(vit, frame)
            index = torch.arange(state.grid[0] * state.grid[1], device=tokens.device)
            macs = dense_macs(vit.shape, state.grid, padded_linear=True)
            updates.append(Update(tokens, prefix, index, torch.ones(len(index), device=index.device), flush, macs))
        return updates

    def _run(self, vit: ViTSpec, frame: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens `(H, W, C)` and prefix tokens of a frame; an engine has a graph for them."""
        return vit.dense(frame)
