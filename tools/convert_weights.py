"""Rewrite weights in another format or precision, with notes and other defaults.

    python tools/convert_weights.py input=model_final_61ccd1.pkl output=vitdet_b.safetensors      # from detectron2
    python tools/convert_weights.py input=runs/train/model.safetensors output=model.pth           # to detectron2
    python tools/convert_weights.py input=a.safetensors output=b.safetensors +model.short_side=320 +notes.licence=MIT

Reads what `load_detector` reads: ours, ViTDets of detectron2's model zoo or training, and the official eventful code's
conversions of them. Every key is accounted for. Recognisers, ours, official, TAdaConv's or scenic's, are found by
their contents; with the suffix .pth they get the official names, or `names=tadaconv`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import actions
import torch
from common import Texts, as_list, say, write_results

from eventful_det.detectors.checkpoints.files import load_detector, read_weights
from eventful_det.detectors.checkpoints.saving import save_detector, save_detectron2
from eventful_det.detectors.checkpoints.weight_files import find_weights
from eventful_det.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What may be asked of the converter; configs/convert_weights.yaml explains it."""

    positional: ClassVar = ("input", "output")

    input: str | None
    output: str | None
    dtype: Literal["float32", "float16", "bfloat16"] | None
    notes: dict[str, str]
    model: dict[str, Any]
    allow: Texts
    names: Literal["official", "tadaconv"]
    results: str


def run(config: Options) -> None:
    """Read, check, and write a weights file, then the results."""
    if config.input is None or config.output is None:
        raise UserError("give input=WEIGHTS and output=FILE, with the suffix .safetensors, .pth or .pkl")
    path = Path(config.output)
    ours = path.suffix == ".safetensors"
    dtype = config.dtype or ("float16" if ours else "float32")
    if actions.recognises(None, config.input):
        wanted = None if config.dtype is None else DTYPES[config.dtype]
        write_results(Path(config.results), actions.convert(config.input, path, wanted, config.notes, config.names))
        return
    source = find_weights(config.input)
    weights = read_weights(source)
    detector = load_detector(source, allow=as_list(config.allow), **config.model)
    save = save_detector if ours else save_detectron2
    save(detector, path, DTYPES[dtype], {**weights.notes, **config.notes})
    left_out = dict.fromkeys(key.rpartition(".")[0] or key for key in weights.left_out)
    if left_out:
        say(f"left out, for a detector of boxes: {', '.join(left_out)}")
    megabytes = path.stat().st_size / 1e6
    say(f"{path}: {megabytes:.1f} MB, {dtype}, from {weights.format} names")
    results = {
        "input": str(config.input),
        "format": weights.format,
        "output": str(path),
        "dtype": dtype,
        "megabytes": megabytes,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "left_out": list(weights.left_out),
    }
    write_results(Path(config.results), results)


if __name__ == "__main__":
    from command_line import start

    start("convert_weights")
