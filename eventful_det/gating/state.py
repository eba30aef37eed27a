"""What is remembered of a stream between frames, typed dataclasses of tensors, and what a step hands on.

State belongs to the caller. A `step` updates it in place; nothing else does, and no output aliases it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor

from eventful_det.errors import UserError
from eventful_det.gating.macs import Macs
from eventful_det.gating.windows import Grid

T = TypeVar("T", bound="TensorTree")
S = TypeVar("S", bound="TensorTree")


class TensorTree:
    """Base of state dataclasses, whose fields are tensors, numbers, trees, or tuples and lists of these."""

    _kinds: ClassVar[dict[str, type[TensorTree]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        TensorTree._kinds[cls.__name__] = cls

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the tree."""
        yield from _leaves(self)

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors of the tree."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def map(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """A new tree with `function` applied to every tensor."""
        return _map(self, function)

    def to(self: T, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> T:
        """An independent copy on another device or of another dtype; integer tensors keep theirs."""

        def move(tensor: Tensor) -> Tensor:
            own = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            return tensor.to(tensor.device if device is None else device, own, copy=True)

        return self.map(move)

    def clone(self: T) -> T:
        """An independent copy."""
        return self.map(Tensor.clone)

    def plain(self) -> dict[str, object]:
        """The tree as dictionaries, lists and tensors only, as `torch.load(weights_only=True)` accepts."""
        return _plain(self)

    @staticmethod
    def from_plain(data: dict[str, object]) -> TensorTree:
        """The inverse of `plain`."""
        return cast(TensorTree, _from_plain(data))


@dataclasses.dataclass
class StreamState(TensorTree):
    """What every update rule remembers of one stream.

    Attributes:
        layout: of the rule that it was made for.
        grid: token grid (H, W), N = H * W.
        frame: frames since the last flush; 0 = the next frame is a flush.
    """

    layout: tuple[str | int, ...]
    grid: Grid
    frame: int = dataclasses.field(default=0, kw_only=True)


@dataclasses.dataclass
class State(TensorTree, Generic[S]):
    """The states of B streams that share model calls; each stream has its own, or None before its first frame."""

    streams: list[S | None]

    def __len__(self) -> int:
        return len(self.streams)

    def select(self, indices: Sequence[int]) -> State[S]:
        """The state of some of the streams; shared with, not copied from, this one."""
        return State([self.streams[i] for i in indices])

    def reset(self, indices: Sequence[int] | None = None) -> None:
        """Forget some streams (all by default): their next frame is a flush."""
        for i in range(len(self.streams)) if indices is None else indices:
            self.streams[i] = None

    def save(self, path: str | Path) -> None:
        """Write the state to a file that holds tensors and plain containers only."""
        torch.save({"format": "eventful-state/1", "state": self.plain()}, path)

    @staticmethod
    def load(path: str | Path) -> State[T]:
        """Read a file written by `save`.

        Raises:
            UserError: the file is not such a file.
        """
        try:
            data = torch.load(path, weights_only=True)
            if data["format"] != "eventful-state/1":
                raise KeyError(data["format"])
            return cast(State[T], State.from_plain(data["state"]))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} is not a stream state written by State.save ({type(error).__name__})") from error


@dataclasses.dataclass(frozen=True)
class Update:
    """The token map of a frame and what changed in it.

    Attributes:
        tokens: `(H, W, C)` the full map. `EventfulViT.step` gives a copy; a rule, its own buffer, valid until the
            stream's next step and not to be written. The same holds for `prefix`.
        prefix: `(p, C)` class and register tokens, recomputed whenever a token is; None = the network has none.
        changed: `(r,)` flat indices of the tokens whose value may differ from the last frame's.
        work: `(N,)` share of its token-wise work that each token had done, 0 to 1.
        flush: whether everything was recomputed because the stream began anew.
        macs: what it took.
    """

    tokens: Tensor
    prefix: Tensor | None
    changed: Tensor
    work: Tensor
    flush: bool
    macs: Macs


def _leaves(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, TensorTree):
        for field in dataclasses.fields(node):  # type: ignore[arg-type]
            yield from _leaves(getattr(node, field.name))
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _leaves(item)


def _map(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, TensorTree):
        values = {f.name: _map(getattr(node, f.name), function) for f in dataclasses.fields(node)}  # type: ignore[arg-type]
        return dataclasses.replace(node, **values)  # type: ignore[type-var]
    if isinstance(node, (list, tuple)):
        return type(node)(_map(item, function) for item in node)
    return node


def _plain(node: Any) -> Any:
    if isinstance(node, TensorTree):
        values = {f.name: _plain(getattr(node, f.name)) for f in dataclasses.fields(node)}  # type: ignore[arg-type]
        return {"kind": type(node).__name__, "values": values}
    if isinstance(node, (list, tuple)):
        return {"kind": type(node).__name__, "values": [_plain(item) for item in node]}
    return node


def _from_plain(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    kind, values = node["kind"], node["values"]
    if kind in ("list", "tuple"):
        items = [_from_plain(item) for item in values]
        return items if kind == "list" else tuple(items)
    if kind not in TensorTree._kinds:
        raise UserError(f"unknown kind of state {kind!r}; known kinds: {', '.join(sorted(TensorTree._kinds))}")
    return TensorTree._kinds[kind](**{name: _from_plain(value) for name, value in values.items()})
