"""Networks as the rules see them: patches, positions, windows; and which networks are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import plain, sam
from timm.layers import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from eventful_det.errors import UserError
from eventful_det.gating.convert import eventify
from eventful_det.gating.spec import relative_table, resize_positions
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Tiles, relative_bias, relative_places, relative_terms, windows_of

CPU = torch.device("cpu")
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(st.integers(1, 40), st.integers(1, 40))
def test_patches_and_embedding_are_the_convolution_on_a_padded_frame(height: int, width: int) -> None:
    spec = spec_of(sam())
    rows, cols = spec.grid(height, width)
    assert (rows - 1) * 4 < height <= rows * 4 and (cols - 1) * 4 < width <= cols * 4
    frame = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    padded = F.pad(frame, (0, 4 * cols - width, 0, 4 * rows - height))
    expected = spec.projection(padded[None])[0].flatten(1).T
    torch.testing.assert_close(spec.embed(spec.patches(frame)), expected)


def test_patches_of_a_view() -> None:
    spec, frame = spec_of(sam()), torch.randn(3, 24, 16)
    other = frame.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(spec.patches(other), spec.patches(frame))


@QUICK
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_windows_give_every_token_its_own_place(rows: int, cols: int, side: int) -> None:
    windows = windows_of((rows, cols), side, CPU)
    assert windows.shape == ((side, side) if side else (rows, cols))
    assert windows.count == (-(-rows // side) * -(-cols // side) if side else 1)
    assert torch.equal(windows.place, windows.window * windows.slots + windows.slot)
    assert torch.equal(windows.token[windows.place], torch.arange(rows * cols))
    assert len(windows.token) == windows.count * windows.slots
    assert int(windows.window.min()) >= 0 and int(windows.window.max()) == windows.count - 1
    assert int(windows.slot.min()) >= 0 and int(windows.slot.max()) < windows.slots
    y, x = torch.arange(rows * cols) // cols, torch.arange(rows * cols) % cols
    height, width = windows.shape
    across = -(-cols // width)
    assert torch.equal(windows.window // across * height + windows.slot // width, y)
    assert torch.equal(windows.window % across * width + windows.slot % width, x)


def test_the_examples_of_index_maps() -> None:
    windows = windows_of((2, 3), 2, CPU)
    assert windows.window.tolist() == [0, 0, 1, 0, 0, 1] and windows.slot.tolist() == [0, 1, 0, 2, 3, 2]
    assert windows.place.tolist() == [0, 1, 4, 2, 3, 6] and windows.token.tolist() == [0, 1, 3, 4, 2, 0, 5, 0]
    assert windows.sort(torch.tensor([5, 4, 2, 0])).tolist() == [0, 4, 2, 5]
    assert relative_places(torch.tensor([0]), torch.tensor([1]), (2, 2)).tolist() == [[1, 0, 5, 4]]


def test_the_example_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventful_det.gating.windows._LEAST_TILE", 2)  # two queries to a tile of four places
    windows = windows_of((2, 3), 2, CPU)
    tiles = Tiles.of(windows.window[torch.tensor([0, 1, 3, 2])], windows.count, windows.slots)
    assert (tiles.count, tiles.size) == (3, 2)
    assert tiles.window is not None and tiles.window.tolist() == [0, 0, 1]
    assert tiles.place.tolist() == [0, 1, 2, 4] and tiles.source.tolist() == [0, 1, 2, 0, 3, 0]
    assert tiles.spread(torch.tensor([7, 8, 9, 6]), 1, 2).tolist() == [[9, 7], [6, 7]]


@QUICK
@given(st.integers(1, 12))
def test_relative_table_of_the_stored_size(size: int) -> None:
    table = torch.randn(2 * size - 1, 3)
    expanded = relative_table(table, size)
    for query in range(size):
        for key in range(size):
            assert torch.equal(expanded[query, key], table[query - key + size - 1])


def test_relative_table_is_resized_linearly() -> None:
    expanded = relative_table(torch.arange(5.0)[:, None], 2)  # 2 * 2 - 1 = 3 entries of 5
    torch.testing.assert_close(expanded[..., 0], torch.tensor([[2.0, 1 / 3], [11 / 3, 2.0]]))


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_relative_bias_of_a_few_queries(rows: int, cols: int, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, rows * cols - 1), max_size=5))
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(len(slots), 2, 3, generator=generator)
    y, x = torch.randn(2 * rows - 1, 3, generator=generator), torch.randn(2 * cols - 1, 3, generator=generator)
    slot = torch.tensor(slots, dtype=torch.long)
    terms = relative_terms(q, relative_places(slot // cols, slot % cols, (rows, cols)), torch.cat([y, x]))
    bias = relative_bias(terms, (rows, cols))
    assert bias.shape == (len(slots), 2, rows * cols)
    for i, slot in enumerate(slots):
        for key in range(rows * cols):
            embedding = y[slot // cols - key // cols + rows - 1] + x[slot % cols - key % cols + cols - 1]
            torch.testing.assert_close(bias[i, :, key], q[i] @ embedding)


def test_positions_are_resized_as_timm_does() -> None:
    positions = torch.randn(10, 10, 24)
    assert torch.equal(resize_positions(positions, (10, 10), antialias=True), positions.flatten(0, 1))
    for grid in [(7, 13), (10, 4), (20, 20)]:
        expected = resample_abs_pos_embed_nhwc(positions[None], list(grid))[0].flatten(0, 1)
        torch.testing.assert_close(resize_positions(positions, grid, antialias=True), expected)


def test_parts_of_a_windowed_network() -> None:
    vit = sam()
    spec = spec_of(vit)
    assert (spec.patch, spec.dim, spec.prefix, spec.dtype) == (4, 24, None, torch.float32)
    assert [block.window for block in spec.blocks] == [4, 0, 4, 0]
    assert spec.blocks[0].layers[0] == (vit.blocks[0].attn.qkv,)
    assert torch.equal(spec.blocks[0].padding_qkv().flatten(), vit.blocks[0].attn.qkv.bias)
    assert not spec_of(sam(qkv_bias=False)).blocks[0].padding_qkv().any()


def test_prefix_tokens_of_plain_networks() -> None:
    assert spec_of(plain(class_token=False, global_pool="avg")).prefix is None
    for changes, tokens in [({}, 1), ({"reg_tokens": 2}, 3), ({"reg_tokens": 2, "no_embed_class": True}, 3)]:
        prefix = spec_of(plain(**changes)).prefix
        assert prefix is not None and prefix().shape == (tokens, 24)
    prefix = spec_of(plain(pos_embed="none")).prefix
    assert prefix is not None and prefix().shape == (1, 24)


def rotary(**changes: Any) -> nn.Module:
    return Eva(img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=2, use_rot_pos_emb=True, **changes)


def gated() -> nn.Module:
    vit = plain()
    vit.blocks[0].attn.gate = nn.Linear(24, 24)
    return vit


def test_rotary_positions_of_a_fixed_grid() -> None:
    eventful = eventify(rotary().eval())
    eventful.step(torch.randn(1, 3, 24, 24), eventful.init_state())
    with pytest.raises(UserError, match=r"fixed grid do not fit 6 x 8 tokens; .*dynamic_img_size=True"):
        eventful.step(torch.randn(1, 3, 24, 32), eventful.init_state())


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet": (lambda: timm.create_model("resnet10t"), "cannot make timm.models.resnet.ResNet eventful; supported: "),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1)),
        "SwinTransformer eventful; supported: timm VisionTransformerSAM, timm VisionTransformer",
    ),
    "linear": (lambda: nn.Linear(2, 2), "supported: "),
    "rope": (lambda: sam(use_rope=True, use_rel_pos=False), "attention with rope"),
    "mixed rope": (lambda: rotary(rope_type="mixed"), "rotary positions of type mixed"),
    "few key heads": (
        lambda: rotary(attn_type="rope", qkv_fused=False, num_kv_heads=1),
        "attention with fewer heads of keys than of queries",
    ),
    "gated attention": (gated, "attention with gate"),
    "post-norm": (lambda: plain(block_fn=ResPostBlock), "a block of type ResPostBlock"),
    "parallel": (lambda: plain(block_fn=ParallelScalingBlock), "a block of type ParallelScalingBlock"),
    "embedding norm": (lambda: plain(embed_norm_layer=nn.LayerNorm), "a norm after the patch embedding"),
    "hybrid": (
        lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1),
        "a patch embedding of type Hybrid",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_networks(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(UserError) as raised:
        spec_of(make())
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_other_unsupported_parts() -> None:
    vit = sam()
    vit.blocks[0].window_size = 5
    with pytest.raises(UserError, match=r"windows of more than one size \(\[4, 5\]\)"):
        spec_of(vit)
    vit = plain()
    vit.patch_embed = PatchEmbed(24, 4, 3, 24)
    vit.patch_embed.proj = nn.Conv2d(3, 24, 4, stride=2)
    with pytest.raises(UserError, match="stride"):
        spec_of(vit)
