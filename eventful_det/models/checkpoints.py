"""Detectors in and out of files: ours, safetensors that carry their config, and those of detectron2 and its like."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eventful_det.detectors.rf_detr.loading import Name, is_rf_detr, load_rf_detr
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.errors import UserError
from eventful_det.models.config import ModelConfig
from eventful_det.models.detector import Detector
from eventful_det.models.key_maps import NOT_BOXES, from_detectron2, from_official, is_official, to_detectron2
from eventful_det.models.labels import LabelMap, read_labels, relabel
from eventful_det.models.recognise import config_of
from eventful_det.models.weight_files import load_exactly, matching, read_tensors

FORMAT = "eventful-det/1"
DEFAULT = "vitdet_tiny_vid"
SYNTHETIC = "vitdet_tiny_synthetic"


@dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Attributes:
        format: whose names it uses.
        config: of the detector; where the file does not tell, recognised from the weights.
        tensors: under our names.
        notes: metadata.
        left_out: keys of the file that a detector of boxes has no use for.
    """

    format: Literal["eventful_det", "detectron2", "official"]
    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    left_out: tuple[str, ...] = ()


def save_detector(
    detector: Detector,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write weights, config and notes to one safetensors file, atomically.

    Args:
        detector: what to write.
        path: of the file.
        dtype: the weights are rounded to this type.
        notes: more metadata, for example the command that made the weights.
    """
    part = _part(path)
    metadata = {"format": FORMAT, "config": detector.config.to_json(), **(notes or {})}
    save_file(_tensors(detector, dtype), part, metadata=metadata)
    _finish(part, path)


def save_detectron2(
    detector: Detector,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
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
    tensors = to_detectron2(_tensors(detector, dtype))
    about = {"config": detector.config.to_json(), **(notes or {})}
    part = _part(path)
    if path.suffix == ".pth":
        torch.save({"model": tensors, "eventful_det": about}, part)
    else:
        arrays = {key: value.numpy() for key, value in tensors.items()}
        part.write_bytes(pickle.dumps({"model": arrays, "__author__": "eventful_det", "eventful_det": about}))
    _finish(part, path)


@overload
def load_detector(source: Name) -> EventfulRFDETR: ...  # type: ignore[overload-overlap]


@overload
def load_detector(
    source: str | os.PathLike[str] | None = None,
    labels: LabelMap | str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    **changes: Any,
) -> Detector: ...


def load_detector(
    source: str | os.PathLike[str] | None = None,
    labels: LabelMap | str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    **changes: Any,
) -> Detector | EventfulRFDETR:
    """A detector ready for inference, on the CPU in float32.

    Args:
        source: the name of shipped weights (the default ones if None), or a file: written by `save_detector`; a
            ViTDet of detectron2 (`.pkl` of its model zoo, `.pth`); or the official eventful code's conversion of one.
            The format is detected. Or an RF-DETR, see `load_rf_detr`, which has none of the following options.
        labels: names of classes to change, or None as a name to drop the class; a mapping, or a JSON file of one.
        allow: patterns such as "roi_heads.box_predictor.*" of keys that may be missing, unexpected or of another
            shape; what is not in the file keeps its initial values. All other keys have to fit.
        changes: values of `ModelConfig` to change that do not affect the weights, for example `proposals=50`; other
            values too if `allow` says so.

    Raises:
        UserError: no such file or name; the file is of no known format, or asks for more than data; or keys do not fit.
    """
    if source is not None and is_rf_detr(source):
        if labels is not None or allow or changes:
            raise UserError(f"{source}: labels, allow and changes are for ViTDet; RF-DETR has none of them")
        return load_rf_detr(source)
    path = find_weights(source)
    weights = read_weights(path)
    config = ModelConfig.from_dict({**asdict(weights.config), **changes})
    if labels is not None:
        config = relabel(config, labels if isinstance(labels, Mapping) else read_labels(labels))
    detector = Detector(config)
    load_exactly(detector, weights.tensors, str(path), allow)
    return detector.eval()


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a weights file of any known format.

    Raises:
        UserError: the file is missing, truncated, of no known format, or asks for more than data.
    """
    if Path(path).suffix == ".safetensors":
        notes = read_notes(path)
        tensors = {key: value.float() for key, value in load_file(path).items()}
        return Weights("eventful_det", ModelConfig.from_dict(json.loads(notes["config"])), tensors, notes)
    named, others = read_tensors(path)
    official = is_official(named)
    named = from_official(named) if official else named
    if not any(key.startswith("backbone.net.") for key in named):
        raise UserError(f"{path} holds no ViTDet of a known format, but {', '.join(list(named)[:3])}, ...")
    left_out = matching(named, NOT_BOXES)
    tensors = {key: value.float() for key, value in named.items() if key not in left_out}
    about = others.get("eventful_det", {})
    try:
        tensors = from_detectron2(tensors)
        config = ModelConfig.from_dict(json.loads(about["config"])) if "config" in about else config_of(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no whole detector: {error!r}") from None
    return Weights("official" if official else "detectron2", config, tensors, dict(about), tuple(left_out))


def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file written by `save_detector`.

    Raises:
        UserError: the file is missing, truncated or another one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            notes = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"no weights file {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if notes.get("format") != FORMAT:
        raise UserError(f"{path} holds no eventful_det detector (format {notes.get('format')!r}, expected {FORMAT!r})")
    return notes


def find_weights(source: str | os.PathLike[str] | None = None) -> Path:
    """The file of a path, of the name of shipped weights, or of the shipped default.

    Raises:
        UserError: there is none.
    """
    path = Path(source := DEFAULT if source is None else source)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("eventful_det"))) / "weights"
    named = shipped / f"{source}.safetensors"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.safetensors"))) or "none"
    raise UserError(f"no weights {source!r}: neither a file nor one of the shipped names ({names})")


def _tensors(detector: Detector, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().cpu().to(dtype).contiguous() for key, value in detector.state_dict().items()}


def _part(path: str | os.PathLike[str]) -> Path:
    """Where a file is written until it is whole; its folder is made when needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")


def _finish(part: Path, path: str | os.PathLike[str]) -> None:
    part.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(part, path)
