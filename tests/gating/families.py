"""The families of networks that `eventify` knows, each as a small random configuration, and how each runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from networks import PATCH, randomise
from torch import Tensor, nn

_SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": PATCH}
_TIMM = {"img_size": 32, "patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2}


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        package: that it comes from.
        name: of the class.
        features: what it has that other networks lack.
        make: the small network.
        dense: `(H, W, C)` by its own forward of a frame `(1, 3, h, w)`.
        square: its own forward is right for square frames only.
    """

    package: str
    name: str
    features: str
    make: Callable[[], nn.Module]
    dense: Callable[[Any, Tensor], Tensor]
    square: bool = False

    def network(self) -> nn.Module:
        """The small network; the test is skipped where its package is missing."""
        pytest.importorskip(self.package)
        return randomise(self.make())


def _timm(vit: Any, frame: Tensor) -> Tensor:
    tokens = vit.forward_features(frame)[0]
    return _grid(tokens[vit.num_prefix_tokens :], frame)


def _sam(vit: Any, frame: Tensor) -> Tensor:
    tokens: Tensor = vit.forward_features(frame)[0]
    return tokens.permute(1, 2, 0)


def _maps(vit: Any, frame: Tensor) -> Tensor:
    """Feature maps of a backbone, one after another."""
    return torch.cat([features[0].permute(1, 2, 0) for features in vit(frame).feature_maps], -1)


def _last(vit: Any, frame: Tensor) -> Tensor:
    """The last state of a model."""
    tokens = vit(frame).last_hidden_state[0]
    return _grid(tokens[len(tokens) - frame.shape[2] * frame.shape[3] // PATCH**2 :], frame)


def _grid(tokens: Tensor, frame: Tensor) -> Tensor:
    return tokens.unflatten(0, (frame.shape[2] // PATCH, frame.shape[3] // PATCH))


def _make_sam(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    vit = VisionTransformerSAM(
        **{**_TIMM, "depth": 4, "window_size": 5, "global_attn_indexes": (1, 3), "use_rel_pos": True, **changes}
    )
    vit.neck = vit.head = nn.Identity()
    return vit


def _make_plain(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**_TIMM, "dynamic_img_size": True, **changes})


def _make_swiglu() -> nn.Module:
    from timm.layers import SwiGLUPacked

    return _make_plain(mlp_layer=SwiGLUPacked, pre_norm=True)


def _make_distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**_TIMM, dynamic_img_size=True)


def _make_eva(**changes: Any) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**{**_TIMM, "dynamic_img_size": True, "use_rot_pos_emb": True, **changes})


def _make_dinov3() -> nn.Module:
    return _make_eva(
        qkv_bias=False,
        init_values=0.1,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
    )


def hugging_face(module: str, name: str, config: str, **changes: Any) -> nn.Module:
    """A small random network of transformers."""
    import importlib

    models = importlib.import_module(f"transformers.models.{module}")
    network: nn.Module = getattr(models, name)(getattr(models, config)(**{**_SIZES, **changes}))
    return network


def _hf(module: str, name: str, config: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: hugging_face(module, name, config, **changes)


def _make_rfdetr() -> nn.Module:
    from rfdetr.models.backbone import dinov2_with_windowed_attn as windowed

    config = windowed.WindowedDinov2WithRegistersConfig(
        **_SIZES, image_size=32, num_windows=2, num_register_tokens=2, window_block_indexes=[0, 2], out_indices=[1, 3]
    )
    network: nn.Module = windowed.WindowedDinov2WithRegistersBackbone(config)
    return network


_DINOV3 = {"image_size": 32, "intermediate_size": 48, "num_register_tokens": 2}
_VITDET = {"image_size": 32, "pretrain_image_size": 24, "window_size": 5, "window_block_indices": [0, 2]}
_LW_DETR = {**_VITDET, "num_windows": 4, "out_indices": [2, 4]}
del _LW_DETR["window_size"]

FAMILIES = (
    Family("timm", "VisionTransformerSAM", "windows, relative positions", _make_sam, _sam),
    Family(
        "timm", "VisionTransformerSAM", "the same with norms of queries and keys", lambda: _make_sam(qk_norm=True), _sam
    ),
    Family("timm", "VisionTransformer", "class token", _make_plain, _timm),
    Family("timm", "VisionTransformer", "registers, layer scale (DINOv2)", lambda: _make_plain(reg_tokens=2), _timm),
    Family("timm", "VisionTransformer", "norms of queries and keys", lambda: _make_plain(qk_norm=True), _timm),
    Family("timm", "VisionTransformer", "SwiGLU, a norm before the blocks (CLIP)", _make_swiglu, _timm),
    Family("timm", "VisionTransformerDistilled", "distillation token (DeiT)", _make_distilled, _timm),
    Family("timm", "Eva", "rotary positions, registers (DINOv3)", _make_dinov3, _timm),
    Family(
        "timm",
        "Eva",
        "rotary and absolute positions, SwiGLU (EVA-02)",
        lambda: _make_eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=(4, 4)),
        _timm,
    ),
    Family(
        "timm",
        "Eva",
        "the same with norms of queries and keys",
        lambda: _make_eva(attn_type="rope", qk_norm=True, scale_attn_inner=True),
        _timm,
    ),
    Family(
        "transformers",
        "RfDetrDinov2Backbone",
        "2 x 2 regions with a class token each, several output blocks",
        _hf("rf_detr", "RfDetrDinov2Backbone", "RfDetrDinov2Config", image_size=32, num_windows=2, out_indices=[2, 4]),
        _maps,
        square=True,
    ),
    Family(
        "transformers",
        "RfDetrDinov2Backbone",
        "4 x 4 regions, SwiGLU",
        _hf(
            "rf_detr",
            "RfDetrDinov2Backbone",
            "RfDetrDinov2Config",
            image_size=32,
            num_windows=4,
            out_indices=[1, 3],
            use_swiglu_ffn=True,
        ),
        _maps,
        square=True,
    ),
    Family("transformers", "Dinov2Model", "class token", _hf("dinov2", "Dinov2Model", "Dinov2Config"), _last),
    Family(
        "transformers",
        "Dinov2Backbone",
        "several output blocks, SwiGLU",
        _hf("dinov2", "Dinov2Backbone", "Dinov2Config", image_size=32, out_indices=[1, 3], use_swiglu_ffn=True),
        _maps,
    ),
    Family(
        "transformers",
        "Dinov2WithRegistersBackbone",
        "registers, several output blocks",
        _hf(
            "dinov2_with_registers",
            "Dinov2WithRegistersBackbone",
            "Dinov2WithRegistersConfig",
            image_size=24,
            num_register_tokens=3,
            out_indices=[2, 4],
        ),
        _maps,
    ),
    Family(
        "transformers",
        "DINOv3ViTModel",
        "rotary positions, registers",
        _hf("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **_DINOV3),
        _last,
    ),
    Family(
        "transformers",
        "DINOv3ViTBackbone",
        "the same, SwiGLU, several output blocks",
        _hf("dinov3_vit", "DINOv3ViTBackbone", "DINOv3ViTConfig", **_DINOV3, use_gated_mlp=True, out_indices=[2, 4]),
        _maps,
    ),
    Family(
        "transformers",
        "VitDetBackbone",
        "windows, relative positions",
        _hf("vitdet", "VitDetBackbone", "VitDetConfig", **_VITDET, use_relative_position_embeddings=True),
        _maps,
    ),
    Family(
        "transformers",
        "LwDetrViTBackbone",
        "2 x 2 regions, several output blocks",
        _hf("lw_detr", "LwDetrViTBackbone", "LwDetrViTConfig", **_LW_DETR),
        _maps,
    ),
    Family(
        "rfdetr",
        "WindowedDinov2WithRegistersBackbone",
        "2 x 2 regions with class token and registers each, several output blocks",
        _make_rfdetr,
        _maps,
    ),
)


@dataclass(frozen=True)
class Refused:
    """A kind of network that `eventify` refuses, and the part that it names."""

    package: str
    name: str
    part: str
    make: Callable[[], nn.Module]

    def network(self) -> nn.Module:
        """The small network; the test is skipped where its package is missing."""
        pytest.importorskip(self.package)
        return self.make()


def _make_blocks(name: str) -> nn.Module:
    from timm.models import vision_transformer

    return _make_plain(block_fn=getattr(vision_transformer, name))


def _make_hybrid() -> nn.Module:
    from timm import create_model

    return create_model("vit_tiny_r_s16_p8_224")


REFUSED: tuple[Refused, ...] = (
    Refused("timm", "VisionTransformer", "a patch embedding of type HybridEmbed", _make_hybrid),
    *(
        Refused("timm", "VisionTransformer", f"a block of type {block}", partial(_make_blocks, block))
        for block in ("ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock")
    ),
    Refused("timm", "Eva", "rotary positions of type mixed", partial(_make_eva, rope_type="mixed")),
    Refused(
        "transformers",
        "VitDetBackbone",
        "a residual convolution block",
        _hf("vitdet", "VitDetBackbone", "VitDetConfig", residual_block_indices=[1]),
    ),
    Refused(
        "transformers",
        "Dinov2Backbone",
        "a feature map of the embedding",
        _hf("dinov2", "Dinov2Backbone", "Dinov2Config", out_indices=[0, 2]),
    ),
    Refused(
        "transformers",
        "DINOv3ViTBackbone",
        "feature maps of several blocks of which only the last is normed",
        _hf(
            "dinov3_vit",
            "DINOv3ViTBackbone",
            "DINOv3ViTConfig",
            num_register_tokens=2,
            apply_layernorm=False,
            out_indices=[2, 4],
            intermediate_size=48,
        ),
    ),
)


def refused_table() -> str:
    """What is refused as a table of the documentation."""
    rows = [f"| `{refused.package}` | `{refused.name}` | {refused.part} |" for refused in REFUSED]
    return "\n".join(["| package | network | part that is not supported |", "|---|---|---|", *rows]) + "\n"


def table() -> str:
    """The families as a table of the documentation."""
    rows = [f"| `{family.package}` | `{family.name}` | {family.features} |" for family in FAMILIES]
    return "\n".join(["| package | network | what it has |", "|---|---|---|", *rows]) + "\n"
