"""What a request wants to be seen more, or less: the scores of some items times a factor.

    s_j * f_j where s_j > 0, else s_j / f_j

so that a factor above 1 never lowers an item, as a match of a text never does. Among items of one factor the order is
that of s. Hence the k nearest items of every factor together hold the k best by a boosted cosine; those of the smallest
factor are among the k nearest of all, or k items that are as near or nearer and boosted no less are before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.hybrid import HybridRetriever


@dataclass(frozen=True)
class Boosts:
    """Items (ascending, each once) with a factor above 0; all others have 1."""

    items: Int32[ndarray, "boosted"]
    factors: Float32[ndarray, "boosted"]

    def of(self, ids: Int32[ndarray, "pool"]) -> Float32[ndarray, "pool"]:
        """The factor of each of these items; 1 at padding."""
        place = np.minimum(np.searchsorted(self.items, ids), len(self.items) - 1)
        return np.where(self.items[place] == ids, self.factors[place], np.float32(1))

    def apart(self, items: int) -> Iterator[Int32[ndarray, "_"]]:
        """For each factor but the smallest, all the items of a catalogue that have another."""
        factors = np.ones(items, np.float32)
        factors[self.items] = self.factors
        for factor in np.unique(factors)[1:]:
            yield np.flatnonzero(factors != factor).astype(np.int32)


def boosted_scores(
    scores: Float32[ndarray, "*shape"], factors: Float32[ndarray, "*shape"]
) -> Float32[ndarray, "*shape"]:
    """Scores times their factors, negative ones divided by them."""
    return np.where(scores > 0, scores * factors, scores / factors)


def factors_of(boosts: Sequence[Boosts | None], ids: Int32[ndarray, "batch pool"]) -> Float32[ndarray, "batch pool"]:
    """The factor of every candidate of its user."""
    ones = np.ones(ids.shape[1], np.float32)
    return np.stack([ones if each is None else each.of(row) for each, row in zip(boosts, ids, strict=True)])


def boosted_pool(
    retriever: HybridRetriever,
    queries: Float32[ndarray, "batch cond_dim"],
    boosts: Sequence[Boosts | None],
    excluded: Sequence[Int32[ndarray, "_"]],
    size: int,
) -> Int32[ndarray, "batch more"]:
    """For each user the `size` nearest allowed items of every factor but the smallest; padded with -1."""
    found = []
    for query, each, out in zip(queries, boosts, excluded, strict=True):
        others = [] if each is None else [np.concatenate([out, more]) for more in each.apart(len(retriever.vectors))]
        nothing: list[ndarray] = [np.zeros(0, np.int32)] * len(others)
        ids = np.zeros(0, np.int32)
        if others:
            ids = retriever.pool(np.repeat(query[None, None], len(others), axis=0), nothing, others, size).reshape(-1)
        found.append(ids[ids >= 0])
    table = np.full((len(found), max(map(len, found), default=0)), -1, np.int32)
    for row, ids in zip(table, found, strict=True):
        row[: len(ids)] = ids
    return table
