"""Vision Transformers as the update rules see them: one description, made of each family of networks."""

from __future__ import annotations

from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.spec import Families, ViTSpec, require
from eventful_det.gating.vit_spec import detectron2, hugging_face, timm

FAMILIES: Families = {**timm.FAMILIES, **detectron2.FAMILIES, **hugging_face.FAMILIES}


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
