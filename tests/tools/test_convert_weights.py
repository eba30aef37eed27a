"""tools/convert_weights.py: between formats, and its error lines."""

from __future__ import annotations

import json
from pathlib import Path

import convert_weights
import pytest
import torch
from running import options_of, run
from safetensors.torch import load_file

from eventful_det.detectors.checkpoints.files import load_detector, read_weights
from eventful_det.detectors.checkpoints.saving import save_detector
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.errors import UserError


def convert(tmp_path: Path, *options: str) -> dict[str, object]:
    """Run the tool in this process; returns its results."""
    convert_weights.run(options_of("convert_weights", *options, f"results={tmp_path / 'results'}"))
    return json.loads((tmp_path / "results/results.json").read_text())


def test_to_detectron2_and_back(tiny_detector: Detector, tmp_path: Path) -> None:
    save_detector(tiny_detector, tmp_path / "a.safetensors", torch.float32, {"training": "none"})
    done = run(
        "tools/convert_weights.py",
        f"input={tmp_path / 'a.safetensors'}",
        f"output={tmp_path / 'b.pth'}",
        f"results={tmp_path}",
    )
    assert "float32, from eventful_det names" in done.stdout
    results = convert(tmp_path, f"input={tmp_path / 'b.pth'}", f"output={tmp_path / 'c.safetensors'}", "dtype=float32")
    assert results["format"] == "detectron2" and results["left_out"] == []
    first, last = (load_file(tmp_path / f"{name}.safetensors") for name in "ac")
    assert first.keys() == last.keys() and all(torch.equal(value, last[key]) for key, value in first.items())
    assert read_weights(tmp_path / "c.safetensors").notes == read_weights(tmp_path / "a.safetensors").notes


def test_what_is_left_out_is_told(tiny_detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(tmp_path, "input=vitdet_tiny_synthetic", f"output={tmp_path / 'a.pth'}")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["model"] |= {"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(1), "pixel_mean": torch.zeros(3)}
    torch.save(content, tmp_path / "b.pth")
    options = (f"output={tmp_path / 'b.safetensors'}", "+model.short_side=320", "+notes.licence=MIT")
    results = convert(tmp_path, f"input={tmp_path / 'b.pth'}", *options)
    assert results["left_out"] == ["roi_heads.mask_head.mask_fcn1.weight", "pixel_mean"]
    assert "left out, for a detector of boxes: roi_heads.mask_head.mask_fcn1, pixel_mean" in capsys.readouterr().out
    assert load_detector(tmp_path / "b.safetensors").config.short_side == 320
    assert read_weights(tmp_path / "b.safetensors").notes["licence"] == "MIT"
    assert results["megabytes"] == pytest.approx((tmp_path / "b.safetensors").stat().st_size / 1e6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["input=vitdet_tiny_vid"], "give input=WEIGHTS and output=FILE"),
        (["input=vitdet_tiny_vid", "output={tmp}/a.bin"], "give one of these names"),
        (["input=vitdet_tiny_vid", "output={tmp}/a.pth", "dtype=int8"], "dtype must be 'float32' or"),
        (["input=nowhere.pkl", "output={tmp}/a.pth"], "no weights 'nowhere.pkl'"),
    ],
)
def test_errors(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        convert(tmp_path, *(text.replace("{tmp}", str(tmp_path)) for text in options))
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    done = run("tools/convert_weights.py", f"input={tmp_path / 'a.pkl'}", f"output={tmp_path / 'b.pth'}", check=False)
    assert done.returncode == 2 and "is refused: it asks for os.system" in done.stderr
    assert len(done.stderr.splitlines()) == 1
