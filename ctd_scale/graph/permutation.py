"""A shuffled order that is computed, not stored: any place of it in constant time and memory."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

ROUNDS = 6
# Multipliers of SplitMix64 (Steele, Lea, Flood 2014).
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permuted(index: Int64[ndarray, "batch"], size: int, seed: tuple[int, ...]) -> Int64[ndarray, "batch"]:
    """Where a pseudo-random permutation of `range(size)` sends each index.

    A Feistel network over the next power of four, applied again to whatever lands outside of the range: it permutes
    its cycles, so what is left is a permutation of the range (cycle walking, Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(seed).integers(0, 2**64, ROUNDS, dtype=np.uint64)
    value = _feistel(index.astype(np.uint64), half, keys)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        walked = _feistel(value[outside], half, keys)
        value[outside] = walked
        outside = outside[walked >= size]
    return value.astype(np.int64)


def _feistel(value: ndarray, half: int, keys: ndarray) -> ndarray:
    """One pass over numbers of `2 * half` bits."""
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> width, value & mask
    for key in keys:
        mixed = (right ^ key) * MIX[0]
        mixed = (mixed ^ (mixed >> np.uint64(29))) * MIX[1]
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << width) | right
