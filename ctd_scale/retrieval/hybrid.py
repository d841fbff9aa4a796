"""Hybrid retrieval: dense and text candidates, united, rescored exactly and ranked by

    s_ij = cos(y_i, q_j) * (1 + pi * match(Z_i, j))

A match never lowers a score: a negative cosine is divided by the factor instead (method: hybrid retriever).
Since s is never below the cosine, the k nearest items together with all matched items hold the k best of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from numpy import ndarray

from ctd_scale.retrieval.dense import DenseIndex, exact_search, unit_vectors
from ctd_scale.retrieval.grown import GrownVectors
from ctd_scale.retrieval.text import TextIndex


def hybrid_scores(
    cosines: Float32[ndarray, "*shape"], matched: Bool[ndarray, "*shape"], pi: float
) -> Float32[ndarray, "*shape"]:
    """cos * (1 + pi) where matched and cos > 0; cos / (1 + pi) where matched and cos < 0; else cos."""
    factor = np.float32(1 + pi)
    return np.where(matched, np.where(cosines > 0, cosines * factor, cosines / factor), cosines)


@dataclass(frozen=True)
class HybridRetriever:
    """The retriever over unit item vectors [items, cond_dim]; without `text`, nothing ever matches, and what is
    `deleted` never comes back.

    The lists that go in, one array of item indices per user, may be in any order and hold repeats; an index
    outside the catalogue is a ValueError. What comes out is padded with id -1 and score -inf.
    """

    vectors: Float32[ndarray, "items cond_dim"] | GrownVectors
    dense: DenseIndex
    text: TextIndex | None
    pi: float
    deleted: Bool[ndarray, "items"] | None = None

    def __post_init__(self) -> None:
        if not self.pi >= 0:
            raise ValueError(f"retrieval.pi={self.pi}, expected >= 0: a match must never lower a score")

    @cached_property
    def _gone(self) -> int:
        """How many items are deleted."""
        return 0 if self.deleted is None else int(np.count_nonzero(self.deleted))

    def matches(self, texts: list[str], limit: int) -> list[Int32[ndarray, "matches"]]:
        """The match set of each text, at most `limit` items, best first."""
        if self.text is None:
            return [np.empty(0, dtype=np.int32) for _ in texts]
        found = self.text.matches(texts, limit)
        return found if self.deleted is None else [self._left(*each, limit) for each in zip(texts, found, strict=True)]

    def _left(self, text: str, found: Int32[ndarray, "_"], limit: int) -> Int32[ndarray, "matches"]:
        """What is not deleted of the matches that were found, and of further ones where that is too few."""
        assert self.text is not None
        assert self.deleted is not None
        looked_for = limit
        while True:
            left = found[~self.deleted[found]]
            if len(left) >= limit or len(found) < looked_for:
                return left[: max(0, limit)]
            looked_for *= 2
            (found,) = self.text.matches([text], looked_for)

    def pool(
        self,
        queries: Float32[ndarray, "batch queries cond_dim"],
        matches: Sequence[Int32[ndarray, "_"]],
        excluded: Sequence[Int32[ndarray, "_"]],
        size: int,
    ) -> Int32[ndarray, "batch pool"]:
        """Candidates of each user: the `size` nearest allowed items of every query and the matched items.

        Excluded items never come back. Each item once, sorted by index.
        """
        batch, per_user, dim = queries.shape
        items = len(self.vectors)
        self._check(excluded, batch, "excluded")
        self._check(matches, batch, "matches")
        # Whoever may see only a part of the catalogue (a category) has that part searched, and the others the index.
        narrow = [len(each) + self._gone > items // 2 for each in excluded]
        pairs = [
            user * items + self._among(queries[user], matches[user], excluded[user], size)
            for user in np.flatnonzero(narrow).tolist()
        ]
        excluded, matches = _emptied(excluded, narrow), _emptied(matches, narrow)
        banned = self._pairs(excluded)
        pairs.append(self._pairs(matches))
        wide = np.repeat(np.logical_not(narrow), per_user)
        pending, owner = queries.reshape(-1, dim)[wide], np.repeat(np.arange(batch), per_user)[wide]
        # One search does for most; a user with many excluded items must not make it dearer for everybody.
        k = min(items, size + min(size, max(map(len, excluded), default=0)))
        while len(pending):
            ids, _ = self.dense.search(pending, k)
            found = owner[:, None] * items + ids
            allowed = (ids >= 0) & ~np.isin(found, banned)
            if self.deleted is not None:
                allowed &= ~self.deleted[ids]
            nearest = allowed & (np.cumsum(allowed, axis=1) <= size)
            done = (nearest.sum(axis=1) == size) | (k == items)
            pairs.append(found[nearest & done[:, None]])
            pending, owner, k = pending[~done], owner[~done], min(2 * k, items)
        users, ids = np.divmod(np.setdiff1d(np.concatenate(pairs), banned), items)
        return _padded(users, ids, batch)

    def cosines(
        self, queries: Float32[ndarray, "batch queries cond_dim"], ids: Int32[ndarray, "batch pool"]
    ) -> Float32[ndarray, "batch queries pool"]:
        """Exact cosine of every query to every candidate of its user; -inf at padding."""
        batch, per_user, dim = queries.shape
        unit = unit_vectors(queries.reshape(-1, dim), "query").reshape(queries.shape)
        scores = np.full((batch, per_user, ids.shape[1]), -np.inf, dtype=np.float32)
        # One product per user: gathering all pools at once would hold batch * pool vectors, and padding would
        # let a user's last bits depend on the rest of the batch.
        for user, real in enumerate(ids >= 0):
            scores[user][:, real] = unit[user] @ self.vectors[ids[user, real]].T
        return scores

    def rank(
        self,
        ids: Int32[ndarray, "batch pool"],
        scores: Float32[ndarray, "batch pool"],
        matches: Sequence[Int32[ndarray, "_"]],
        k: int,
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k best candidates after the text factor, descending; equal scores in index order."""
        batch, items = len(ids), len(self.vectors)
        pairs = np.arange(batch)[:, None] * items + ids
        real = ids >= 0
        self._check(matches, batch, "matches")
        matched = real & np.isin(pairs, self._pairs(matches))
        final = np.where(real, hybrid_scores(scores, matched, self.pi), np.float32(-np.inf))
        order = np.lexsort((ids, -final))[:, :k]
        best_ids = np.full((batch, k), -1, dtype=np.int32)
        best = np.full((batch, k), -np.inf, dtype=np.float32)
        best[:, : order.shape[1]] = np.take_along_axis(final, order, axis=1)
        best_ids[:, : order.shape[1]] = np.take_along_axis(ids, order, axis=1)
        best_ids[np.isneginf(best)] = -1
        return best_ids, best

    def search(
        self,
        queries: Float32[ndarray, "batch cond_dim"],
        matches: Sequence[Int32[ndarray, "_"]],
        excluded: Sequence[Int32[ndarray, "_"]],
        k: int,
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k best items of s for one vector per user; over an exact index, exactly those."""
        ids = self.pool(queries[:, None], matches, excluded, size=k)
        return self.rank(ids, self.cosines(queries[:, None], ids)[:, 0], matches, k)

    def _among(
        self,
        queries: Float32[ndarray, "queries cond_dim"],
        matches: Int32[ndarray, "_"],
        excluded: Int32[ndarray, "_"],
        size: int,
    ) -> Int64[ndarray, "candidates"]:
        """The candidates of one user, exactly, from what is left to see."""
        allowed = np.ones(len(self.vectors), dtype=bool) if self.deleted is None else ~self.deleted
        allowed[excluded] = False
        ids, _ = exact_search(self.vectors, unit_vectors(queries, "query"), size, among=np.flatnonzero(allowed))
        return np.concatenate([ids[ids >= 0], matches[allowed[matches]]]).astype(np.int64)

    def _check(self, lists: Sequence[Int32[ndarray, "_"]], batch: int, name: str) -> None:
        items = len(self.vectors)
        if len(lists) != batch:
            raise ValueError(f"{name} has {len(lists)} lists, expected one for each of the {batch} users")
        for ids in lists:
            if len(ids) and not 0 <= ids.min() <= ids.max() < items:
                raise ValueError(f"{name} spans [{ids.min()}, {ids.max()}], expected item indices in [0, {items})")

    def _pairs(self, lists: Sequence[Int32[ndarray, "_"]]) -> Int64[ndarray, "pairs"]:
        """(user, item) as user * items + item: membership for the whole batch is then one look-up."""
        ids = np.concatenate([np.empty(0, dtype=np.int64), *lists])
        users = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
        pairs: Int64[ndarray, "pairs"] = users * len(self.vectors) + ids
        return pairs


def _emptied(lists: Sequence[Int32[ndarray, "_"]], where: Sequence[bool]) -> list[Int32[ndarray, "_"]]:
    return [each[:0] if empty else each for each, empty in zip(lists, where, strict=True)]


def _padded(users: Int64[ndarray, "pairs"], ids: Int64[ndarray, "pairs"], batch: int) -> Int32[ndarray, "batch pool"]:
    """Rows of a table from its sorted (user, id) pairs, filled up with -1."""
    counts = np.bincount(users, minlength=batch)
    table = np.full((batch, counts.max(initial=0)), -1, dtype=np.int32)
    table[users, np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)] = ids
    return table
