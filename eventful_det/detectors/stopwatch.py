"""Seconds of the parts of a step, on request."""

from __future__ import annotations

import time
from typing import cast

import torch


class Stopwatch:
    """Seconds between laps, by name. A GPU is not waited for until they are asked for."""

    def __init__(self, device: torch.device, timing: bool) -> None:
        self._timing, self._cuda = timing, device.type == "cuda"
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []
        self.lap("")

    def lap(self, name: str) -> None:
        """End a lap of this name."""
        if not self._timing:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._laps.append((name, event))
        else:
            self._laps.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each lap; empty when nothing is measured."""
        if self._cuda and self._laps:
            torch.cuda.synchronize()
        pairs = zip(self._laps, self._laps[1:], strict=False)
        return {name: _seconds(before, after) for (_, before), (name, after) in pairs}


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        return cast(float, after) - cast(float, before)
    return before.elapsed_time(after) / 1e3
