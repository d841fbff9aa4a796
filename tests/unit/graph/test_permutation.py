"""The computed order is a permutation, and as good as a drawn one where it matters."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.graph.permutation import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("seed", [(0, 0), (0, 1), (7, 3)])
def test_every_place_comes_once(size: int, seed: tuple[int, ...]) -> None:
    order = permuted(np.arange(size), size, seed)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_a_part_is_that_part_of_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, (1, 2))
    assert np.array_equal(permuted(np.arange(300, 420), 1000, (1, 2)), whole[300:420])
    assert not np.array_equal(permuted(np.arange(1000), 1000, (1, 3)), whole)


@pytest.mark.parametrize("size", [7, 50, 64])
def test_places_and_neighbours_are_uniform(size: int) -> None:
    """Chi-square over many keys: where the first index lands, and how far the second lands from it."""
    draws = 4000
    orders = np.stack([permuted(np.arange(2), size, (key,)) for key in range(draws)])
    first = np.bincount(orders[:, 0], minlength=size)
    gap = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
    for counts in (first, gap):
        expected = draws / len(counts)
        chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        # Mean `freedom`, standard deviation sqrt(2 freedom).
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_a_large_range_needs_no_memory() -> None:
    found = permuted(np.arange(10_000), 10**12, (0,))
    assert len(np.unique(found)) == 10_000
    assert found.min() >= 0
    assert found.max() < 10**12
    assert abs(found.mean() / 10**12 - 0.5) < 0.02
