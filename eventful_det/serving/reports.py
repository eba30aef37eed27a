"""What the streams do, in the forms that pages, programs and Prometheus read."""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eventful_det.adapters import to_record
from eventful_det.files import JsonObject
from eventful_det.gating.selector import Budget, Gmacs, Latency, Selector
from eventful_det.runtime.pool.metrics import StreamMetrics
from eventful_det.secrets import mask_secrets
from eventful_det.serving.runner import AUTO, PoolRunner
from eventful_det.serving.views import CostSample, LatestFrame


def state(runner: PoolRunner) -> JsonObject:
    """The budget, the streams and what they did so far, as JSON values."""
    metrics = runner.pool.metrics()
    with runner.lock:
        views = [(name, view.title, view.error, view.newest) for name, view in runner.views.items()]
    streams = []
    for name, title, error, newest in views:
        counts = metrics.streams.get(name, StreamMetrics(active=False))
        error = error or counts.error
        status = "failed" if error else _status(counts, newest is not None)
        age = newest.result.frame_age if newest else None
        numbers = {**dataclasses.asdict(counts), "frame_age": age}
        streams.append(
            {**numbers, "name": name, "title": title, "status": status, "error": error and mask_secrets(error)}
        )
    return {"budget": budget_text(runner.pool.budget), "max_streams": runner.max_streams, "streams": streams}


def _status(counts: StreamMetrics, seen: bool) -> str:
    """What a stream that has not failed is doing; `seen`: a frame of it can be seen."""
    if not counts.active:
        return "ended"
    return "lost" if counts.lost else "running" if seen else "starting"


def budget_text(budget: Budget | Selector) -> str:
    """A budget as `PoolRunner.set_budget` reads it."""
    if isinstance(budget, float):
        return f"{100 * budget:g}%"
    if isinstance(budget, int):
        return f"{budget} tokens"
    return str(budget) if isinstance(budget, (Gmacs, Latency)) else AUTO


def message(name: str, frame: LatestFrame, samples: Sequence[CostSample]) -> bytes:
    """A frame for the page: length of a JSON object (4 bytes, big endian), the object, a JPEG."""
    result = frame.result
    rows, cols = frame.work.shape
    share = (frame.work.cpu().numpy() * 255).round().astype(np.uint8)
    about = {
        "stream": name,
        "number": frame.number,
        "dropped": result.dropped,
        "frame_age": result.frame_age,
        **to_record(result),
        "flush": frame.flush,
        "work": {"rows": rows, "cols": cols, "share": base64.b64encode(share.tobytes()).decode()},
        "token_size": result.token_size,
        "marks": [_sample(sample) for sample in samples],
    }
    header = json.dumps(about, separators=(",", ":")).encode()
    return struct.pack(">I", len(header)) + header + frame.jpeg


def _sample(sample: CostSample) -> list[Any]:
    """Number, seconds on a clock of its own, GMACs by part, dense GMACs, milliseconds, recomputed tokens."""
    cost = sample.cost
    gmacs = [round(macs / 1e9, 4) for macs in cost.macs.values()]
    dense, latency = round(cost.dense_total / 1e9, 4), round(cost.latency * 1e3, 2)
    return [sample.number, round(sample.at, 3), gmacs, dense, latency, cost.recomputed]


def prometheus(runner: PoolRunner) -> str:
    """Metrics of every stream in Prometheus' text format (version 0.0.4)."""
    streams = state(runner)["streams"]
    text = metric("streams", "gauge", "Streams on the server.", {"": len(streams)})
    for name, kind, about, value in _METRICS:
        text += metric(name, kind, about, {f'{{stream="{one["name"]}"}}': f"{value(one):.12g}" for one in streams})
    return text


def metric(name: str, kind: str, about: str, values: Mapping[str, object]) -> str:
    """A metric in that format; its values by their labels, such as '{stream="gate"}'."""
    lines = [f"# HELP eventful_{name} {about}", f"# TYPE eventful_{name} {kind}"]
    return "\n".join([*lines, *(f"eventful_{name}{labels} {value}" for labels, value in values.items())]) + "\n"


_METRICS: tuple[tuple[str, str, str, Callable[[JsonObject], float]], ...] = (
    ("up", "gauge", "1 while the stream delivers frames.", lambda s: s["status"] == "running"),
    ("frames_total", "counter", "Frames detected in.", lambda s: s["frames"]),
    ("dropped_frames_total", "counter", "Frames skipped because newer ones had come.", lambda s: s["dropped"]),
    ("flushes_total", "counter", "Frames on which everything was recomputed.", lambda s: s["flushes"]),
    ("macs_total", "counter", "Multiply-adds of the whole detector.", lambda s: s["macs"]),
    ("dense_macs_total", "counter", "What the dense detector would have spent.", lambda s: s["dense_macs"]),
    ("frames_per_second", "gauge", "Of the last 100 frames.", lambda s: s["frames_per_second"]),
    ("frame_seconds", "gauge", "Seconds per frame, mean of the last 100.", lambda s: s["milliseconds"] / 1e3),
    ("frame_age_seconds", "gauge", "Age of the newest frame when it was done.", lambda s: s["frame_age"] or 0.0),
    ("frame_age_tail_seconds", "gauge", "95th percentile of the last 100 ages.", lambda s: s["age_p95"] or 0.0),
    ("state_bytes", "gauge", "Remembered between frames.", lambda s: s["state_bytes"]),
)
