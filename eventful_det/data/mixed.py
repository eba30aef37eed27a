"""Several training sets mixed by ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eventful_det.data.training_set import Labels, Samples
from eventful_det.errors import UserError

_ROUND = 100  # samples in which the ratio is kept as exactly as whole numbers can


class MixedSet:
    """An endless sequence of samples of several sets, each of which goes through its own epochs.

    Args:
        sets: with the same classes and sizes.
        ratio: samples of each, relative to the others.
        seed: of their order.

    Raises:
        UserError: there is not one positive ratio for each set, or one is less than a hundredth of the whole.
    """

    def __init__(self, sets: Sequence[Samples], ratio: Sequence[float], seed: int = 0) -> None:
        if not sets or len(sets) != len(ratio) or min(ratio) <= 0:
            raise UserError(f"mixing {len(sets)} training sets: expected a positive ratio for each, got {list(ratio)}")
        self.sets, self.seed = list(sets), seed
        ends = np.round(np.cumsum(ratio) / sum(ratio) * _ROUND).astype(int)
        self.turns = np.searchsorted(ends, np.arange(_ROUND), side="right")
        if len(set(self.turns)) < len(sets):
            raise UserError(f"mixing training sets by {list(ratio)}: each needs at least a hundredth of the samples")

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Labels]:
        """Sample n in the size of the given index."""
        n, size = key
        which, place = self.place(n)
        return self.sets[which][(place, size)]

    def size_of_step(self, step: int) -> int:
        """The index of the size that all samples of a step have."""
        return self.sets[0].size_of_step(step)

    def place(self, n: int) -> tuple[int, int]:
        """The set that sample n is of, and its number there."""
        done, turn = divmod(n, _ROUND)
        order: NDArray[np.int64] = np.random.default_rng([self.seed, 5, done]).permutation(self.turns)
        which = int(order[turn])
        before = done * int((self.turns == which).sum()) + int((order[:turn] == which).sum())
        return which, before
