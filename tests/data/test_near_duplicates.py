"""Near duplicates: the hash keeps what it should keep, and groups are transitive closures."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eventful_det.data.labelling import near_duplicates
from eventful_det.data.labelling.near_duplicates import connected, dhash, distances, group, near_pairs


def picture(seed: int, height: int = 120, width: int = 160) -> NDArray[np.uint8]:
    """Soft random blobs: what a photograph is to a hash of 8 x 8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def apart(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    a, b = (np.array([dhash(image)]) for image in (first, second))
    return int(distances(a, b)[0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_close_and_others_far(seed: int) -> None:
    image = picture(seed)
    smaller = np.asarray(cv2.resize(image, (100, 70), interpolation=cv2.INTER_AREA), np.uint8)
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    darker = (image * 0.7).astype(np.uint8)
    for copy in (smaller, np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8), darker):
        assert apart(image, copy) <= 4
    assert apart(image, picture(seed + 100)) > 15
    assert apart(image, np.ascontiguousarray(image[:, ::-1])) > 15


def test_hash_of_known_pictures() -> None:
    ramp = np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1))
    assert dhash(ramp) == 2**64 - 1
    assert dhash(np.ascontiguousarray(ramp[:, ::-1])) == 0
    assert dhash(np.full((5, 3, 3), 7, np.uint8)) == 0, "smaller than the grid, without any edge"


@st.composite
def close_hashes(draw: st.DrawFn) -> list[int]:
    """A few seeds and variants of them with some bits changed, so that all distances occur."""
    seeds = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    masks = st.lists(st.integers(0, 63), max_size=8).map(lambda bits: sum(1 << bit for bit in set(bits)))
    return draw(st.lists(st.builds(lambda seed, mask: seed ^ mask, st.sampled_from(seeds), masks), max_size=14))


@given(close_hashes(), st.integers(0, 12), st.integers(1, 5))
def test_group_is_the_transitive_closure(values: list[int], distance: int, block: int) -> None:
    hashes = np.array(values, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_BLOCK", block)
        labels = group(hashes, distance)

    reach = [[(a ^ b).bit_count() <= distance for b in values] for a in values]
    for k, i, j in itertools.product(range(len(values)), repeat=3):
        reach[i][j] |= reach[i][k] and reach[k][j]
    assert labels.tolist() == [row.index(True) for row in reach], "the lowest item within reach"


@given(close_hashes(), close_hashes(), st.integers(0, 64))
def test_pairs_between_two_lists(first: list[int], second: list[int], distance: int) -> None:
    count = min(len(first), len(second))
    a, b = np.array(first[:count], np.uint64), np.array(second[:count], np.uint64)
    expected = [
        (i, j) for i, j in itertools.combinations(range(count), 2) if (first[i] ^ second[j]).bit_count() <= distance
    ]
    assert [tuple(pair) for pair in near_pairs(a, b, distance).tolist()] == expected


def test_connected_joins_chains_whatever_their_order() -> None:
    assert connected(6, [(4, 5), (3, 4), (0, 2), (5, 3)]).tolist() == [0, 1, 0, 3, 3, 3]
    assert connected(0, []).tolist() == []
