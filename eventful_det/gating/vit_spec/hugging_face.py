"""Hugging Face's DINOv2, DINOv3, ViTDet and LW-DETR, and RF-DETR's windowed DINOv2, there and in the package rfdetr."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eventful_det.gating.spec import Block, Families, Rope, ViTSpec, require
from eventful_det.gating.vit_spec.parts import (
    call,
    fused_qkv,
    linears,
    relative_positions,
    scaled,
    separate_qkv,
    square_positions,
    times,
)
from eventful_det.gating.windows import Grid, Regions


def _any_dino_v2(vit: Any) -> ViTSpec:
    """DINOv2 with and without registers; with windows that are regions, RF-DETR's."""
    config = vit.config
    regions = getattr(config, "num_windows", 1)
    blocks = []
    for layer in vit.encoder.layer:
        attn = layer.attention
        window = Regions(regions) if regions > 1 and not layer.global_attention else 0
        qkv, heads = (attn.q_proj, attn.k_proj, attn.v_proj), attn.num_attention_heads
        blocks.append(_block(layer, heads, qkv, attn.o_proj, partial(call, layer), window))
    antialias = config.model_type != "dinov2"
    return _dino_v2(vit, blocks, antialias, regions)


def _rfdetr_dino_v2(vit: Any) -> ViTSpec:
    """The windowed DINOv2 of the package rfdetr."""
    config, blocks = vit.config, []
    for i, layer in enumerate(vit.encoder.layer):
        attn, windowed = layer.attention.attention, i in config.window_block_indexes
        run = partial(_run_rfdetr, layer, not windowed)
        window = Regions(config.num_windows) if windowed and config.num_windows > 1 else 0
        qkv, heads = (attn.query, attn.key, attn.value), attn.num_attention_heads
        blocks.append(_block(layer, heads, qkv, layer.attention.output.dense, run, window))
    return _dino_v2(vit, blocks, True, config.num_windows)


def _dino_v3(vit: Any) -> ViTSpec:
    """Rotary positions, class and register tokens."""
    outputs = _outputs(vit)
    last = not outputs or outputs == (len(vit.model.layer),)
    require(last or vit.config.apply_layernorm, "feature maps of several blocks of which only the last is normed")
    blocks = []
    for layer in vit.model.layer:
        attn = layer.attention
        qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
        blocks.append(_block(layer, attn.num_heads, qkv, attn.o_proj, partial(_run_dino_v3, layer)))
    embeddings = vit.embeddings
    return ViTSpec(
        projection=embeddings.patch_embeddings,
        positions=None,
        prefix=partial(_prefix, embeddings, False, 1),
        blocks=tuple(blocks),
        norm=vit.norm,
        layout="sequence",
        rope=Rope(partial(_rope_table, vit.rope_embeddings, embeddings.patch_embeddings), half=True),
        outputs=outputs,
    )


def _vit_det(vit: Any) -> ViTSpec:
    """Windows, relative positions, no class token."""
    blocks = []
    for layer in vit.encoder.layer:
        require(not layer.use_residual_block, "a residual convolution block")
        attn = layer.attention
        blocks.append(
            Block(
                run=partial(_run_vit_det, layer),
                norm1=layer.norm1,
                qkv=partial(fused_qkv, attn.qkv, attn.num_heads),
                proj=attn.proj,
                norm2=layer.norm2,
                mlp=layer.mlp,
                layers=((attn.qkv,), (attn.proj,), linears(layer.mlp)),
                heads=attn.num_heads,
                window=layer.window_size,
                rel_pos=partial(relative_positions, attn) if attn.use_relative_position_embeddings else None,
            )
        )
    return ViTSpec(
        projection=vit.embeddings.projection,
        positions=_absolute_positions(vit.embeddings),
        prefix=None,
        blocks=tuple(blocks),
        norm=nn.Identity(),
        layout="maps",
        outputs=_outputs(vit),
    )


def _lw_detr_vit(vit: Any) -> ViTSpec:
    """Windows that are regions, no class token."""
    blocks, regions = [], vit.config.num_windows_side
    for layer in vit.encoder.layer:
        attn, mlp = layer.attention, layer.intermediate
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        blocks.append(
            Block(
                run=partial(call, layer),
                norm1=layer.layernorm_before,
                qkv=partial(separate_qkv, layers, attn.num_attention_heads),
                proj=partial(scaled, attn.o_proj, partial(times, layer, "gamma_1")),
                norm2=layer.layernorm_after,
                mlp=partial(scaled, mlp, partial(times, layer, "gamma_2")),
                layers=(layers, (attn.o_proj,), linears(mlp)),
                heads=attn.num_attention_heads,
                window=Regions(regions) if layer.window and regions > 1 else 0,
            )
        )
    return ViTSpec(
        projection=vit.embeddings.projection,
        positions=_absolute_positions(vit.embeddings),
        prefix=None,
        blocks=tuple(blocks),
        norm=nn.Identity(),
        layout="windows" if regions > 1 else "sequence",
        outputs=_outputs(vit),
        regions=regions,
    )


def _dino_v2(vit: Any, blocks: list[Block], antialias: bool, regions: int) -> ViTSpec:
    outputs = _outputs(vit)
    normed = not outputs or vit.config.apply_layernorm
    return ViTSpec(
        projection=vit.embeddings.patch_embeddings.projection,
        positions=partial(square_positions, vit.embeddings, "position_embeddings", 1, antialias),
        prefix=partial(_prefix, vit.embeddings, True, regions**2),
        blocks=tuple(blocks),
        norm=vit.layernorm if normed else nn.Identity(),
        layout="windows" if regions > 1 else "sequence",
        outputs=outputs,
        regions=regions,
    )


def _block(
    layer: Any,
    heads: int,
    qkv: tuple[nn.Linear, ...],
    proj: nn.Linear,
    run: partial[Tensor],
    window: Regions | int = 0,
) -> Block:
    """A block of the DINO families."""
    return Block(
        run=run,
        norm1=layer.norm1,
        qkv=partial(separate_qkv, qkv, heads),
        proj=partial(scaled, proj, layer.layer_scale1),
        norm2=layer.norm2,
        mlp=partial(scaled, layer.mlp, layer.layer_scale2),
        layers=(qkv, (proj,), linears(layer.mlp)),
        heads=heads,
        window=window,
    )


def _outputs(vit: Any) -> tuple[int, ...]:
    """After how many blocks a backbone gives a feature map; () for a model, which has none but the last."""
    if not hasattr(vit, "out_features"):
        return ()
    outputs = tuple(vit.stage_names.index(name) for name in vit.out_features)
    require(0 not in outputs, "a feature map of the embedding")
    return outputs


def _prefix(embeddings: Any, encoded: bool, windows: int) -> Tensor:
    """Class token, with its position if `encoded`, and register tokens, for each window: `(windows * p, D)`."""
    tokens = embeddings.cls_token[0]  # (1, D)
    if encoded:
        tokens = tokens + embeddings.position_embeddings[0, :1]
    registers = getattr(embeddings, "register_tokens", None)
    tokens = tokens if registers is None else torch.cat([tokens, registers[0]])
    return tokens.repeat(windows, 1)


def _absolute_positions(embeddings: Any) -> partial[Tensor] | None:
    if embeddings.position_embeddings is None:
        return None
    return partial(square_positions, embeddings, "position_embeddings", 1, False)


def _rope_table(rope: Any, projection: nn.Conv2d, grid: Grid) -> Tensor:
    """The module reads nothing of a frame but its size and type."""
    size = [side * patch for side, patch in zip(grid, projection.kernel_size, strict=True)]
    cos, sin = rope(projection.weight.detach().new_zeros(1).expand(1, 1, *size))
    return torch.stack([sin, cos], 1)


def _run_rfdetr(layer: Any, globally: bool, x: Tensor, rope: Tensor | None) -> Tensor:
    result: Tensor = layer(x, False, globally)[0]
    return result


def _run_dino_v3(layer: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    assert rope is not None
    sin, cos = rope.unbind(1)
    result: Tensor = layer(x, position_embeddings=(cos, sin))
    return result


def _run_vit_det(layer: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Its blocks take maps `(1, D, H, W)`."""
    result: Tensor = layer(x.permute(0, 3, 1, 2))[0]
    return result.permute(0, 2, 3, 1)


FAMILIES: Families = {
    ("transformers.models.dinov2.", "Dinov2Model"): _any_dino_v2,
    ("transformers.models.dinov2.", "Dinov2Backbone"): _any_dino_v2,
    ("transformers.models.dinov2_with_registers.", "Dinov2WithRegistersModel"): _any_dino_v2,
    ("transformers.models.dinov2_with_registers.", "Dinov2WithRegistersBackbone"): _any_dino_v2,
    ("transformers.models.rf_detr.", "RfDetrDinov2Backbone"): _any_dino_v2,
    ("transformers.models.dinov3_vit.", "DINOv3ViTModel"): _dino_v3,
    ("transformers.models.dinov3_vit.", "DINOv3ViTBackbone"): _dino_v3,
    ("transformers.models.vitdet.", "VitDetBackbone"): _vit_det,
    ("transformers.models.lw_detr.", "LwDetrViTBackbone"): _lw_detr_vit,
    ("rfdetr.", "WindowedDinov2WithRegistersBackbone"): _rfdetr_dino_v2,
}
