"""Recognisers in and out of files: ours, and those of the official eventful code, TAdaConv and scenic."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eventful_det.detectors.checkpoints.pretrained import backbone_tensors
from eventful_det.detectors.checkpoints.weight_files import (
    compare,
    find_weights,
    load_exactly,
    metadata,
    read_tensors,
    rounded,
    save_tensors,
)
from eventful_det.engine.backends import Precision, torch_dtype
from eventful_det.engine.folder import is_engine, load_engine
from eventful_det.engine.recogniser import CompiledRecogniser
from eventful_det.errors import UserError
from eventful_det.files import JsonObject, written_whole
from eventful_det.gating.spec import resize_positions
from eventful_det.recognition.config import RecogniserConfig, numbered, vivit_b_epic, vivit_b_k400
from eventful_det.recognition.key_maps import (
    EPIC_VERBS,
    from_scenic,
    from_tadaconv,
    is_scenic,
    is_tadaconv,
    refuse_others,
    to_tadaconv,
)
from eventful_det.recognition.recogniser import Recogniser

FORMAT = "eventful-recogniser/1"
Format = Literal["eventful_det", "official", "tadaconv", "scenic"]
_DETECTOR = "this is a detector, no recogniser of actions; open it with load_detector"
_HEAD_WIDTH = 64  # of attention, in all published ViViTs


@dataclass(frozen=True)
class RecogniserWeights:
    """What a weights file holds.

    Attributes:
        format: whose names it uses.
        config: of the recogniser; where the file does not tell, inferred from the weights.
        tensors: under our names.
        notes: metadata.
    """

    format: Format
    config: RecogniserConfig
    tensors: dict[str, Tensor]
    notes: dict[str, str]


def is_recogniser(path: str | os.PathLike[str]) -> bool:
    """Whether a weights file holds a recogniser, and not a detector.

    Raises:
        UserError: the file cannot be read.
    """
    contents = read_tensors(path)
    known = contents.notes.get("format") == FORMAT
    return known or _format(contents.tensors) is not None


def load_recogniser(
    source: str | os.PathLike[str],
    classes: Mapping[str, tuple[str, ...]] | None = None,
    *,
    temporal_views: int | None = None,
    spatial_views: int | None = None,
    precision: Precision | Literal["auto"] = "float32",
) -> Recogniser:
    """A recogniser ready for inference, on the CPU.

    Args:
        source: the name of shipped weights, or a file: written by `save_recogniser`; a checkpoint of the official
            eventful code, of TAdaConv, or of scenic's factorised ViViT. The format is detected by content. Or the
            folder of a compiled engine, see `load_engine`, whose classes cannot be renamed.
        classes: names of each head's classes, for files that number them.
        temporal_views, spatial_views: of a clip; by default as the weights were made for.
        precision: in which it computes; "auto" = bfloat16 where this CPU is quicker in it.

    Raises:
        UserError: no such file or name; the file is of no known format, damaged, or asks for more than data; or keys do
            not fit. Hugging Face's ViViT and VideoMAE are refused: they have no steps.
    """
    views = {"temporal_views": temporal_views, "spatial_views": spatial_views}
    changes: dict[str, Any] = {key: count for key, count in views.items() if count is not None}
    if is_engine(Path(source)):
        engine = load_engine(Path(source), precision=precision, warm_up=False)
        if not isinstance(engine, CompiledRecogniser):
            raise UserError(f"{source}: {_DETECTOR}")
        if classes is not None:
            raise UserError(f"{source}: the classes of an engine cannot be renamed; leave them out")
        engine.config = dataclasses.replace(engine.config, **changes)
        engine.warm_up()
        return engine
    path = find_weights(source)
    weights = read_recogniser(path)
    if classes is not None:
        changes["classes"] = {head: tuple(names) for head, names in classes.items()}
    config = dataclasses.replace(weights.config, **changes)
    with torch.device("meta"):  # takes no memory, however large a damaged config says that the recogniser is
        compare(Recogniser(config).state_dict(), weights.tensors, str(path))
    recogniser = Recogniser(config)
    load_exactly(recogniser, weights.tensors, str(path))
    return recogniser.to(torch_dtype(precision)).eval()


def read_recogniser(path: str | os.PathLike[str]) -> RecogniserWeights:
    """Read a weights file of any known format.

    Raises:
        UserError: see `load_recogniser`.
    """
    contents = read_tensors(path)
    tensors, notes = contents.tensors, contents.notes
    try:
        if notes.get("format") == FORMAT:
            return RecogniserWeights("eventful_det", _config(notes), tensors, notes)
        refuse_others(tensors)
        form = _format(tensors)
        if any(key.startswith("backbone.net.") for key in tensors):
            raise UserError(_DETECTOR)
        if form is None:
            raise UserError(f"this is no recogniser of a known format, but holds {', '.join(list(tensors)[:3])}, ...")
        named = from_scenic(tensors) if form == "scenic" else from_tadaconv(tensors) if form == "tadaconv" else tensors
        return RecogniserWeights(form, infer_config(named, form), named, notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _format(tensors: Mapping[str, Tensor]) -> Format | None:
    if "spatial_model.class_token" in tensors:
        return "official"
    if is_tadaconv(tensors):
        return "tadaconv"
    return "scenic" if is_scenic(tensors) else None


def _config(notes: Mapping[str, str]) -> RecogniserConfig:
    try:
        values = json.loads(notes["config"])
    except (KeyError, ValueError):
        raise UserError("its metadata hold no config") from None
    if not isinstance(values, dict):
        raise UserError("its config is no table of values")
    return RecogniserConfig.from_dict(values)


def infer_config(tensors: Mapping[str, Tensor], form: Format = "official") -> RecogniserConfig:
    """The config of a factorised ViViT under the official names.

    What shapes do not tell is as in the official configs: with EPIC-Kitchens' 97 verbs views of stride 1 at 30
    frames/s, else those of Kinetics; scenic's pixels are in [-1, 1].

    Raises:
        UserError: it is none.
    """
    try:
        dim, channels, *tubelet = tensors["embedding.conv.weight"].shape
        tokens, steps = (
            tensors[f"{model}.backbone.position_encoding.encoding"].shape[1] - 1
            for model in ("spatial_model", "temporal_model")
        )
        side = round(tokens**0.5)
        if side * side != tokens or channels != 3:
            raise UserError(f"{tokens} positions and {channels} channels; expected a square of tokens, and 3")
        heads = {"verb" if tensors["classifier.bias"].shape[0] == EPIC_VERBS else "action": "classifier"}
        heads |= {key.split(".")[1]: key.removesuffix(".bias") for key in tensors if _is_other_head(key)}
        classes = {head: numbered(tensors[f"{layer}.bias"].shape[0]) for head, layer in heads.items()}
        preset = vivit_b_epic if "verb" in classes else vivit_b_k400
        sizes: JsonObject = {
            "dim": dim,
            "heads": max(1, dim // _HEAD_WIDTH),
            "temporal_heads": max(1, dim // _HEAD_WIDTH),
            "depth": _depth(tensors, "spatial_model"),
            "temporal_depth": _depth(tensors, "temporal_model"),
            "mlp": tensors["spatial_model.backbone.blocks.0.mlp_1.bias"].shape[0],
            "temporal_mlp": tensors["temporal_model.backbone.blocks.0.mlp_1.bias"].shape[0],
        }
        clips: JsonObject = {
            "tubelet": tuple(tubelet),
            "frames": steps * tubelet[0],
            "position_grid": (side, side),
            "size": (side * tubelet[1], side * tubelet[2]),
        }
        if form == "scenic":
            clips |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        return dataclasses.replace(preset(classes), **sizes, **clips)
    except (KeyError, ValueError) as error:
        raise UserError(f"this is no whole factorised ViViT ({error})") from None


def _is_other_head(key: str) -> bool:
    return key.startswith("other_classifiers.") and key.endswith(".bias")


def _depth(tensors: Mapping[str, Tensor], model: str) -> int:
    prefix = f"{model}.backbone.blocks."
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def save_recogniser(
    recogniser: Recogniser,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write weights, config and notes to one safetensors file, whole or not at all.

    Args:
        recogniser: what to write.
        path: of the file.
        dtype: the weights are rounded to this type.
        notes: more metadata, for example the command that made the weights.
    """
    about = metadata(notes, format=FORMAT, config=recogniser.config.to_json())
    save_tensors(path, rounded(recogniser, dtype), about)


def save_official(recogniser: Recogniser, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint of the official eventful code, which knows the first head alone."""
    tensors = rounded(recogniser, torch.float32)
    kept = {key: value for key, value in tensors.items() if not key.startswith("other_classifiers.")}
    with written_whole(path) as part:
        torch.save(kept, part)


def save_tadaconv(recogniser: Recogniser, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint under TAdaConv's names, with one head, or with verbs and nouns."""
    tensors = to_tadaconv(rounded(recogniser, torch.float32))
    with written_whole(path) as part:
        torch.save({"model_state": tensors}, part)


def start_from_image(recogniser: Recogniser, path: str | os.PathLike[str]) -> None:
    """Start the spatial model from a ViT for images, under timm's names.

    A tubelet's weights are the image's, an equal part for each of its frames: a still tubelet gives the token of its
    picture. The image's classifier is left out; the temporal model keeps its values.

    Raises:
        UserError: the file cannot be read, or its ViT has other sizes.
    """
    tensors = backbone_tensors(str(path))
    config, model = recogniser.config, recogniser.spatial_model
    names = {"norm1": "input_layer_norm", "attn.qkv": "qkv", "attn.proj": "projection"}
    names |= {"norm2": "mlp_layer_norm", "mlp.fc1": "mlp_1", "mlp.fc2": "mlp_2"}
    try:
        patches, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
        side = round((positions.shape[1] - 1) ** 0.5)
        grid = resize_positions(positions[0, 1:].unflatten(0, (side, side)), config.position_grid, antialias=True)
        named = {
            "embedding.conv.weight": patches[:, :, None].repeat(1, 1, config.tubelet[0], 1, 1) / config.tubelet[0],
            "embedding.conv.bias": tensors["patch_embed.proj.bias"],
            "spatial_model.class_token": tensors["cls_token"],
            "spatial_model.backbone.position_encoding.encoding": torch.cat([positions[:, :1], grid[None]], 1),
            "spatial_model.layer_norm.weight": tensors["norm.weight"],
            "spatial_model.layer_norm.bias": tensors["norm.bias"],
        }
        for i in range(len(model.backbone.blocks)):
            for theirs, ours in names.items():
                for part in ("weight", "bias"):
                    value = tensors[f"blocks.{i}.{theirs}.{part}"]
                    named[f"spatial_model.backbone.blocks.{i}.{ours}.{part}"] = value
    except KeyError as error:
        raise UserError(f"{path} is no ViT for images under timm's names: it has no {error.args[0]}") from None
    load_exactly(recogniser, named, str(path), ["temporal_model.*", "classifier.*", "other_classifiers.*"])
