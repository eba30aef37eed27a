"""What tests share."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

from eventful_det.detectors.vitdet.config import vitdet_tiny
from eventful_det.detectors.vitdet.detector import Detector

# A shell that starts a job in the background has it ignore Ctrl-C, and its children inherit that: tests that send one
# would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As `import_package` does, before any `importorskip("openvino")`: no statistics are sent from forks of a worker.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@pytest.fixture
def tiny_detector() -> Detector:
    """A detector small enough to run dozens of frames in a test: seeded random weights, evaluation mode, one thread."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = vitdet_tiny(
            ("circle", "square", "star"),
            dim=48,
            depth=4,
            heads=3,
            window=4,
            global_blocks=(1, 3),
            channels=16,
            box_fc=(64,),
            proposals=20,
            short_side=96,
            long_side=192,
        )
        return Detector(config).eval()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not tested for want of detectron2, whose modules skip before their tests are counted."""
    if importlib.util.find_spec("detectron2") is None:
        texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
        tests = sum(text.count("\ndef test_") for text in texts if "needs detectron2, which is not installed" in text)
        terminalreporter.write_line(f"detectron2 is not installed: {tests} test functions that need it were skipped")
