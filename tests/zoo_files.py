"""State dictionaries as in detectron2's model zoo: its names and shapes, in any width, and its file types."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Zoo:
    """Sizes of a ViTDet; those of ViT-B are the zoo's."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    window: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    image: int = 64  # tokens
    channels: int = 256
    fc: int = 1024
    classes: int = 80
    masks: bool = True
    cascade: bool = False

    def shapes(self) -> Shapes:
        """Every key of the checkpoint."""
        return {**self.backbone(), **self.pyramid(), **self.proposals(), **self.regions()}

    def backbone(self, prefix: str = "backbone.net.", relative: bool = True, tokens: int = 197) -> Shapes:
        """The ViT, with detectron2's names; timm's and MAE's are the same without prefix and relative positions."""
        d, head = self.dim, self.dim // self.heads
        shapes: Shapes = {"pos_embed": (1, tokens, d), "patch_embed.proj.weight": (d, 3, 16, 16)}
        shapes["patch_embed.proj.bias"] = (d,)
        for i in range(self.depth):
            reach = 2 * (self.image if i in self.global_blocks else self.window) - 1
            block: Shapes = {"norm1.weight": (d,), "norm1.bias": (d,)}
            if relative:
                block |= {"attn.rel_pos_h": (reach, head), "attn.rel_pos_w": (reach, head)}
            block |= {"attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,)}
            block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
            block |= {"mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,)}
            block |= {"mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,)}
            shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
        return {prefix + key: shape for key, shape in shapes.items()}

    def pyramid(self) -> Shapes:
        """The simple feature pyramid."""
        d, c = self.dim, self.channels
        shapes: Shapes = {
            "simfp_2.0.weight": (d, d // 2, 2, 2),
            "simfp_2.0.bias": (d // 2,),
            "simfp_2.1.weight": (d // 2,),
            "simfp_2.1.bias": (d // 2,),
            "simfp_2.3.weight": (d // 2, d // 4, 2, 2),
            "simfp_2.3.bias": (d // 4,),
            "simfp_3.0.weight": (d, d // 2, 2, 2),
            "simfp_3.0.bias": (d // 2,),
        }
        for stage, first, width in ((2, 4, d // 4), (3, 1, d // 2), (4, 0, d), (5, 1, d)):
            shapes |= _conv(f"simfp_{stage}.{first}", c, width, 1) | _conv(f"simfp_{stage}.{first + 1}", c, c, 3)
        return {f"backbone.{key}": shape for key, shape in shapes.items()}

    def proposals(self) -> Shapes:
        """The proposal head, of two convolutions."""
        shapes: Shapes = {}
        layers = (("conv.conv0", self.channels, 3), ("conv.conv1", self.channels, 3))
        for name, out, size in (*layers, ("objectness_logits", 3, 1), ("anchor_deltas", 12, 1)):
            shapes |= {f"{name}.weight": (out, self.channels, size, size), f"{name}.bias": (out,)}
        return {f"proposal_generator.rpn_head.{key}": shape for key, shape in shapes.items()}

    def regions(self) -> Shapes:
        """The box heads, and the mask head."""
        c, shapes = self.channels, {}
        for stage in (".0", ".1", ".2") if self.cascade else ("",):
            for i in range(1, 5):
                shapes |= _conv(f"box_head{stage}.conv{i}", c, c, 3)
            shapes |= _linear(f"box_head{stage}.fc1", self.fc, 49 * c)
            shapes |= _linear(f"box_predictor{stage}.cls_score", self.classes + 1, self.fc)
            shapes |= _linear(f"box_predictor{stage}.bbox_pred", 4 * (1 if self.cascade else self.classes), self.fc)
        if self.masks:
            for i in range(1, 5):
                shapes |= _conv(f"mask_head.mask_fcn{i}", c, c, 3)
            shapes |= {"mask_head.deconv.weight": (c, c, 2, 2), "mask_head.deconv.bias": (c,)}
            shapes["mask_head.predictor.weight"] = (self.classes, c, 1, 1)
            shapes["mask_head.predictor.bias"] = (self.classes,)
        return {f"roi_heads.{key}": shape for key, shape in shapes.items()}


def _conv(name: str, out: int, inputs: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, inputs, size, size), f"{name}.norm.weight": (out,), f"{name}.norm.bias": (out,)}


def _linear(name: str, out: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


SMALL = Zoo(dim=48, depth=4, heads=3, window=4, global_blocks=(1, 3), image=8, channels=16, fc=32)


def random_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """A random tensor for every key."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write_zoo_pickle(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A `.pkl` as in the model zoo: NumPy arrays, pickled by a NumPy older than 2."""
    content = {"model": {key: value.numpy() for key, value in tensors.items()}, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(content, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core."))
    return path


def write_training_checkpoint(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A `.pth` as detectron2 writes while training."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"model": tensors, "trainer": {"iteration": 7, "_trainer": {"optimizer": optimizer}}}, path)
    return path


_OFFICIAL_BLOCK = {
    "norm1": "input_layer_norm",
    "attn.qkv": "qkv",
    "attn.rel_pos_h": "relative_position.y_embedding",
    "attn.rel_pos_w": "relative_position.x_embedding",
    "attn.proj": "projection",
    "norm2": "mlp_layer_norm",
    "mlp.fc1": "mlp_1",
    "mlp.fc2": "mlp_2",
}
_OFFICIAL_STAGE = {  # layers in the order of the official code's stages
    "simfp_2": ("0", "1", "", "3", "4", "4.norm", "5", "5.norm"),
    "simfp_3": ("0", "1", "1.norm", "2", "2.norm"),
    "simfp_4": ("0", "0.norm", "1", "1.norm"),
    "simfp_5": ("", "1", "1.norm", "2", "2.norm"),
}


def official_name(key: str) -> str:
    """What the official eventful code's conversion calls a key of detectron2."""
    if key == "backbone.net.pos_embed":
        return "backbone.position_encoding.encoding"
    stem, suffix = (key, "") if "rel_pos" in key else (key.rpartition(".")[0], f".{key.rpartition('.')[2]}")
    if stem == "backbone.net.patch_embed.proj":
        return f"embedding.conv{suffix}"
    if stem.startswith("backbone.net.blocks."):
        number, name = stem.removeprefix("backbone.net.blocks.").split(".", 1)
        return f"backbone.blocks.{number}.{_OFFICIAL_BLOCK[name]}{suffix}"
    if stem.startswith("backbone.simfp_"):
        stage, layer = stem.removeprefix("backbone.").split(".", 1)
        place = _OFFICIAL_STAGE[stage].index(layer)
        return f"pyramid.stages.{list(_OFFICIAL_STAGE).index(stage)}.{place}{suffix}"
    return key


def official_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the official eventful code's conversion makes of a checkpoint of detectron2."""
    tensors = {**tensors, "backbone.net.pos_embed": tensors["backbone.net.pos_embed"][:, 1:]}
    return {official_name(key): value for key, value in tensors.items()}
