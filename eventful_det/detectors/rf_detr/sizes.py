"""The sizes of RF-DETR, and random networks of them: for counts, times and tests, where weights do not matter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from eventful_det.errors import UserError
from eventful_det.files import JsonObject

if TYPE_CHECKING:
    from rfdetr.detr import RFDETR
    from transformers import RfDetrForObjectDetection

Name = Literal["rf-detr-nano", "rf-detr-small", "rf-detr-medium", "rf-detr-base", "rf-detr-large"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
        side: of the square input in pixels.
        decoder_layers: of the decoder.
        patch: side of a token in pixels.
        regions: windows along a side.
        outputs: blocks whose feature maps come out, from 1.
        positions: side in pixels of the input that position encodings are trained for; 0 = `side`.
    """

    side: int
    decoder_layers: int
    patch: int = 16
    regions: int = 2
    outputs: tuple[int, ...] = (3, 6, 9, 12)
    positions: int = 0

    @property
    def trained(self) -> int:
        """Side in pixels that position encodings are for."""
        return self.positions or self.side


SIZES: dict[Name, Size] = {
    "rf-detr-nano": Size(384, 2),
    "rf-detr-small": Size(512, 3),
    "rf-detr-medium": Size(576, 4),
    "rf-detr-base": Size(560, 3, patch=14, regions=4, outputs=(2, 5, 8, 11), positions=518),
    "rf-detr-large": Size(704, 4),
}


def random_model(
    name: Name,
    seed: int = 0,
    *,
    config: Mapping[str, object] | None = None,
    backbone: Mapping[str, object] | None = None,
) -> RfDetrForObjectDetection:
    """A `transformers.RfDetrForObjectDetection` of a size, with random weights.

    Args:
        name: of the size.
        seed: of the weights.
        config: other values of its `RfDetrConfig` ...
        backbone: ... and of the config of its backbone.

    Raises:
        UserError: transformers is missing.
    """
    try:
        from transformers import RfDetrConfig, RfDetrForObjectDetection
    except ImportError:
        raise UserError("RF-DETR needs the package transformers: pip install 'transformers>=5'") from None
    size = SIZES[name]
    vit = {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "image_size": size.trained,
        "patch_size": size.patch,
        "num_windows": size.regions,
        "out_indices": list(size.outputs),
        **(backbone or {}),
    }
    values: JsonObject = {
        "decoder_layers": size.decoder_layers,
        "decoder_n_points": 2,
        "num_labels": 91,
        **(config or {}),
        "backbone_config": vit,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RfDetrForObjectDetection(RfDetrConfig(**values)).eval()


def random_rfdetr(name: Name, options: Mapping[str, object] | None = None) -> RFDETR:
    """A model of the package `rfdetr`, with random weights. Nothing is fetched: it would fetch DINOv2's for "base".

    Args:
        name: of the size.
        options: of its class, for example `num_classes`.
    """
    import rfdetr
    from rfdetr.models.backbone.dinov2_with_windowed_attn import WindowedDinov2WithRegistersBackbone as Backbone

    kind, fetch = getattr(rfdetr, f"RFDETR{name.rpartition('-')[2].title()}"), Backbone.from_pretrained
    logger = logging.getLogger("rf-detr")
    level = logger.level
    Backbone.from_pretrained = lambda _, config: Backbone(config)
    logger.setLevel(logging.ERROR)  # it warns of what is wanted here: weights that are not loaded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(pretrain_weights=None, **(options or {}))
    finally:
        Backbone.from_pretrained = fetch
        logger.setLevel(level)
