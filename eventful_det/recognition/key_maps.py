"""Names of parameters elsewhere: TAdaConv's and scenic's factorised ViViTs, and what is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eventful_det.errors import UserError

EPIC_VERBS, EPIC_NOUNS = 97, 300
_OTHERS = {
    "vivit.": "the ViViT of Hugging Face attends over all tubelets of a clip at once; it has no steps to make eventful",
    "videomae.": "VideoMAE attends over all tubelets of a clip at once; it has no steps to make eventful",
}
_TADACONV = (  # how names begin there and here
    ("backbone.stem.conv1.", "embedding.conv."),
    ("backbone.cls_token_out", "temporal_model.class_token"),
    ("backbone.cls_token", "spatial_model.class_token"),
    ("backbone.pos_embd", "spatial_model.backbone.position_encoding.encoding"),
    ("backbone.temp_embd", "temporal_model.backbone.position_encoding.encoding"),
    ("backbone.norm_out.", "temporal_model.layer_norm."),
    ("backbone.norm.", "spatial_model.layer_norm."),
    ("backbone.layers_temporal.", "temporal_model.backbone.blocks."),
    ("backbone.layers.", "spatial_model.backbone.blocks."),
    ("head.linear2.", "other_classifiers.noun."),
    ("head.linear1.", "classifier."),
    ("head.linear.", "classifier."),
)
_TADACONV_LAYERS = {
    "norm": "input_layer_norm",
    "attn.to_qkv": "qkv",
    "attn.proj": "projection",
    "norm_ffn": "mlp_layer_norm",
    "ffn.net.0": "mlp_1",
    "ffn.net.3": "mlp_2",
}
_SCENIC_LAYERS = {"LayerNorm_0": "input_layer_norm", "LayerNorm_1": "mlp_layer_norm"}


def refuse_others(tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if the tensors are of a known network without steps."""
    for prefix, reason in _OTHERS.items():
        if any(key.startswith(prefix) for key in tensors):
            raise UserError(f"{reason}; give a factorised ViViT (official eventful, TAdaConv or scenic names)")


def is_tadaconv(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are TAdaConv's names."""
    return "backbone.stem.conv1.weight" in tensors and "backbone.cls_token_out" in tensors


def from_tadaconv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAdaConv's names to ours; other keys stay, and are reported when they are loaded."""
    return {_renamed(key, _TADACONV, _TADACONV_LAYERS): value for key, value in tensors.items()}


def to_tadaconv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to TAdaConv's; a single head becomes `head.linear`, two become `head.linear1` and `head.linear2`."""
    two = any(key.startswith("other_classifiers.") for key in tensors)
    names = [(ours, theirs) for theirs, ours in _TADACONV if theirs != ("head.linear." if two else "head.linear1.")]
    for key in tensors:
        if not key.startswith(tuple(ours for ours, _ in names)):
            raise UserError(f"TAdaConv has no place for {key}; it has one head, or verbs and nouns")
    layers = {ours: theirs for theirs, ours in _TADACONV_LAYERS.items()}
    return {_renamed(key, names, layers): value for key, value in tensors.items()}


def _renamed(key: str, names: Sequence[tuple[str, str]], layers: Mapping[str, str]) -> str:
    """A key whose beginning, and whose layer if it is one of a block, have other names."""
    begin, other = next((pair for pair in names if key.startswith(pair[0])), ("", ""))
    key = other + key.removeprefix(begin)
    if match := re.fullmatch(r"(.*\.(?:blocks|layers|layers_temporal)\.\d+)\.(.+)\.(weight|bias)", key):
        return f"{match[1]}.{layers.get(match[2], match[2])}.{match[3]}"
    return key


def is_scenic(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are scenic's names, joined by dots or slashes."""
    return any(key.endswith("cls_SpatialTransformer") for key in tensors)


def from_scenic(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a flax checkpoint of scenic's factorised ViViT under our names, transposed as torch has them.

    Args:
        tensors: by their path in the tree, joined by dots or slashes.

    Raises:
        UserError: a parameter is missing, or of no known name.
    """
    dotted = {key.replace("/", "."): value for key, value in tensors.items()}
    prefix = next(key for key in dotted if key.endswith("cls_SpatialTransformer")).removesuffix(
        "cls_SpatialTransformer"
    )
    left = {key.removeprefix(prefix): value for key, value in dotted.items() if key.startswith(prefix)}
    try:
        named = {
            "embedding.conv.weight": left.pop("embedding.kernel").permute(4, 3, 0, 1, 2),  # (tt, th, tw, c, D)
            "embedding.conv.bias": left.pop("embedding.bias"),
        }
        for ours, theirs in (("spatial_model", "SpatialTransformer"), ("temporal_model", "TemporalTransformer")):
            named[f"{ours}.class_token"] = left.pop(f"cls_{theirs}")
            positions = left.pop(f"{theirs}.posembed_input.pos_embedding")
            named[f"{ours}.backbone.position_encoding.encoding"] = positions
            named |= _norm(left, f"{theirs}.encoder_norm", f"{ours}.layer_norm")
            depth = len({key.split(".")[1] for key in left if key.startswith(f"{theirs}.encoderblock_")})
            for i in range(depth):
                named |= _scenic_block(left, f"{theirs}.encoderblock_{i}", f"{ours}.backbone.blocks.{i}")
        weight, bias = left.pop("output_projection.kernel").T, left.pop("output_projection.bias")
    except KeyError as error:
        raise UserError(f"this is no factorised ViViT of scenic: it has no {error.args[0]}") from None
    if left:
        raise UserError(f"this is no factorised ViViT of scenic: {next(iter(left))} has no place in it")
    if len(bias) == EPIC_NOUNS + EPIC_VERBS:  # whose two heads are one layer, nouns first
        sizes = [EPIC_NOUNS, EPIC_VERBS]
        named["other_classifiers.noun.weight"], named["classifier.weight"] = weight.split(sizes)
        named["other_classifiers.noun.bias"], named["classifier.bias"] = bias.split(sizes)
    else:
        named |= {"classifier.weight": weight, "classifier.bias": bias}
    return {key: value.contiguous() for key, value in named.items()}


def _norm(left: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": left.pop(f"{theirs}.scale"), f"{ours}.bias": left.pop(f"{theirs}.bias")}


def _scenic_block(left: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    attention, mlp = f"{theirs}.MultiHeadDotProductAttention_0", f"{theirs}.MlpBlock_0"
    parts = ("query", "key", "value")
    named = {
        # kernels (D, heads, d), biases (heads, d)
        f"{ours}.qkv.weight": torch.cat([left.pop(f"{attention}.{part}.kernel").flatten(1).T for part in parts]),
        f"{ours}.qkv.bias": torch.cat([left.pop(f"{attention}.{part}.bias").flatten() for part in parts]),
        f"{ours}.projection.weight": left.pop(f"{attention}.out.kernel").flatten(0, 1).T,  # (heads, d, D)
        f"{ours}.projection.bias": left.pop(f"{attention}.out.bias"),
    }
    for i in (0, 1):
        named[f"{ours}.mlp_{i + 1}.weight"] = left.pop(f"{mlp}.Dense_{i}.kernel").T
        named[f"{ours}.mlp_{i + 1}.bias"] = left.pop(f"{mlp}.Dense_{i}.bias")
    for name, layer in _SCENIC_LAYERS.items():
        named |= _norm(left, f"{theirs}.{name}", f"{ours}.{layer}")
    return named
