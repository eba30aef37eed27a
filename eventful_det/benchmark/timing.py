"""Timing of things that take turns, and what one of them needs alone: memory, attention kernels, operations."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eventful_det.evaluation.efficiency import Spread, peak_memory, reset_peak_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """How long a call took, and what it returned."""

    seconds: float
    result: T


@dataclass(frozen=True)
class Timed(Generic[T]):
    """The calls of one of several callables that took turns.

    Attributes:
        first: the very first one, which allocates and fills whatever the others find.
        calls: those after the warm-up, one for each repetition.
    """

    first: Call[T]
    calls: list[Call[T]]


@dataclass(frozen=True)
class Operation:
    """All calls of one of torch's operators.

    Attributes:
        name: of the operator.
        calls: how many.
        seconds: time in the operator itself, without the operators that it called.
        share: of the time of all operators, 0 to 1.
    """

    name: str
    calls: int
    seconds: float
    share: float


def time_together(
    callables: Mapping[str, Callable[[int], T]],
    repetitions: int,
    warm_up: int = 2,
    device: torch.device | None = None,
    seed: int = 0,
    on_repetition: Callable[[], None] | None = None,
) -> dict[str, Timed[T]]:
    """Time callables in turns, so that whatever else the machine does hits all of them alike.

    In every repetition each callable is called once; the order is drawn anew each time.

    Args:
        callables: by name; called with the number of the repetition, from 0, warm-up included.
        repetitions: to keep.
        warm_up: repetitions before them; at least 1, because the first call is kept apart.
        device: a GPU is waited for before and after each call.
        seed: of the order.
        on_repetition: called between repetitions.
    """
    if repetitions < 1 or warm_up < 1:
        raise ValueError(f"repetitions and warm_up must be at least 1, got {repetitions} and {warm_up}")
    order, shuffle = list(callables), random.Random(seed).shuffle
    calls: dict[str, list[Call[T]]] = {name: [] for name in callables}
    for i in range(warm_up + repetitions):
        shuffle(order)
        for name in order:
            calls[name].append(_timed(callables[name], i, device))
        if on_repetition is not None:
            on_repetition()
    return {name: Timed(done[0], done[warm_up:]) for name, done in calls.items()}


def paired_ratios(reference: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times less `other` took than `reference`, by repetition; above 1 = faster, nan = did nothing."""
    return Spread.of([a / b if b else math.nan for a, b in zip(reference, other, strict=True)])


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` needs at its peak on top of what is held before it.

    On a GPU those of tensors. On the CPU those of the process, measurable on Linux only; freed memory that the
    allocator has kept is handed back first where that is possible, because its re-use would go unseen.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc has it, other C libraries do not
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory(device)
    before = peak_memory(device)
    run()
    _synchronise(device)
    return peak_memory(device) - before


def attention_kernels(run: Callable[[], object]) -> dict[str, int]:
    """Calls of torch's fused attention kernels by name; empty = attention is made of plain products."""
    with _AttentionCounter() as counter:
        run()
    return dict(counter.calls)


def profile_operations(run: Callable[[], object], device: torch.device) -> list[Operation]:
    """Torch's operators by the time they take themselves, slowest first; on a GPU the time there."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it prints when it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        _synchronise(device)
    entry = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(event.key, event.count, float(getattr(event, entry)) / 1e6) for event in profiler.key_averages()]
    total = sum(seconds for _, _, seconds in events) or 1.0
    operations = [Operation(name, calls, seconds, seconds / total) for name, calls, seconds in events]
    return sorted(operations, key=lambda operation: -operation.seconds)


class _AttentionCounter(TorchDispatchMode):
    """Counts the fused attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.calls[name.lstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def _timed(function: Callable[[int], T], i: int, device: torch.device | None) -> Call[T]:
    _synchronise(device)
    began = time.perf_counter()
    result = function(i)
    _synchronise(device)
    return Call(time.perf_counter() - began, result)


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
