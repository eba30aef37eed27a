"""Rewrite weights in another precision, with notes and other defaults.

python tools/convert_weights.py input=runs/train/model.safetensors output=tiny.safetensors dtype=float16
python tools/convert_weights.py input=a.safetensors output=b.safetensors +model.short_side=320 +notes.licence=MIT
"""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from common import console, plain, tool, write_results
from omegaconf import DictConfig

from eventful_det.errors import UserError
from eventful_det.models.checkpoints import load_detector, read_notes, save_detector

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@hydra.main(version_base="1.3", config_path="../configs", config_name="convert_weights")
@tool
def main(config: DictConfig) -> None:
    """Read, check, and write a weights file."""
    if config.input is None or config.output is None:
        raise UserError("give input=WEIGHTS and output=FILE.safetensors")
    if config.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}")
    path = Path(config.output)
    notes = {key: value for key, value in read_notes(config.input).items() if key not in ("format", "config")}
    added = {key: str(value) for key, value in config.notes.items()}
    save_detector(load_detector(config.input, **plain(config.model)), path, DTYPES[config.dtype], {**notes, **added})
    megabytes = path.stat().st_size / 1e6
    console.print(f"{path}: {megabytes:.1f} MB, {config.dtype}")
    results = {"input": str(config.input), "output": str(path), "dtype": config.dtype, "megabytes": megabytes}
    write_results(Path(config.results), results)


if __name__ == "__main__":
    main()
