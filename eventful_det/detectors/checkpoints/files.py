"""Detectors in and out of files: ours, safetensors that carry their config, and those of detectron2 and its like."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from eventful_det.detectors.checkpoints.infer_config import infer_config
from eventful_det.detectors.checkpoints.key_maps import (
    NOT_BOXES,
    from_detectron2,
    from_official,
    is_official,
)
from eventful_det.detectors.checkpoints.weight_files import (
    FORMAT,
    compare,
    find_weights,
    load_exactly,
    matching,
    read_tensors,
    without,
)
from eventful_det.detectors.hub import local_source
from eventful_det.detectors.labels import LabelMap, read_labels, relabel
from eventful_det.detectors.rf_detr.loading import is_rf_detr, load_rf_detr
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import Name
from eventful_det.detectors.vitdet.config import ModelConfig
from eventful_det.detectors.vitdet.detector import Detector
from eventful_det.engine.backends import Precision, torch_dtype
from eventful_det.engine.folder import is_engine, load_engine
from eventful_det.engine.recogniser import CompiledRecogniser
from eventful_det.engine.rf_detr import CompiledRFDETR
from eventful_det.engine.vitdet.detector import CompiledViTDet
from eventful_det.errors import UserError

LAST_LAYER = "roi_heads.box_predictor.*"  # the only one that knows the classes
_RECOGNISER = "this is a recogniser of actions, no detector; open it with load_recogniser"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Attributes:
        format: whose names it uses.
        config: of the detector; where the file does not tell, inferred from the weights.
        tensors: under our names.
        notes: metadata.
        left_out: keys of the file that a detector of boxes has no use for.
    """

    format: Literal["eventful_det", "detectron2", "official"]
    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    left_out: tuple[str, ...] = ()


@overload
def load_detector(source: Name) -> EventfulRFDETR: ...  # type: ignore[overload-overlap]


@overload
def load_detector(
    source: str | os.PathLike[str] | None = None,
    labels: LabelMap | str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    *,
    precision: Precision | Literal["auto"] = "float32",
    **changes: object,
) -> Detector: ...


def load_detector(
    source: str | os.PathLike[str] | None = None,
    labels: LabelMap | str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    *,
    precision: Precision | Literal["auto"] = "float32",
    **changes: object,
) -> Detector | EventfulRFDETR | CompiledViTDet | CompiledRFDETR:
    """A detector ready for inference, on the CPU.

    Args:
        source: the name of shipped weights (the default ones if None); `owner/name` on the Hugging Face Hub, with
            `@revision` if need be; a folder written by `save_pretrained`; or a file: written by `save_detector`; a
            ViTDet of detectron2 (`.pkl` of its model zoo, `.pth`); or the official eventful code's conversion of one.
            The format is detected by content. Or the folder of a compiled engine, see `load_engine`, of which of the
            options below `precision` alone holds; or an RF-DETR, see `load_rf_detr`, which has `labels` besides.
        labels: names of classes to change, or None as a name to drop the class; a mapping, or a JSON file of one.
        allow: patterns such as "backbone.simfp_2.*" of keys that may be missing, unexpected or of another shape; what
            is not in the file keeps its initial values. All other keys have to fit.
        classes: to start training with. Where they are others than the file's, its last layer starts anew, which the
            log says; where the file has no names but as many classes, they are called so.
        precision: in which it computes; "auto" = bfloat16 where this CPU is quicker in it.
        changes: values of `ModelConfig` to change that do not affect the weights, for example `proposals=50`; other
            values too if `allow` says so.

    Raises:
        UserError: no such file or name; the file is of no known format, damaged, or asks for more than data; keys do
            not fit; or a value is none that the option can have.
    """
    source = None if source is None else local_source(source)
    if "device" in changes:
        engine = source is not None and is_engine(Path(source))
        advice = "an engine stays there" if engine else f"move it by .to({changes['device']!r})"
        raise UserError(f"load_detector: it is on the CPU; leave device out, {advice}")
    if source is not None and (is_engine(Path(source)) or is_rf_detr(source)):
        if allow or classes is not None or changes or (labels is not None and is_engine(Path(source))):
            raise UserError(f"{source}: labels, allow, classes and changes are for ViTDet in PyTorch alone")
        if is_engine(Path(source)):
            return _detector_in_engine(Path(source), precision)
        rf_detr = load_rf_detr(source)
        rf_detr.relabel(_labels(labels))
        return rf_detr.to(torch_dtype(precision))
    path = find_weights(source)
    weights = read_weights(path)
    known, tensors = weights.config.classes, weights.tensors
    if classes is not None and tuple(classes) != known:
        changes |= {"classes": tuple(classes), "dropped": ()}
        if "config" in weights.notes or len(classes) != len(known):
            tensors, allow = without(tensors, [LAST_LAYER]), [*allow, LAST_LAYER]
            _LOG.warning(
                "%s: the last layer starts anew, for %s in place of %s", path.name, _some(classes), _some(known)
            )
    config = ModelConfig.from_dict({**asdict(weights.config), **changes})
    if labels is not None:
        config = relabel(config, _labels(labels))
    with torch.device("meta"):  # takes no memory, however large a damaged config says that the detector is
        compare(Detector(config).state_dict(), tensors, str(path), allow)
    detector = Detector(config)
    load_exactly(detector, tensors, str(path), allow)
    return detector.to(torch_dtype(precision)).eval()


def _detector_in_engine(folder: Path, precision: Precision | Literal["auto"]) -> CompiledViTDet | CompiledRFDETR:
    """See `load_engine`; a recogniser is refused."""
    engine = load_engine(folder, precision=precision, warm_up=False)
    if isinstance(engine, CompiledRecogniser):
        raise UserError(f"{folder}: {_RECOGNISER}")
    engine.warm_up()
    return engine


def _labels(labels: LabelMap | str | os.PathLike[str] | None) -> LabelMap:
    return (labels or {}) if labels is None or isinstance(labels, Mapping) else read_labels(labels)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a weights file of any known format.

    Raises:
        UserError: the file is missing, damaged, of no known format, or asks for more than data.
    """
    contents = read_tensors(path)
    tensors, notes = contents.tensors, contents.notes or _notes(contents.others.get("eventful_det"))
    try:
        if notes.get("format") == FORMAT:
            return Weights("eventful_det", _config(notes), tensors, notes)
        if "spatial_model.class_token" in tensors:
            raise UserError(_RECOGNISER)
        official = is_official(tensors)
        tensors = from_official(tensors) if official else tensors
        if not any(key.startswith("backbone.net.") for key in tensors):
            raise UserError(f"no ViTDet of a known format, but {', '.join(list(tensors)[:3])}, ...")
        left_out = matching(tensors, NOT_BOXES)
        tensors = from_detectron2(without(tensors, NOT_BOXES))
        config = _config(notes) if "config" in notes else infer_config(tensors)
        return Weights("official" if official else "detectron2", config, tensors, notes, tuple(left_out))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is no whole detector: {error!r}") from None


def _notes(about: object) -> dict[str, str]:
    """What a file of another format says of a detector of ours."""
    return {str(key): text for key, text in about.items() if isinstance(text, str)} if isinstance(about, dict) else {}


def _config(notes: Mapping[str, str]) -> ModelConfig:
    try:
        values = json.loads(notes["config"])
    except (KeyError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError("its metadata holds no config of a detector; the file is damaged, get it again")
    return ModelConfig.from_dict(values)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
