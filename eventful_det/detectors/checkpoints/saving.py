"""Detectors into files: safetensors that carry their config, and checkpoints for detectron2."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from eventful_det.detectors.checkpoints.key_maps import to_detectron2
from eventful_det.detectors.checkpoints.weight_files import FORMAT, HasState, metadata, rounded, save_tensors
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.errors import UserError
from eventful_det.files import written_whole


class SavedDetector(HasState, Protocol):
    """What is written of a `Detector`, which can save itself and so is not known here."""

    config: ModelConfig


def save_detector(
    detector: SavedDetector,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write weights, config and notes to one safetensors file, atomically.

    Args:
        detector: what to write.
        path: of the file.
        dtype: the weights are rounded to this type.
        notes: more metadata, for example the command that made the weights.
    """
    about = metadata(notes, format=FORMAT, config=detector.config.to_json())
    save_tensors(path, rounded(detector, dtype), about)


def save_detectron2(
    detector: SavedDetector,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write weights as detectron2's checkpointer reads them, atomically; it ignores the config and notes beside them.

    Args:
        detector: what to write.
        path: of the file; `.pkl` as in detectron2's model zoo, or `.pth`.
        dtype: the weights are rounded to this type.
        notes: more metadata.

    Raises:
        UserError: another suffix, or a type that NumPy does not have in a `.pkl`.
    """
    path = Path(path)
    if path.suffix not in (".pkl", ".pth"):
        raise UserError(f"{path}: detectron2 reads .pth and .pkl files; give one of these names")
    if path.suffix == ".pkl" and dtype == torch.bfloat16:
        raise UserError(f"{path}: a .pkl holds NumPy arrays, which cannot be bfloat16; use float32 or float16, or .pth")
    tensors = to_detectron2(rounded(detector, dtype))
    about = metadata(notes, config=detector.config.to_json())
    with written_whole(path) as part:
        if path.suffix == ".pth":
            torch.save({"model": tensors, "eventful_det": about}, part)
        else:
            arrays = {key: value.numpy() for key, value in tensors.items()}
            part.write_bytes(pickle.dumps({"model": arrays, "__author__": "eventful_det", "eventful_det": about}))
