"""Calibration: what it measures is what is served, and it finds the planted weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_pools import RANKINGS, USERS, errors_of, pool_of, step, users

from ctd_scale.batches import Ranking
from ctd_scale.calibrate import ScoredPool, cheapest_as_good, choose_rankings, graph_unit, pool_gains, pool_ndcg
from ctd_scale.config import RunConfig
from ctd_scale.metrics import ranks_in_lists


def scored(seed: int, texts: list[str], targets: list[int]) -> ScoredPool:
    retrieve = step(seed)
    _, draws, _ = users(seed)
    pool = pool_of(retrieve, seed, texts)
    return ScoredPool(pool, errors_of(pool, seed), draws, np.arange(USERS), np.array(targets), texts)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_calibration_measures_the_list_that_is_served(ranking: Ranking) -> None:
    pools = [scored(seed, ["", "word3", "word8", "word20"], [5, 3, 8, 30]) for seed in range(6)]
    gains: list[Any] = []
    for seed, each in enumerate(pools):
        ids, _ = step(seed).rank(each.pool, each.errors, ranking, 10)
        ranks = ranks_in_lists(ids, each.targets)
        gains.append(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0))
    assert pool_ndcg(pools, ranking) == pytest.approx(float(np.concatenate(gains).mean()))
    assert pool_ndcg(pools, ranking) > 0


def known_pools(kind: str) -> list[ScoredPool]:
    """Targets that only one term knows: the item with the least error, or the nearest to the preference or draws."""
    found = []
    for seed in range(8):
        each = scored(seed, [""] * USERS, [0] * USERS)
        terms = {
            "preference": each.pool.cosines,
            "graph": each.pool.graph_scores,
            "draws": each.pool.draw_scores,
            "error": -each.errors,
        }
        known = np.where(each.pool.ids >= 0, terms[kind], -np.inf).argmax(axis=1)
        found.append(replace(each, targets=each.pool.ids[np.arange(USERS), known]))
    return found


def test_calibration_finds_the_planted_weight() -> None:
    rankings, ndcg = choose_rankings(known_pools("error"), RunConfig())
    assert rankings["fused_error"] == Ranking(1.0, 0.0, 4.0)
    assert rankings["full"].error == 4.0, "the largest weight on offer"
    assert rankings["error"] == Ranking(0.0, 0.0, 1.0)
    assert ndcg["error"] == 1
    assert ndcg["full"] > ndcg["fused_draws"] >= ndcg["preference"]
    rankings, ndcg = choose_rankings(known_pools("draws"), RunConfig())
    assert rankings["fused_draws"] == Ranking(1.0, 4.0, 0.0)
    assert rankings["full"].draws == 4.0
    pools = known_pools("graph")
    rankings, ndcg = choose_rankings(pools, RunConfig())
    assert rankings["fused_graph"] == Ranking(1.0, 0.0, 0.0, graph=4.0 * graph_unit(pools))
    assert rankings["full"] == rankings["fused_graph"], "nothing that costs more is better"
    assert ndcg["graph"] == 1
    rankings, ndcg = choose_rankings(known_pools("preference"), RunConfig())
    assert ndcg["preference"] == 1
    assert rankings["full_text"] == Ranking(1.0, 0.0, 0.0, pi=0.0), "of equals, the smallest weights"


def test_what_is_within_one_standard_error_is_not_paid_for() -> None:
    pools = known_pools("error")
    rankings = [Ranking(1.0, 0.0, weight) for weight in (0.0, 1.0, 4.0, 16.0, 64.0, 65.0)]
    gains = np.stack([pool_gains(pools, ranking) for ranking in rankings])
    best = gains[gains.mean(axis=1).argmax()]
    error = (best - gains).std(axis=1) / np.sqrt(gains.shape[1])
    (close,) = np.nonzero((best - gains).mean(axis=1) <= error)
    assert 0 < close[0] < 5, "neither the cheapest nor the best"
    assert cheapest_as_good(pools, rankings) == rankings[close[0]]
