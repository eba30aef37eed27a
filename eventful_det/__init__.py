"""eventful_det: video object detection that pays only for what changes.

The public surface is imported lazily, so that ``import eventful_det`` is quick and has no side effects::

    from eventful_det import load_detector

    for result in load_detector().stream("video.mp4", budget=0.25):
        print(result.frame_index, result.detections.boxes, result.cost.total)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventful_det.detectors.checkpoints.files import load_detector as load_detector
    from eventful_det.detectors.protocol import VideoDetector as VideoDetector
    from eventful_det.detectors.results import Detections as Detections
    from eventful_det.detectors.vitdet.detector import Detector as Detector
    from eventful_det.errors import UserError as UserError
    from eventful_det.gating.convert import EventfulViT as EventfulViT
    from eventful_det.gating.convert import eventify as eventify
    from eventful_det.gating.dense import Dense as Dense
    from eventful_det.gating.paper import Paper as Paper
    from eventful_det.gating.rows import Rows as Rows
    from eventful_det.gating.selector import DEFAULT as DEFAULT
    from eventful_det.gating.selector import Focus as Focus
    from eventful_det.gating.selector import Gmacs as Gmacs
    from eventful_det.gating.selector import LargestError as LargestError
    from eventful_det.gating.selector import Latency as Latency
    from eventful_det.gating.selector import RandomOrder as RandomOrder
    from eventful_det.gating.selector import Selector as Selector
    from eventful_det.gating.selector import Threshold as Threshold
    from eventful_det.gating.selector import TopFraction as TopFraction
    from eventful_det.gating.selector import TopK as TopK
    from eventful_det.gating.whole_windows.rule import Windows as Windows
    from eventful_det.recognition.checkpoints import load_recogniser as load_recogniser
    from eventful_det.recognition.recogniser import Recogniser as Recogniser
    from eventful_det.runtime.budget import BudgetOptions as BudgetOptions
    from eventful_det.runtime.motion.key_frames import KeyFrames as KeyFrames
    from eventful_det.runtime.pool import StreamPool as StreamPool
    from eventful_det.runtime.rescoring import Rescorer as Rescorer
    from eventful_det.runtime.session import StreamResult as StreamResult
    from eventful_det.runtime.stream import Stream as Stream

__version__ = "0.1.0"

_PUBLIC = {
    "VideoDetector": "eventful_det.detectors.protocol",
    "Detections": "eventful_det.detectors.results",
    "UserError": "eventful_det.errors",
    "EventfulViT": "eventful_det.gating.convert",
    "eventify": "eventful_det.gating.convert",
    "Dense": "eventful_det.gating.dense",
    "Paper": "eventful_det.gating.paper",
    "Rows": "eventful_det.gating.rows",
    "Focus": "eventful_det.gating.selector",
    "Gmacs": "eventful_det.gating.selector",
    "LargestError": "eventful_det.gating.selector",
    "Latency": "eventful_det.gating.selector",
    "RandomOrder": "eventful_det.gating.selector",
    "Selector": "eventful_det.gating.selector",
    "DEFAULT": "eventful_det.gating.selector",
    "KeyFrames": "eventful_det.runtime.motion.key_frames",
    "Threshold": "eventful_det.gating.selector",
    "TopFraction": "eventful_det.gating.selector",
    "TopK": "eventful_det.gating.selector",
    "Windows": "eventful_det.gating.whole_windows.rule",
    "load_detector": "eventful_det.detectors.checkpoints.files",
    "Detector": "eventful_det.detectors.vitdet.detector",
    "load_recogniser": "eventful_det.recognition.checkpoints",
    "Recogniser": "eventful_det.recognition.recogniser",
    "BudgetOptions": "eventful_det.runtime.budget",
    "StreamPool": "eventful_det.runtime.pool",
    "Rescorer": "eventful_det.runtime.rescoring",
    "StreamResult": "eventful_det.runtime.session",
    "Stream": "eventful_det.runtime.stream",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'eventful_det' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
