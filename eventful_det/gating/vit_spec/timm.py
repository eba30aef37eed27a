"""timm's SAM ViT, plain ViTs, and EVA (EVA-02, DINOv3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.spec import Block, Families, Rope, ViTSpec, require, resize_positions
from eventful_det.gating.vit_spec.parts import (
    call,
    fused_qkv,
    is_identity,
    linears,
    norm_qk,
    relative_positions,
    scaled,
    separate_qkv,
    then,
    times,
)
from eventful_det.gating.windows import Grid

_MLPS = ("Mlp", "GluMlp", "SwiGLU")  # token-wise, whatever their activation and norm


def _sam_vit(vit: Any) -> ViTSpec:
    """Windows, relative positions, no class token."""
    antialias = getattr(vit, "position_antialias", True)
    return ViTSpec(
        projection=_patches(vit),
        positions=None if vit.pos_embed is None else partial(_sam_positions, vit, antialias),
        prefix=None,
        blocks=tuple(timm_block(block, block.window_size) for block in vit.blocks),
        norm=nn.Identity(),
        layout="maps",
        norm_pre=vit.norm_pre,
    )


def _plain_vit(vit: Any) -> ViTSpec:
    """Class, distillation and register tokens; no windows."""
    return _sequence(vit, tuple(timm_block(block, 0) for block in vit.blocks), None)


def _eva(vit: Any) -> ViTSpec:
    """Rotary positions, SwiGLU, class and register tokens; no windows."""
    require(vit.rope is None or not vit.rope_mixed, "rotary positions of type mixed")
    kinds = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3")
    kind = type(vit.rope).__name__
    require(vit.rope is None or kind in kinds, f"rotary positions of type {kind}")
    rope = None if vit.rope is None else Rope(partial(_rope_table, vit.rope), vit.blocks[0].attn.rotate_half)
    return _sequence(vit, tuple(_eva_block(block) for block in vit.blocks), rope)


def _sequence(vit: Any, blocks: tuple[Block, ...], rope: Rope | None) -> ViTSpec:
    """A network without windows."""
    return ViTSpec(
        projection=_patches(vit),
        positions=None if vit.pos_embed is None else partial(_plain_positions, vit),
        prefix=partial(_plain_prefix, vit) if vit.num_prefix_tokens else None,
        blocks=blocks,
        norm=vit.norm,
        layout="sequence",
        norm_pre=vit.norm_pre,
        rope=rope,
    )


def timm_block(block: nn.Module, window: int) -> Block:
    """timm's and detectron2's pre-norm block.

    Raises:
        UserError: a part of it is not supported.
    """
    require(type(block).__name__ == "Block", f"a block of type {type(block).__name__}")
    attn: Any = block.attn
    require(type(attn).__name__ == "Attention", f"attention of type {type(attn).__name__}")
    scales = [nn.Identity() if getattr(block, name, None) is None else getattr(block, name) for name in ("ls1", "ls2")]
    require(getattr(attn, "rope", None) is None, "attention with rope")
    return _block(
        block,
        partial(fused_qkv, attn.qkv, attn.num_heads),
        layers=(attn.qkv,),
        scales=scales,
        run=partial(call, block),
        window=window,
        rel_pos=partial(relative_positions, attn) if getattr(attn, "use_rel_pos", False) else None,
    )


def _eva_block(block: Any) -> Block:
    require(type(block).__name__ == "EvaBlock", f"a block of type {type(block).__name__}")
    attn = block.attn
    kind = type(attn).__name__
    require(kind in ("EvaAttention", "AttentionRope"), f"attention of type {kind}")
    require(getattr(attn, "num_kv_groups", 1) == 1, "attention with fewer heads of keys than of queries")
    layers = (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)
    if attn.qkv is None:
        qkv = partial(separate_qkv, layers, attn.num_heads)
    elif getattr(attn, "q_bias", None) is None:
        qkv = partial(fused_qkv, attn.qkv, attn.num_heads)
    else:
        qkv = partial(_eva_qkv, attn)
    scales = [partial(times, block, name) for name in ("gamma_1", "gamma_2")]
    return _block(block, qkv, layers=layers, scales=scales, run=partial(_run_eva, block))


def _block(
    block: Any,
    qkv: partial[Tensor],
    *,
    layers: tuple[nn.Linear, ...],
    scales: Sequence[Callable[[Tensor], Tensor]],
    run: partial[Tensor],
    window: int = 0,
    rel_pos: partial[tuple[Tensor, Tensor]] | None = None,
) -> Block:
    """A pre-norm block `block.norm1, attn, norm2, mlp` whose attention has the projection `qkv`."""
    attn, mlp = block.attn, block.mlp
    require(type(mlp).__name__ in _MLPS, f"an MLP of type {type(mlp).__name__}")
    require(getattr(attn, "gate", None) is None, "attention with gate")
    q_norm, k_norm, before = (getattr(attn, name, None) or nn.Identity() for name in ("q_norm", "k_norm", "norm"))
    qk_norm = None if is_identity(q_norm) and is_identity(k_norm) else partial(norm_qk, q_norm, k_norm)
    proj = partial(scaled, attn.proj, scales[0])
    return Block(
        run=run,
        norm1=block.norm1,
        qkv=qkv if qk_norm is None else partial(then, qkv, qk_norm),
        proj=proj if is_identity(before) else partial(then, before, proj),
        norm2=block.norm2,
        mlp=partial(scaled, mlp, scales[1]),
        layers=(layers, (attn.proj,), linears(mlp)),
        heads=attn.num_heads,
        window=window,
        rel_pos=rel_pos,
        qk_norm=qk_norm,
    )


def _eva_qkv(attn: Any, x: Tensor) -> Tensor:
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))


def _run_eva(block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    result: Tensor = block(x, rope=None if rope is None else rope.flatten(1))
    return result


def _rope_table(rope: Any, grid: Grid) -> Tensor:
    """timm keeps sines and cosines one after another, `(N, 2 d)`."""
    table: Tensor = rope.get_embed(shape=list(grid))
    if len(table) != grid[0] * grid[1]:
        raise UserError(
            f"rotary positions of a fixed grid do not fit {grid[0]} x {grid[1]} tokens; "
            "create the network with dynamic_img_size=True, or resize the frame"
        )
    return table.unflatten(1, (2, -1))


def _patches(vit: Any) -> nn.Conv2d:
    embedding = vit.patch_embed
    require(type(embedding).__name__ == "PatchEmbed", f"a patch embedding of type {type(embedding).__name__}")
    require(is_identity(embedding.norm), "a norm after the patch embedding")
    projection: nn.Conv2d = embedding.proj
    return projection


def _sam_positions(vit: Any, antialias: bool, grid: Grid) -> Tensor:
    return resize_positions(vit.pos_embed[0], grid, antialias)


def _encoded(vit: Any) -> int:
    """Prefix tokens that have position encodings."""
    return 0 if vit.no_embed_class or vit.pos_embed is None else vit.num_prefix_tokens


def _plain_positions(vit: Any, grid: Grid) -> Tensor:
    encoding = vit.pos_embed[0, _encoded(vit) :]
    return resize_positions(encoding.unflatten(0, vit.patch_embed.grid_size), grid, antialias=True)


def _plain_prefix(vit: Any) -> Tensor:
    names = ("cls_token", "dist_token", "reg_token")
    tokens = torch.cat([token[0] for name in names if (token := getattr(vit, name, None)) is not None])
    skip = _encoded(vit)
    return tokens + vit.pos_embed[0, :skip] if skip else tokens


FAMILIES: Families = {
    ("timm.models.vision_transformer_sam", "VisionTransformerSAM"): _sam_vit,
    ("timm.models.vision_transformer", "VisionTransformer"): _plain_vit,
    ("timm.models.eva", "Eva"): _eva,
}
