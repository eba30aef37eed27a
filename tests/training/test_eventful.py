"""Training with gates on: the same numbers as at test time, and gradients through every selected row."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.rows import Rows
from eventful_det.gating.selector import (
    EVERYTHING,
    Focus,
    LargestError,
    RandomK,
    Selector,
    Threshold,
    TopFraction,
    TopK,
)
from eventful_det.gating.vit_spec import spec_of
from eventful_det.training.eventful import gated_tokens

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "use_rel_pos": True}


def network(window: int = 4, global_blocks: tuple[int, ...] = (1, 3), size: int = 40) -> nn.Module:
    """ViTDet's backbone in small, with random weights; 40 pixels are 10 x 10 tokens, so windows are padded."""
    places = {"window_size": window, "global_attn_indexes": global_blocks}
    vit = VisionTransformerSAM(img_size=size, **SIZES, **places)
    vit.neck = vit.head = nn.Identity()
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return vit


def clip(steps: int, height: int = 40, width: int = 40) -> Tensor:
    """`(T, 3, h, w)` frames of which a block of pixels changes."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(3, height, width, generator=generator).repeat(steps, 1, 1, 1)
    for t in range(1, steps):
        frames[t:, :, 4 * t : 4 * t + 8, : width // 2] = torch.randn(3, 8, width // 2, generator=generator)
    return frames


@pytest.mark.parametrize(("height", "width"), [(40, 40), (28, 52)])
@pytest.mark.parametrize("gate", ["patches", "embedding"])
@pytest.mark.parametrize(
    "selector",
    [
        Selector(LargestError(age_power=0.5), 0.1),
        Selector(LargestError(1.0), 0.2),
        Selector(Focus(1.0), 0.3),
        Threshold(1e9),
        TopK(0),
        RandomK(7),
    ],
)
@pytest.mark.parametrize("blocks", [(4, (1, 3)), (4, ()), (0, ())])
def test_equals_the_rule_at_test_time(
    blocks: tuple[int, tuple[int, ...]], selector: Selector, gate: str, height: int, width: int
) -> None:
    vit, frames, rule = network(*blocks), clip(5, height, width), Rows(gate, renew_every=4)
    eventful = eventify(vit.eval(), rule, selector)
    state = eventful.init_state()
    expected = [eventful.step(frame[None], state)[0].tokens for frame in frames]
    tokens = gated_tokens(spec_of(vit), frames, rule=rule, selector=selector)
    torch.testing.assert_close(tokens, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_saliency_is_that_of_the_stream_at_test_time() -> None:
    vit, frames, selector = network(), clip(4), Selector(Focus(0.5, block=1), 0.2)
    saliency = torch.rand(4, 100, generator=torch.Generator().manual_seed(3)).round()
    eventful = eventify(vit.eval(), Rows(), selector)
    state = eventful.init_state()
    pairs = zip(frames, saliency, strict=True)
    expected = [eventful.step(frame[None], state, saliency=[weight])[0].tokens for frame, weight in pairs]
    tokens = gated_tokens(spec_of(vit), frames, selector=selector, saliency=saliency)
    torch.testing.assert_close(tokens, torch.stack(expected), rtol=1e-4, atol=1e-4)
    unaware = gated_tokens(spec_of(vit), frames, selector=selector)
    assert not torch.allclose(tokens, unaware, atol=1e-2)


def test_everything_selected_is_the_dense_network_and_its_gradient() -> None:
    vit, frames = network(), clip(3)
    dense = vit.forward_features(frames).permute(0, 2, 3, 1)
    (expected,) = torch.autograd.grad(dense.square().sum(), vit.blocks[0].attn.qkv.weight)
    tokens = gated_tokens(spec_of(vit), frames, selector=EVERYTHING)
    torch.testing.assert_close(tokens, dense, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(tokens.square().sum(), vit.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_everything_and_only_what_was_selected(checkpointing: bool) -> None:
    vit, frames = network(), clip(3).requires_grad_()
    tokens = gated_tokens(spec_of(vit), frames, selector=TopFraction(0.05), checkpointing=checkpointing)
    tokens[-1].square().sum().backward()
    assert frames.grad is not None
    changed = [bool(gradient.abs().sum() > 0) for gradient in frames.grad]
    assert changed == [True, True, True]  # the last map also stands on rows of earlier frames
    patches = spec_of(vit).patches(frames.grad[-1]).abs().sum(1)
    assert int((patches > 0).sum()) == int(0.05 * 100)
    assert all(parameter.grad is not None for parameter in vit.blocks.parameters())


def test_gradient_equals_finite_differences() -> None:
    vit = network(size=16).double()
    frames = clip(3, 16, 16).double()
    bias = vit.blocks[1].attn.qkv.bias

    def loss() -> Tensor:
        return gated_tokens(spec_of(vit), frames, selector=TopK(3))[1:].square().sum()

    (gradient,) = torch.autograd.grad(loss(), bias)
    direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        bias += 1e-6 * direction
        above = loss()
        bias -= 2e-6 * direction
        below = loss()
    assert float((above - below) / 2e-6) == pytest.approx(float(gradient @ direction), rel=1e-5)


def test_networks_with_a_class_token_are_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    with pytest.raises(UserError, match="class and register"):
        gated_tokens(spec_of(vit), clip(2, 24, 24))
