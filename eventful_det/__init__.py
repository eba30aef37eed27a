"""eventful_det: video object detection that pays only for what changes.

The public surface is imported lazily, so that ``import eventful_det`` is quick and has no side effects::

    from eventful_det import load_detector

    for result in load_detector().stream("video.mp4", budget=0.25):
        print(result.frame_index, result.detections.boxes, result.cost.total)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "eventful_det.errors",
    "eventify": "eventful_det.gating.convert",
    "EventfulViT": "eventful_det.gating.convert",
    "Rows": "eventful_det.gating.rows",
    "Paper": "eventful_det.gating.paper",
    "TopK": "eventful_det.gating.policy",
    "TopFraction": "eventful_det.gating.policy",
    "Threshold": "eventful_det.gating.policy",
    "Focus": "eventful_det.gating.policy",
    "RandomK": "eventful_det.gating.policy",
    "Detector": "eventful_det.models.detector",
    "load_detector": "eventful_det.models.checkpoints",
    "Gmacs": "eventful_det.runtime.budget",
    "Latency": "eventful_det.runtime.budget",
    "Terms": "eventful_det.runtime.sharing",
    "StreamPool": "eventful_det.runtime.pool",
    "Rescorer": "eventful_det.runtime.rescoring",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'eventful_det' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
