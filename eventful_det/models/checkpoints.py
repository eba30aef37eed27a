"""Weights in and out: safetensors files that carry their model's config, and ImageNet backbones to start from.

Nothing here unpickles: safetensors hold tensors only, and `.pth` files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.models.config import ModelConfig
from eventful_det.models.detector import Detector
from eventful_det.models.labels import LabelMap, read_labels, relabel
from eventful_det.models.vitdet import WindowedViT

FORMAT = "eventful-det/1"
DEFAULT = "vitdet_tiny_vid"
SYNTHETIC = "vitdet_tiny_synthetic"


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().to(dtype).contiguous() for key, value in detector.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": FORMAT, "config": detector.config.to_json(), **(notes or {})})
    part.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(part, path)


def load_detector(
    source: str | os.PathLike[str] | None = None,
    labels: LabelMap | str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Detector:
    """A detector ready for inference, on the CPU in float32.

    Args:
        source: a safetensors file written by `save_detector`, or the name of shipped weights; the shipped default
            if None.
        labels: names of classes to change, or None as a name to drop the class; a mapping, or a JSON file of one.
        changes: values of `ModelConfig` to change that do not affect the weights, for example `proposals=50`.

    Raises:
        UserError: no such file or name, or the file is not one of ours.
    """
    path = find_weights(source)
    config = ModelConfig.from_dict({**json.loads(read_notes(path)["config"]), **changes})
    if labels is not None:
        config = relabel(config, labels if isinstance(labels, Mapping) else read_labels(labels))
    detector = Detector(config)
    load_exactly(detector, {key: value.float() for key, value in load_file(path).items()}, str(path))
    return detector.eval()


def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a weights file.

    Raises:
        UserError: the file is missing, truncated or not written by `save_detector`.
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


def load_exactly(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a module, accounting for every key.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ; the message lists the first of each.
    """
    own = module.state_dict()
    shape = [key for key in tensors if key in own and tensors[key].shape != own[key].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", sorted(set(own) - set(tensors))),
            ("unexpected", sorted(set(tensors) - set(own))),
            ("of another shape", shape),
        )
        if keys
    ]
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(dict(tensors))


def init_backbone(vit: WindowedViT, source: str | os.PathLike[str]) -> None:
    """Start a backbone from an ImageNet ViT with timm's names.

    The class token and the classifier are dropped, the position encoding is stored without the class token, and
    relative positions keep their initial value (zero: no effect).

    Args:
        vit: the backbone to fill.
        source: a safetensors or `.pth` file, or `timm:NAME` for weights that timm downloads.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    tensors = _imagenet_tensors(str(source))
    own = vit.state_dict()
    positions = tensors["pos_embed"]
    if positions.dim() == 3:
        side = vit.pos_embed.shape[1]
        tensors["pos_embed"] = positions[:, -side * side :].unflatten(1, (side, side))
    dropped = ("cls_token", "norm.", "head.", "fc_norm.", "neck.")
    tensors = {key: value.float() for key, value in tensors.items() if not key.startswith(dropped)}
    tensors |= {key: value for key, value in own.items() if ".rel_pos_" in key and key not in tensors}
    load_exactly(vit, tensors, str(source))


def _imagenet_tensors(source: str) -> dict[str, Tensor]:
    if source.startswith("timm:"):
        return _timm_tensors(source.removeprefix("timm:"))
    if not Path(source).is_file():
        raise UserError(f"no backbone weights {source}; give a safetensors or .pth file, or timm:MODEL_NAME")
    try:
        if source.endswith(".safetensors"):
            tensors = load_file(source)
        else:
            tensors = torch.load(source, map_location="cpu", weights_only=True)
            tensors = tensors.get("model", tensors)
    except Exception as error:
        raise UserError(f"cannot read backbone weights {source}: {error}") from error
    if "pos_embed" not in tensors or "patch_embed.proj.weight" not in tensors:
        raise UserError(f"{source} holds no ViT with timm's names (pos_embed, patch_embed.proj.weight, ...)")
    return dict(tensors)


def _timm_tensors(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # of the many layers between here and the network
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"timm cannot give the weights {name} ({reason}); name a file of them instead") from error


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
