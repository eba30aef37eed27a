"""RF-DETR by name or from a file or folder; nothing but data is read from either."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from eventful_det.detectors.rf_detr.model import EventfulRFDETR
from eventful_det.detectors.rf_detr.sizes import NAMES, SIZES, random_rfdetr
from eventful_det.errors import UserError

# Side of a patch, decoder layers and positions along a side tell the sizes of the package rfdetr apart.
_NAMES = {(size.patch, size.decoder_layers, size.trained // size.patch): name for name, size in SIZES.items()}
_PROJECTION = "backbone.0.encoder.encoder.embeddings.patch_embeddings.projection.weight"
_POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"


def is_rf_detr(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a name of RF-DETR, a folder of a model, or a `.pth` file of the package rfdetr."""
    path = Path(source)
    return source in NAMES or path.is_dir() or (path.suffix == ".pth" and path.name.startswith("rf-detr"))


def load_rf_detr(source: str | os.PathLike[str], *, min_score: float = 0.05) -> EventfulRFDETR:
    """RF-DETR, ready for inference on the CPU.

    Args:
        source: `rf-detr-nano`, `-small`, `-medium`, `-base` or `-large`, by Hugging Face's hub or its cache; a folder
            written by `save_pretrained`, safetensors only; or a `.pth` file of the package `rfdetr`.
        min_score: detections below this score are dropped.

    Raises:
        UserError: a package is missing, there are no such weights, or they are no RF-DETR that finds boxes.
    """
    if Path(source).suffix == ".pth":
        return EventfulRFDETR(_rfdetr_model(Path(source)), min_score=min_score)
    try:
        from transformers import RfDetrForObjectDetection, logging
    except ImportError:
        raise UserError("RF-DETR needs the package transformers: pip install 'transformers>=5'") from None
    name = f"Roboflow/{source}" if source in NAMES else str(source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said below, in one line
    try:
        loaded: Any = RfDetrForObjectDetection.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        model, keys = loaded
    except Exception as error:  # of the many layers between here and the files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"no weights {source}: fetch config.json, preprocessor_config.json and model.safetensors of "
            f"huggingface.co/{name} into a folder and give its path ({reason[:120]})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if any("segmentation_head." in key for key in keys["unexpected_keys"]):
        raise UserError(f"{source} is RF-DETR for segmentation, whose masks are not carried; take one that finds boxes")
    if lacking := sorted(keys["missing_keys"]) + sorted(keys["mismatched_keys"]):
        raise UserError(f"{source} is no RF-DETR: {len(lacking)} of its parameters are not there, first {lacking[0]}")
    return EventfulRFDETR(model, min_score=min_score, side=_processed_side(name))


def _processed_side(name: str) -> int | None:
    """Side of the square that the image processor beside some weights makes; None = there is none."""
    from transformers import RfDetrImageProcessor

    try:
        size, _ = RfDetrImageProcessor.get_image_processor_dict(name)
        side = int(size["size"]["height"])
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return side


def _rfdetr_model(path: Path) -> Any:
    """A model of the package rfdetr with the weights of a file."""
    if not path.is_file():
        raise UserError(f"no weights file {path}")
    try:
        import rfdetr  # noqa: F401
    except ImportError:
        raise UserError(f"{path} needs the package rfdetr: pip install rfdetr") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of the training, data alone
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = content["model"]
        patch, positions = tensors[_PROJECTION].shape[-1], tensors[_POSITIONS].shape[1] - 1
        layers = len({key.split(".")[3] for key in tensors if key.startswith("transformer.decoder.layers.")})
    except Exception as error:
        raise UserError(f"{path} is no weights file of RF-DETR ({type(error).__name__}); download it again") from None
    name = _NAMES.get((patch, layers, int(positions**0.5)))
    if name is None or any(key.startswith("segmentation_head.") for key in tensors):
        raise UserError(f"{path} is not one of RF-DETR nano, small, medium, base or large for boxes")
    model = random_rfdetr(name, {"num_classes": len(tensors["class_embed.bias"]) - 1})
    try:
        model.model.model.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{path} does not fit {name}; its parameters have other names or shapes") from None
    return model
