"""Files of tensors: reading them safely, and loading them with every key accounted for.

Nothing here runs what a file says: safetensors hold tensors only, `.pth` files are read with `weights_only=True`,
`.pkl` files by `safe_pickle`.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eventful_det.errors import UserError
from eventful_det.models.safe_pickle import load_pickle

_INNER = ("model", "state_dict")  # where checkpoints keep the weights, beside optimisers and the like


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors of a `.safetensors`, `.pth`, `.pt` or `.pkl` file, and what else it holds.

    Raises:
        UserError: the file is missing, truncated, of another kind, or asks for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), {}
    content = load_pickle(path) if path.suffix == ".pkl" and not zipfile.is_zipfile(path) else _torch_load(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, no named tensors")
    inner = next((key for key in _INNER if isinstance(content.get(key), Mapping)), None)
    tensors = content if inner is None else content[inner]
    strange = [str(key) for key, value in tensors.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange or not tensors:
        raise UserError(f"{path} holds no named tensors: {_some(strange) or 'nothing'} among them is none")
    others = {} if inner is None else {key: value for key, value in content.items() if key != inner}
    return dict(tensors), others


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str, allow: Sequence[str] = ()) -> list[str]:
    """Load tensors into a module, accounting for every key.

    Args:
        module: what to fill.
        tensors: by name.
        source: what errors call the tensors.
        allow: patterns such as "roi_heads.box_predictor.*" of keys that may be missing, unexpected or of another
            shape; these stay as they are, or are left out.

    Returns:
        The allowed keys that were not loaded.

    Raises:
        UserError: other keys are missing or unexpected, or shapes differ; the message lists the first of each.
    """
    own = module.state_dict()
    odd = {
        "missing": sorted(set(own) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(own)),
        "of another shape": [key for key in tensors if key in own and tensors[key].shape != own[key].shape],
    }
    allowed = {key for keys in odd.values() for key in matching(keys, allow)}
    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in ((what, [key for key in keys if key not in allowed]) for what, keys in odd.items())
        if keys
    ]
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(own | {key: value for key, value in tensors.items() if key not in allowed})
    return sorted(allowed)


def matching(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The keys that match one of the patterns (`*` stands for anything)."""
    return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error)
    asked = re.search(r"GLOBAL (\S+)", reason)
    if asked:
        raise UserError(
            f"{path} is refused: it asks for {asked[1]}, but a weights file holds tensors, containers, strings and "
            "numbers only; running it could do anything. Save the weights alone: torch.save(model.state_dict(), ...)"
        )
    cause = reason.rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0]
    raise UserError(f"{path} is not a whole PyTorch file of weights ({cause or 'it is empty'}); download it again")


def _some(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:3])}{', ...' * (len(keys) > 3)}"
