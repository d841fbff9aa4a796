"""The candidates of a request, and what is known of each: what there is to rank, before anything is weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.batches import Ranking
from ctd_scale.config import RunConfig
from ctd_scale.retrieval.boosts import Boosts, boosted_pool, boosted_scores, factors_of
from ctd_scale.retrieval.collaborative import CollaborativeRetriever
from ctd_scale.retrieval.effort import with_effort
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.neighbors import nearest, scores_of


@dataclass(frozen=True)
class Pool:
    """Candidates of a batch of users with what is known of them before the denoiser's error."""

    ids: Int32[ndarray, "batch pool"]
    cosines: Float32[ndarray, "batch pool"]
    graph_scores: Float32[ndarray, "batch pool"]
    neighbor_scores: Float32[ndarray, "batch pool"]
    draw_scores: Float32[ndarray, "batch pool"]
    vectors: Float32[ndarray, "batch pool cond_dim"]
    matches: list[Int32[ndarray, "_"]]
    excluded: list[Int32[ndarray, "_"]]
    preferences: Float32[ndarray, "batch cond_dim"]
    # What requests boost; None: nothing.
    factors: Float32[ndarray, "batch pool"] | None = None


class RetrieveStep:
    """Candidates around the preference, the draws and what the graph says, and their final order. `effort` multiplies
    how much of itself an index searches."""

    def __init__(
        self, retriever: HybridRetriever, graph: CollaborativeRetriever, config: RunConfig, effort: float = 1.0
    ) -> None:
        self.retriever = replace(retriever, dense=with_effort(retriever.dense, effort))
        near = replace(graph.retriever, dense=with_effort(graph.retriever.dense, effort))
        self.graph = replace(graph, retriever=near)
        self._config, self._effort = config, effort
        self._tau = config.diffusion.draw_temperature
        self._candidates = config.diffusion.error_candidates
        self._text_candidates = config.retrieval.text_candidates

    def over(self, retriever: HybridRetriever, graph: CollaborativeRetriever) -> RetrieveStep:
        """The same step over another state of the catalogue."""
        return RetrieveStep(retriever, graph, self._config, self._effort)

    def pool(
        self,
        preferences: Float32[ndarray, "batch cond_dim"],
        texts: list[str],
        excluded: list[Int32[ndarray, "_"]],
        *,
        draws: Float32[ndarray, "batch draws cond_dim"] | None,
        histories: Sequence[Int32[ndarray, "_"]] | None,
        boosts: Sequence[Boosts | None] | None = None,
    ) -> Pool:
        """Union of the neighbours of the preference, of every draw, of each history in the graph, of what is chosen
        next to the history's items, of the text's matches, and of the preference among what is boosted. Without draws
        or histories their neighbours are left out, and their scores are 0."""
        matches = self.retriever.matches(texts, self._text_candidates)
        nothing: list[ndarray] = [np.zeros(0, np.int32)] * len(texts)
        ids = self.retriever.pool(preferences[:, None], matches, excluded, self._candidates)
        if draws is not None:
            per_draw = max(1, self._candidates // draws.shape[1])
            ids = _union(ids, self.retriever.pool(draws, nothing, excluded, per_draw))
        said = None
        if histories is not None:
            queries = self.graph.queries(histories)[:, None]
            ids = _union(ids, self.graph.retriever.pool(queries, nothing, excluded, self._candidates))
            if self.graph.neighbors is not None:
                said = self.graph.neighbors.after(histories)
                ids = _union(ids, nearest(said, excluded, self.retriever.deleted, self._candidates))
        if boosts is not None:
            ids = _union(ids, boosted_pool(self.retriever, preferences, boosts, excluded, self._candidates))
        unweighed = np.where(ids >= 0, np.float32(0), np.float32(-np.inf))
        return Pool(
            ids=ids,
            cosines=self.retriever.cosines(preferences[:, None], ids)[:, 0],
            graph_scores=unweighed if histories is None else self.graph.retriever.cosines(queries, ids)[:, 0],
            neighbor_scores=unweighed if said is None else scores_of(said, ids),
            draw_scores=(
                unweighed if draws is None else density_of_draws(self.retriever.cosines(draws, ids), self._tau)
            ),
            vectors=self.retriever.vectors[np.maximum(ids, 0)],
            matches=matches,
            excluded=excluded,
            preferences=preferences,
            factors=None if boosts is None else factors_of(boosts, ids),
        )

    def similar(self, item: int, k: int) -> tuple[Int32[ndarray, "k"], Float32[ndarray, "k"]]:
        """The k items nearest to an item, without itself, by cosine."""
        vector, nothing = self.retriever.vectors[item : item + 1], [np.zeros(0, np.int32)]
        ids, cosines = self.retriever.search(vector, nothing, [np.array([item], np.int32)], k)
        return ids[0], cosines[0]

    def find(self, query: str, k: int) -> Int32[ndarray, "_"]:
        """At most k items whose title or category has words of the query, best first."""
        (found,) = self.retriever.matches([query], k)
        return found

    def rank(
        self,
        pool: Pool,
        errors: Float32[ndarray, "batch pool"] | None,
        ranking: Ranking,
        k: int,
        tail: tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]] | None = None,
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k best: the pool by its fused and boosted score, then, where k is larger, the rest by the preference.

        The list for k is a prefix of the list for any larger k. Padded with -1 / -inf where fewer items exist.
        `tail` is the rest, where it is known already: it is the same for every ranking.
        """
        scores = fused_scores(pool, errors, ranking)
        if pool.factors is not None:
            scores = boosted_scores(scores, pool.factors)
        retriever = replace(self.retriever, pi=ranking.pi)
        width = min(k, pool.ids.shape[1])
        ids, best = retriever.rank(pool.ids, scores, pool.matches, width)
        if k <= width and (ids >= 0).all():
            return ids, best
        tail_ids, tail_scores = tail or self.tail(pool, k)
        floor = np.where(ids >= 0, best, np.inf).min(axis=1, keepdims=True)
        merged_ids = np.concatenate([ids, tail_ids], axis=1)
        merged = np.concatenate([best, np.minimum(tail_scores, floor)], axis=1)
        order = np.argsort(merged_ids < 0, axis=1, kind="stable")[:, :k]  # real ones first, order kept
        return np.take_along_axis(merged_ids, order, 1), np.take_along_axis(merged, order, 1)

    def tail(self, pool: Pool, k: int) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k nearest to the preference of what is not in the pool."""
        known = [np.concatenate([out, row[row >= 0]]) for out, row in zip(pool.excluded, pool.ids, strict=True)]
        nothing: list[ndarray] = [np.zeros(0, np.int32)] * len(pool.ids)
        return self.retriever.search(pool.preferences, nothing, known, k)


def density_of_draws(cosines: Float32[ndarray, "batch draws pool"], tau: float) -> Float32[ndarray, "batch pool"]:
    """`tau * (log-sum-exp over draws of cos / tau - log S)`: a soft maximum, in units of a cosine."""
    peak = cosines.max(axis=1, keepdims=True)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    total = np.exp((cosines - safe) / tau).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.asarray((safe[:, 0] + tau * np.log(total)).astype(np.float32))


def fused_scores(
    pool: Pool, errors: Float32[ndarray, "batch pool"] | None, ranking: Ranking
) -> Float32[ndarray, "batch pool"]:
    """The weighted terms of `Ranking`; -inf at padding."""
    real = pool.ids >= 0
    scores = np.zeros(pool.ids.shape, np.float32)
    if ranking.preference:
        scores += np.float32(ranking.preference) * np.where(real, pool.cosines, 0)
    if ranking.graph:
        scores += np.float32(ranking.graph) * np.where(real, pool.graph_scores, 0)
    if ranking.neighbors:
        scores += np.float32(ranking.neighbors) * np.where(real, pool.neighbor_scores, 0)
    if ranking.draws:
        scores += np.float32(ranking.draws) * np.where(real, pool.draw_scores, 0)
    if ranking.error:
        if errors is None:
            raise ValueError("this ranking weighs the denoiser's error, but no errors were given")
        centre = np.where(real, errors, 0).sum(1, keepdims=True) / np.maximum(real.sum(1, keepdims=True), 1)
        scores -= np.float32(ranking.error) * np.where(real, errors - centre, 0)
    return np.where(real, scores, np.float32(-np.inf))


def _union(left: Int32[ndarray, "batch left"], right: Int32[ndarray, "batch right"]) -> Int32[ndarray, "batch union"]:
    """Per row, each id of both once, ascending, padded with -1."""
    padding = np.full((len(left), 1), -1, np.int32)  # also who may see nothing has a column
    both = np.sort(np.concatenate([padding, left, right], axis=1), axis=1)
    repeated = np.zeros(both.shape, bool)
    repeated[:, 1:] = both[:, 1:] == both[:, :-1]
    both = np.where(repeated, -1, both)
    order = np.argsort(both < 0, axis=1, kind="stable")
    width = max(1, int((both >= 0).sum(axis=1).max(initial=0)))
    return np.take_along_axis(both, order, axis=1)[:, :width]
