"""The official eventful code beside ours: its backbone, with the same weights and the same policy.

Nothing of it is in this repository. A checkout of WISION-Lab/eventful-transformer is read where the user says it
is; its folder is on `sys.path` only while it is imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventful_det.detectors.vitdet.vitdet import WindowedViT
from eventful_det.errors import UserError
from eventful_det.gating.vit_spec import spec_of
from eventful_det.gating.windows import Grid

_PACKAGES = ("eventful_transformer", "utils")  # top-level packages that it imports
_PRODUCTS = ("linear", "matmul", "einsum", "gate")  # of its counts those that are multiply-adds
_STATE = ("p", "b", "product")  # attributes of its modules that outlive a frame

_NAMES = (  # of parameters: ours, theirs
    (r"^pos_embed$", "position_encoding.encoding"),
    (r"\.norm1\.", ".input_layer_norm."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.rel_pos_h$", ".relative_position.y_embedding"),
    (r"\.attn\.rel_pos_w$", ".relative_position.x_embedding"),
    (r"\.attn\.proj\.", ".projection."),
    (r"\.norm2\.", ".mlp_layer_norm."),
    (r"\.mlp\.fc1\.", ".mlp_1."),
    (r"\.mlp\.fc2\.", ".mlp_2."),
)


class OfficialCode:
    """The modules of a checkout.

    Args:
        folder: of the checkout.

    Raises:
        UserError: it is no checkout of the official code, or something that it needs is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder).expanduser().resolve()
        if not (path / "eventful_transformer" / "backbones.py").is_file():
            raise UserError(
                f"peer={folder} holds no eventful_transformer/backbones.py; "
                "give the folder of a checkout of WISION-Lab/eventful-transformer"
            )
        with _importable(path):
            try:
                self.backbones: ModuleType = importlib.import_module("eventful_transformer.backbones")
                self.policies: ModuleType = importlib.import_module("eventful_transformer.policies")
            except ImportError as error:
                raise UserError(f"peer={folder} cannot be imported ({error}); install what it needs") from error


class OfficialBackbone:
    """The official backbone with the parameters of one of ours, which it shares; one stream, in float32.

    Relative positions of global blocks are resized to the grid beforehand, as ours are: the official code resizes
    bicubically where detectron2 and ours do so linearly.

    Args:
        code: the official code.
        net: our backbone.
        grid: tokens (rows, columns) of the frames.
        k: tokens that every gate lets through; None = its dense backbone.
    """

    def __init__(self, code: OfficialCode, net: WindowedViT, grid: Grid, k: int | None = None) -> None:
        self._embed = cast(nn.Conv2d, net.patch_embed.proj)
        self._net = _build(code, net, grid, gated=k is not None)
        self._net.load_state_dict(_parameters(net, grid), assign=True)
        for module in self._net.modules():
            if k is not None and hasattr(module, "policy"):
                module.policy = code.policies.TokenNormTopK(k)

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        """The next normalised frame `(3, h, w)` of the stream; returns tokens `(N, D)`."""
        return self._net(self._embed(frame[None]).flatten(2).transpose(1, 2))[0]

    def count(self, frame: Tensor) -> int:
        """Multiply-adds of the next frame, counted by the official code; the patch embedding, by us."""
        self._net.counting()
        self._net.clear_counts()
        tokens = len(self(frame))
        self._net.no_counting()
        counted = self._net.total_counts()
        return tokens * self._embed.weight.numel() + sum(int(counted.get(f"{kind}_flops", 0)) for kind in _PRODUCTS)

    def reset(self) -> None:
        """Forget the stream: the next frame is a flush."""
        self._net.reset()

    @property
    def state_bytes(self) -> int:
        """Bytes that are remembered of the stream between frames."""
        values = [getattr(module, name, None) for module in self._net.modules() for name in _STATE]
        storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def dense_difference(code: OfficialCode, net: WindowedViT, frame: Tensor) -> float:
    """Largest difference of the dense token maps of a normalised frame `(3, h, w)`, relative to our largest value."""
    ours = net(frame[None])[0].flatten(1).T
    grid = spec_of(net).grid(*frame.shape[-2:])
    return float((OfficialBackbone(code, net, grid)(frame) - ours).abs().max() / ours.abs().max())


def _build(code: OfficialCode, net: WindowedViT, grid: Grid, gated: bool) -> Any:
    """The official backbone in the sizes of ours, without parameters of its own."""
    blocks = spec_of(net).blocks
    windowed = [i for i, block in enumerate(blocks) if block.window]
    with torch.device("meta"):
        return code.backbones.ViTBackbone(
            block_config={
                "dim": blocks[0].dim,
                "heads": blocks[0].heads,
                "mlp_ratio": blocks[0].layers[2][0].out_features // blocks[0].dim,
                "relative_embedding_size": grid,
                "window_size": next((block.window for block in blocks if block.window), None),
            },
            depth=len(blocks),
            position_encoding_size=tuple(net.pos_embed.shape[1:3]),
            input_size=grid,
            block_class="EventfulBlock" if gated else "Block",
            window_indices=windowed,
            windowed_class="EventfulTokenwiseBlock" if gated else "Block",
        ).eval()


def _parameters(net: WindowedViT, grid: Grid) -> dict[str, Tensor]:
    """Our parameters under the official names."""
    parameters = {}
    for name, tensor in net.state_dict().items():
        if name.startswith("patch_embed."):
            continue
        if name == "pos_embed":
            tensor = tensor.flatten(1, 2)
        elif match := re.match(r"blocks\.(\d+)\.attn\.rel_pos_([hw])$", name):
            window = cast(Any, net.blocks[int(match[1])]).window_size
            tensor = _resized(tensor, window or grid["hw".index(match[2])])
        for ours, theirs in _NAMES:
            name = re.sub(ours, theirs, name)
        parameters[name] = tensor
    return parameters


def _resized(table: Tensor, size: int) -> Tensor:
    """A table of relative positions for `size` tokens, `(2 * size - 1, d)`."""
    if len(table) == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T.contiguous()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make a folder's packages importable, and leave no trace of them: "utils" could be anybody's."""
    hidden = _take_modules()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _take_modules()
        sys.modules.update(hidden)


def _take_modules() -> dict[str, ModuleType]:
    """Remove the modules of `_PACKAGES` from those loaded; returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
