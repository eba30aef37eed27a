"""Small networks with random weights, their dense token maps, and clips in which a part of each frame changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from eventful_det.gating.convert import eventify
from eventful_det.gating.rules import Rule
from eventful_det.gating.selector import DEFAULT, Select
from eventful_det.gating.state import State, StreamState, Update

PATCH = 4


def randomise(vit: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return vit.eval().requires_grad_(False)


def sam(**changes: Any) -> nn.Module:
    """ViTDet's backbone: windows of 4, blocks 1 and 3 global; 10 x 10 tokens at 40 pixels, so windows are padded."""
    sizes = {"img_size": 40, "patch_size": PATCH, "embed_dim": 24, "depth": 4, "num_heads": 2, "window_size": 4}
    vit = VisionTransformerSAM(**{**sizes, "global_attn_indexes": (1, 3), "use_rel_pos": True, **changes})
    vit.neck = vit.head = nn.Identity()
    return randomise(vit)


def plain(**changes: Any) -> nn.Module:
    """A plain ViT with a class token; 6 x 6 tokens at 24 pixels."""
    sizes = {"img_size": 24, "patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return randomise(VisionTransformer(**{**sizes, "dynamic_img_size": True, **changes}))


def dense_tokens(vit: nn.Module, frame: Tensor) -> Tensor:
    """`(H, W, C)` by timm's own forward of a frame `(3, h, w)`."""
    tokens = vit.forward_features(frame[None])[0]
    if isinstance(vit, VisionTransformerSAM):
        return tokens.permute(1, 2, 0)
    return tokens[vit.num_prefix_tokens :].unflatten(0, (frame.shape[1] // PATCH, frame.shape[2] // PATCH))


def clip(
    steps: int, height: int = 40, width: int = 40, streams: int = 1, changing: float = 0.3, seed: int = 0
) -> Tensor:
    """`(T, B, 3, h, w)` frames, of which a share of the patches changes from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(steps, streams, 3, height, width, generator=generator)
    rows, cols = -(-height // PATCH), -(-width // PATCH)
    keep = torch.rand(steps, streams, 1, rows, cols, generator=generator) >= changing
    keep = keep.repeat_interleave(PATCH, -2).repeat_interleave(PATCH, -1)[..., :height, :width]
    for t in range(1, steps):
        frames[t] = torch.where(keep[t], frames[t - 1], frames[t])
    return frames


def run(
    vit: nn.Module, rule: Rule[Any], frames: Sequence[Tensor] | Tensor, selector: Select = DEFAULT
) -> tuple[list[list[Update]], State[StreamState]]:
    """Step through frames `(T, B, 3, h, w)`; per frame and stream what was updated, and the final state."""
    eventful = eventify(vit, rule, selector)
    state = eventful.init_state(len(frames[0]))
    return [eventful.step(frame, state) for frame in frames], state


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
