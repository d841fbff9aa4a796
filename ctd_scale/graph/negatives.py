"""Negative items for BPR: from which distribution they come, and how the loss is corrected for it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph

# A user who has nearly everything must not stall training: after so many draws a positive may remain.
TRIES = 8


class NegativeSampler:
    """Draws one item node per positive edge, again where the user has it.

    uniform      every item alike
    popularity   q(i) proportional to degree(i)^exponent
    in_batch     a positive item of another edge of the batch, so q(i) proportional to degree(i); nothing more to encode
    """

    def __init__(self, graph: BipartiteGraph, config: GraphConfig) -> None:
        self._graph, self._kind = graph, config.negatives
        exponent = {"uniform": 0.0, "popularity": config.popularity_exponent, "in_batch": 1.0}[config.negatives]
        degrees = graph.degrees[graph.num_users :].astype(np.float64)
        # An item without an edge is never popular; uniform draws take it too.
        weights = degrees**exponent if exponent else np.ones_like(degrees)
        self._cumulative: Float64[ndarray, "items"] = np.cumsum(weights)
        with np.errstate(divide="ignore"):
            self._log_q = np.log(weights / self._cumulative[-1])

    def draw(
        self, users: Int64[ndarray, "batch"], positives: Int64[ndarray, "batch"], random: np.random.Generator
    ) -> tuple[Int64[ndarray, "batch"], Float32[ndarray, "batch"]]:
        """Negatives, and `log q(negative) - log q(positive)` to add to the margin s+ - s-.

        The correction makes the pair a softmax over two candidates whose logits are s - log q (Bengio and Senecal,
        2008); it is 0 for uniform draws.
        """
        negatives = self._candidates(len(users), positives, random)
        for _ in range(TRIES):
            positive = np.flatnonzero(self._graph.has_edge(users, negatives))
            if not len(positive):
                break
            negatives[positive] = self._candidates(len(positive), positives, random)
        first = self._graph.num_users
        correction = self._log_q[negatives - first] - self._log_q[positives - first]
        return negatives, correction.astype(np.float32)

    def _candidates(
        self, count: int, positives: Int64[ndarray, "batch"], random: np.random.Generator
    ) -> Int64[ndarray, "count"]:
        if self._kind == "uniform":
            return random.integers(self._graph.num_users, self._graph.num_nodes, count)
        if self._kind == "in_batch":
            return positives[random.integers(0, len(positives), count)]
        places = random.random(count) * self._cumulative[-1]
        return self._graph.num_users + np.searchsorted(self._cumulative, places, side="right")
