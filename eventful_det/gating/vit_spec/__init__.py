"""Vision Transformers as the update rules see them: one description, made of each family of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.vit_spec.detectron2 import detectron2_vit
from eventful_det.gating.vit_spec.hugging_face import dino_v2, dino_v3, lw_detr_vit, rfdetr_dino_v2, vit_det
from eventful_det.gating.vit_spec.spec import Block as Block
from eventful_det.gating.vit_spec.spec import Rope as Rope
from eventful_det.gating.vit_spec.spec import ViTSpec as ViTSpec
from eventful_det.gating.vit_spec.spec import relative_table as relative_table
from eventful_det.gating.vit_spec.spec import require
from eventful_det.gating.vit_spec.spec import resize_positions as resize_positions
from eventful_det.gating.vit_spec.spec import resize_table as resize_table
from eventful_det.gating.vit_spec.timm import eva, plain_vit, sam_vit

# Beginning of the module and name of the class, which may be a base of the network's own.
FAMILIES: dict[tuple[str, str], Callable[[Any], ViTSpec]] = {
    ("timm.models.vision_transformer_sam", "VisionTransformerSAM"): sam_vit,
    ("timm.models.vision_transformer", "VisionTransformer"): plain_vit,
    ("timm.models.eva", "Eva"): eva,
    ("detectron2.", "ViT"): detectron2_vit,
    ("transformers.models.dinov2.", "Dinov2Model"): dino_v2,
    ("transformers.models.dinov2.", "Dinov2Backbone"): dino_v2,
    ("transformers.models.dinov2_with_registers.", "Dinov2WithRegistersModel"): dino_v2,
    ("transformers.models.dinov2_with_registers.", "Dinov2WithRegistersBackbone"): dino_v2,
    ("transformers.models.rf_detr.", "RfDetrDinov2Backbone"): dino_v2,
    ("transformers.models.dinov3_vit.", "DINOv3ViTModel"): dino_v3,
    ("transformers.models.dinov3_vit.", "DINOv3ViTBackbone"): dino_v3,
    ("transformers.models.vitdet.", "VitDetBackbone"): vit_det,
    ("transformers.models.lw_detr.", "LwDetrViTBackbone"): lw_detr_vit,
    ("rfdetr.", "WindowedDinov2WithRegistersBackbone"): rfdetr_dino_v2,
}


def spec_of(vit: nn.Module) -> ViTSpec:
    """The description of a supported network.

    Raises:
        UserError: the network is of another kind, or uses a part whose result is not token-wise.
    """
    for base in type(vit).__mro__:
        for (module, name), describe in FAMILIES.items():
            if base.__name__ == name and base.__module__.startswith(module):
                return _checked(describe(vit))
    supported = ", ".join(f"{module.split('.')[0]} {name}" for module, name in FAMILIES)
    raise UserError(f"cannot make {type(vit).__module__}.{type(vit).__name__} eventful; supported: {supported}")


def _checked(vit: ViTSpec) -> ViTSpec:
    windows = sorted({block.window for block in vit.blocks if isinstance(block.window, int) and block.window})
    require(len(windows) < 2, f"windows of more than one size ({windows})")
    size, stride = vit.projection.kernel_size, vit.projection.stride
    require(size == stride and size[0] == size[1], f"a patch embedding of size {size} and stride {stride}")
    padding = vit.projection.padding
    require(padding in (0, (0, 0), "valid"), f"a patch embedding with padding {padding}")
    for block in vit.blocks:
        width = sum(layer.out_features for layer in block.layers[0])
        require(width == 3 * block.dim, "attention of another width than the tokens")
    return vit
