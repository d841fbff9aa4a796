"""Negatives come from the distribution that is said, and the correction is that distribution's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler

USERS, ITEMS = 400, 12


def popular_items() -> BipartiteGraph:
    """Item i has about i + 1 in 60 of the users; the last user has nothing."""
    share = (np.arange(ITEMS) + 1) / 60
    pairs = np.argwhere(np.random.default_rng(0).random((USERS - 1, ITEMS)) < share)
    return BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], USERS, ITEMS)


@pytest.mark.parametrize(
    ("kind", "exponent"), [("uniform", 0.0), ("popularity", 0.5), ("popularity", 1.0), ("in_batch", 1.0)]
)
def test_negatives_follow_their_distribution(kind: Any, exponent: float) -> None:
    graph = popular_items()
    sampler = NegativeSampler(graph, GraphConfig(negatives=kind, popularity_exponent=exponent or 1.0))
    _, positives = graph.edge(np.arange(graph.num_edges))
    nobody = np.full(graph.num_edges, USERS - 1)  # has nothing, so no draw is refused
    weights = graph.degrees[USERS:].astype(float) ** exponent
    q = weights / weights.sum()
    counts, rounds = np.zeros(ITEMS), 40
    for seed in range(rounds):
        negatives, corrections = sampler.draw(nobody, positives, np.random.default_rng(seed))
        counts += np.bincount(negatives - USERS, minlength=ITEMS)
        expected = np.log(q[negatives - USERS]) - np.log(q[positives - USERS])
        np.testing.assert_allclose(corrections, expected, atol=1e-6)
    total = rounds * graph.num_edges
    chi_square = ((counts - total * q) ** 2 / (total * q)).sum()
    assert chi_square < (ITEMS - 1) + 4 * np.sqrt(2 * (ITEMS - 1))


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch"])
def test_negatives_are_no_positives_of_the_user(kind: Any) -> None:
    graph = popular_items()
    users, positives = graph.edge(np.random.default_rng(1).permutation(graph.num_edges)[:500])
    negatives, _ = NegativeSampler(graph, GraphConfig(negatives=kind)).draw(users, positives, np.random.default_rng(2))
    assert (negatives >= USERS).all()
    assert not graph.has_edge(users, negatives).any()
