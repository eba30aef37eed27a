"""Find pictures that show nearly the same thing, so that a split does not put one copy on either side.

``dhash`` makes 64 bits of a picture that survive resizing, recompression and small changes; pictures whose bits
differ in a few places are near duplicates.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_BLOCK = 1024  # rows of the distance matrix held at a time


def dhash(image: NDArray[np.uint8]) -> np.uint64:
    """The difference hash of a picture: where it gets brighter from left to right, on a grid of 8 x 8.

    Args:
        image: ``(h, w)`` grey or ``(h, w, 3)`` RGB.
    """
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = np.asarray(cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA))
    return np.packbits(small[:, 1:] > small[:, :-1]).view(np.uint64)[0]


def distances(first: Hashes, second: Hashes) -> NDArray[np.int64]:
    """The number of bits in which each hash of ``first`` differs from each of ``second``: ``(n, m)``."""
    a, b = _signs(first), _signs(second)
    return ((64 - a @ b.T) / 2).astype(np.int64)


def near_pairs(first: Hashes, second: Hashes, distance: int) -> NDArray[np.intp]:
    """All ``(i, j)``, i < j, such that ``first[i]`` and ``second[j]`` differ in at most ``distance`` bits: ``(k, 2)``.

    Args:
        first: one hash per picture.
        second: the same hashes again, or those of the mirrored pictures in the same order.
        distance: in bits.
    """
    blocks = [np.empty((0, 2), np.intp)]
    for start in range(0, len(first), _BLOCK):
        near = distances(first[start : start + _BLOCK], second[start:]) <= distance
        blocks.append(np.argwhere(np.triu(near, 1)) + start)
    return np.concatenate(blocks)


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.intp]:
    """Label items 0 .. ``count`` - 1 so that two have one label if a chain of pairs leads from one to the other.

    Returns:
        For each item the lowest item of its group.
    """
    parents = list(range(count))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        parents[high] = low
    return np.array([root(i) for i in range(count)], dtype=np.intp)


def group(hashes: Hashes, distance: int) -> NDArray[np.intp]:
    """Label pictures so that near duplicates, and near duplicates of those, have one label (see `connected`)."""
    return connected(len(hashes), near_pairs(hashes, hashes, distance).tolist())


def _signs(hashes: Hashes) -> NDArray[np.float32]:
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8)).reshape(-1, 64)
    return 1 - 2 * bits.astype(np.float32)
