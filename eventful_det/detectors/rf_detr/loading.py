"""RF-DETR by name or from a file or folder; nothing but data is read from either."""

from __future__ import annotations

import argparse
import json
import os
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from eventful_det.detectors.checkpoints.weight_files import is_ours, read_tensors
from eventful_det.detectors.hub import WEIGHTS, fetch
from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import NAMES, SIZES, random_rfdetr
from eventful_det.errors import UserError, first_line

_EMBEDDINGS = "backbone.0.encoder.encoder.embeddings."  # in the package rfdetr, and in no other checkpoint


def is_rf_detr(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a name of RF-DETR, a folder of a model, or a `.pth` file of the package rfdetr."""
    path = Path(source)
    if path.suffix == ".pth" and not path.is_dir():
        return path.name.startswith("rf-detr") or _is_rfdetr_file(path)
    folder = _folder(path)
    return source in NAMES or (folder.is_dir() and not is_ours(folder / WEIGHTS))


def load_rf_detr(source: str | os.PathLike[str], *, min_score: float = 0.05) -> EventfulRFDETR:
    """RF-DETR, ready for inference on the CPU, in float32.

    Args:
        source: `rf-detr-nano`, `-small`, `-medium`, `-base` or `-large`, by Hugging Face's hub or its cache; a folder
            written by `save_pretrained`, safetensors only; or a `.pth` file of the package `rfdetr`.
        min_score: detections below this score are dropped.

    Raises:
        UserError: a package is missing, there are no such weights, or they are no RF-DETR that finds boxes.
    """
    rfdetr = Path(source).suffix == ".pth"
    model, processing = (_rfdetr_model(Path(source)), {}) if rfdetr else _transformers_model(source)
    detector = EventfulRFDETR(model, min_score=min_score, **processing)
    if broken := [name for name, values in detector.model.named_parameters() if not values.isfinite().all()]:
        raise UserError(f"{source} holds NaN or infinite numbers, first in {broken[0]}; get it, or train it, again")
    return detector


def _transformers_model(source: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """A model of transformers, and how frames are processed where it is not RF-DETR's own way."""
    try:
        from transformers import RfDetrForObjectDetection, logging
    except ImportError:
        raise UserError("RF-DETR needs the package transformers: pip install 'transformers>=5'") from None
    folder = _fetched(str(source)) if source in NAMES else _folder(Path(source))
    config = _json(folder / "config.json")
    if config is None and (folder / WEIGHTS).is_file():
        read_tensors(folder / WEIGHTS)  # may be a detector of ours that is damaged: then this says so
    if config is None or not list(folder.glob("*.safetensors")):
        if config is None and not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} is no detector: an engine has engine.json, an RF-DETR config.json and {WEIGHTS}")
        raise UserError(
            f"{folder} has no {'config.json' if config is None else WEIGHTS}; a folder of RF-DETR has config.json, "
            f"preprocessor_config.json and {WEIGHTS}, see huggingface.co/Roboflow/rf-detr-nano"
        )
    if not str(kind := config.get("model_type")).startswith("rf_detr"):
        raise UserError(f"{folder} is no RF-DETR: its config.json is of the model type {kind}, not rf_detr")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said below, in one line
    logging.disable_progress_bar()
    try:
        loaded: Any = RfDetrForObjectDetection.from_pretrained(
            str(folder),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
        model, keys = loaded
    except Exception as error:  # of the many layers between here and the files
        raise UserError(f"{folder} is no whole RF-DETR ({first_line(error)}); get its files again") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if any("segmentation_head." in key for key in keys["unexpected_keys"]):
        raise UserError(f"{source} is RF-DETR for segmentation, whose masks are not carried; take one that finds boxes")
    for key, given, expected in sorted(keys["mismatched_keys"]):
        raise UserError(
            f"{folder}: {key} is of shape {tuple(given)}, but {tuple(expected)} by config.json, which has "
            f"{model.config.num_labels} classes in id2label"
        )
    if lacking := sorted(keys["missing_keys"]):
        raise UserError(f"{source} is no RF-DETR: {len(lacking)} of its parameters are not there, first {lacking[0]}")
    return model, _processing(folder / "preprocessor_config.json")


def _folder(path: Path) -> Path:
    """The folder of a model, of which the weights file may be given."""
    return path.parent if path.name == WEIGHTS and (path.parent / "config.json").is_file() else path


def _fetched(name: str) -> Path:
    """The folder in the hub's cache, brought up to date where there is a network."""
    try:
        return fetch(f"Roboflow/{name}")
    except UserError as error:
        raise UserError(
            f"no weights {name}: {error}; fetch its config.json, preprocessor_config.json and {WEIGHTS} into a folder "
            "and give the path of that"
        ) from None


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None = there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, no settings; get it again")
    return content


def _processing(path: Path) -> dict[str, Any]:
    """What the image processor beside some weights does otherwise than RF-DETR's own, as `EventfulRFDETR` takes it."""
    given = _json(path) or {}
    try:
        sides = {int(side) for side in (given["size"]["height"], given["size"]["width"])} if "size" in given else {0}
        colours = {
            name: tuple(map(float, given[f"image_{name}"])) for name in ("mean", "std") if f"image_{name}" in given
        }
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: expected size with height and width, image_mean and image_std of RGB") from None
    if len(sides) != 1 or any(len(values) != 3 for values in colours.values()):
        raise UserError(f"{path}: RF-DETR takes squares of RGB, but this has the size {given.get('size')}")
    return {"side": sides.pop() or None, **colours}


def _is_rfdetr_file(path: Path) -> bool:
    """Whether a checkpoint speaks of the package's parameters; nothing of it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(_EMBEDDINGS.encode() in archive.read(name) for name in pickles)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False


def _rfdetr_model(path: Path) -> Any:
    """A model of the package rfdetr with the weights, resolution and class names of a file."""
    if not path.is_file():
        raise UserError(f"no weights file {path}")
    try:
        import rfdetr  # noqa: F401
    except ImportError:
        raise UserError(f"{path} needs the package rfdetr: pip install rfdetr") from None
    try:
        # the options of the training, data alone
        with torch.serialization.safe_globals([argparse.Namespace, types.SimpleNamespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors, options = content["model"], content.get("args") or {}
        patch = tensors[f"{_EMBEDDINGS}patch_embeddings.projection.weight"].shape[-1]
        grid = int((tensors[f"{_EMBEDDINGS}position_embeddings"].shape[1] - 1) ** 0.5)
        layers = len({key.split(".")[3] for key in tensors if key.startswith("transformer.decoder.layers.")})
        classes = len(tensors["class_embed.bias"]) - 1
    except Exception as error:
        raise UserError(
            f"{path} is no weights file of RF-DETR, or asks for more than tensors, strings and numbers "
            f"({type(error).__name__}); download it again"
        ) from None
    # Medium and large differ in their resolution alone.
    fitting = [name for name, size in SIZES.items() if (size.patch, size.decoder_layers) == (patch, layers)]
    fitting.sort(key=lambda name: abs(SIZES[name].trained - grid * patch))
    if not fitting or any(key.startswith("segmentation_head.") for key in tensors):
        raise UserError(f"{path} is not one of RF-DETR nano, small, medium, base or large for boxes")
    own = SIZES[fitting[0]].trained == grid * patch
    try:
        model = random_rfdetr(fitting[0], {"num_classes": classes} | ({} if own else {"resolution": grid * patch}))
        model.model.model.load_state_dict(tensors)
    except (RuntimeError, ValueError):
        raise UserError(f"{path} does not fit {fitting[0]}; its parameters have other names or shapes") from None
    options = options if isinstance(options, dict) else vars(options)
    if names := options.get("class_names"):
        model.model.class_names = [str(name) for name in names]
    return model
