"""tools/export.py: a folder that is a detector for every other tool, and its error lines."""

from __future__ import annotations

import sys
from pathlib import Path

import export
import pytest
import torch
from running import options_of

from eventful_det.data.source import VideoSource
from eventful_det.detectors.checkpoints.files import load_detector
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.engine.vitdet.detector import CompiledViTDet
from eventful_det.errors import UserError


def test_export(
    tiny_detector: Detector,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    save_detector(tiny_detector, tmp_path / "a.safetensors", torch.float32)
    folder = tmp_path / "engine"
    options = (f"model={tmp_path / 'a.safetensors'}", "size=[96,160]", "buckets=[0.25]", f"output={folder}")
    export.run(options_of("export", *options, "format=onnx"))
    written = sorted(folder.iterdir())
    (folder / "dense.xml").touch()  # of another format
    export.run(options_of("export", *options, "format=onnx"))
    assert sorted(folder.iterdir()) == written
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "openvino", None)
        with pytest.raises(UserError, match="pip install openvino"):
            export.run(options_of("export", *options))
    assert sorted(folder.iterdir()) == written, "an engine stays until the next is whole"
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        export.run(options_of("export", *options, "format=onnx"))
    assert f"{folder}: onnx, 96 x 160 pixels" in capsys.readouterr().out
    engine = load_detector(folder)
    assert isinstance(engine, CompiledViTDet) and engine.size == (96, 160) and engine.rule.buckets == (0.25,)
    with pytest.raises(UserError, match="float32 on CPUs"):
        load_detector(folder, precision="bfloat16")


def test_mistakes(tiny_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_detector(tiny_detector, tmp_path / "a.safetensors", torch.float32)
    model = f"model={tmp_path / 'a.safetensors'}"
    with pytest.raises(UserError, match="holds other files"):
        export.run(options_of("export", model, f"output={tmp_path}"))
    with pytest.raises(UserError, match="multiples of 32"):
        export.run(options_of("export", model, "size=[100,160]", f"output={tmp_path / 'b'}"))
    with pytest.raises(UserError, match="buckets"):
        export.run(options_of("export", model, "buckets=[1.5]", f"output={tmp_path / 'b'}"))
    monkeypatch.setattr(VideoSource, "live", True)
    with pytest.raises(UserError, match="no end"):
        export.run(options_of("export", model, "precision=int8", "calibrate=synthetic:1", f"output={tmp_path / 'b'}"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        export.run(options_of("export", model, "size=[96,160]", f"output={tmp_path / 'b'}"))
