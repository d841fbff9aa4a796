"""Calibration: what it measures is what is served, and it finds the planted weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from small_pools import DIM, DRAWS, ITEMS, NAMES, RANKINGS, USERS, errors_of, pool_of, step, unit, users

from ctd_scale.batches import Catalogue, InteractionLog, Preferences, Ranking
from ctd_scale.calibrate import (
    KINDS,
    ScoredPool,
    calibration_parts,
    calibration_pools,
    choose_rankings,
    first_as_good,
    fitted_ranking,
    number_of_parts,
    pool_gains,
    pool_ndcg,
)
from ctd_scale.candidates import fused_scores
from ctd_scale.config import RunConfig, load_config
from ctd_scale.metrics import ranks_in_lists
from ctd_scale.retrieval.neighbors import count_neighbors


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


def test_of_equal_scores_those_count_that_are_served_first() -> None:
    """As what the graph says of items that nobody chose: counted for the target, such a ranking would look perfect."""
    nothing = Ranking(0.0, 0.0, 0.0)
    each = scored(0, [""] * USERS, [0] * USERS)
    ids, _ = step(0).rank(each.pool, each.errors, nothing, 10)
    for column in range(each.pool.ids.shape[1]):
        targets = each.pool.ids[:, column]
        targets = np.where(targets >= 0, targets, each.pool.ids[:, 0])  # where a pool has fewer
        ranks = ranks_in_lists(ids, targets)
        served = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
        assert pool_gains([replace(each, targets=targets)], nothing) == pytest.approx(served)


def known_pools(kind: str) -> list[ScoredPool]:
    """Targets that only one term knows: the item with the least error, or the nearest to the preference or draws."""
    found = []
    for seed in range(8):
        each = scored(seed, [""] * USERS, [0] * USERS)
        terms = {
            "preference": each.pool.cosines,
            "graph": each.pool.graph_scores,
            "neighbors": each.pool.neighbor_scores,
            "draws": each.pool.draw_scores,
            "error": -each.errors,
        }
        known = np.where(each.pool.ids >= 0, terms[kind], -np.inf).argmax(axis=1)
        found.append(replace(each, targets=each.pool.ids[np.arange(USERS), known]))
    return found


def test_what_one_term_alone_knows_is_found() -> None:
    rankings, ndcg = choose_rankings(known_pools("error"), RunConfig())
    assert rankings["error"] == Ranking(0.0, 0.0, 1.0)
    assert ndcg["error"] == 1
    assert ndcg["fused_error"] > 0.99
    assert ndcg["full"] > 0.98
    assert ndcg["full"] > ndcg["fused_draws"] >= ndcg["preference"]
    rankings, ndcg = choose_rankings(known_pools("draws"), RunConfig())
    assert ndcg["full"] > 0.95
    for term in ("graph", "neighbors"):
        rankings, ndcg = choose_rankings(known_pools(term), RunConfig())
        assert ndcg[term] == 1
        assert ndcg["full"] > 0.95
        assert rankings["full"] == rankings["fused_all"]
    rankings, ndcg = choose_rankings(known_pools("preference"), RunConfig())
    assert ndcg["preference"] == 1
    assert rankings["full"].draws < 0.05 > rankings["full"].error, "the preference says it all"
    assert rankings["full_text"] == rankings["full"], "no text is given"


def drawn_pools(ranking: Ranking, sharpness: float, count: int) -> list[ScoredPool]:
    """Targets drawn from the softmax over a pool of `sharpness` times the ranking's score."""
    found, random = [], np.random.default_rng(0)
    for seed in range(count):
        each = scored(seed, [""] * USERS, [0] * USERS)
        scores = sharpness * fused_scores(each.pool, each.errors, ranking)
        drawn = (scores + random.gumbel(size=scores.shape)).argmax(axis=1)
        found.append(replace(each, targets=each.pool.ids[np.arange(USERS), drawn]))
    return found


def log_probability(pools: list[ScoredPool], ranking: Ranking) -> float:
    """Of the withheld items, at the best of many sharpnesses."""
    found = []
    for sharpness in np.geomspace(0.5, 50, 60):
        total = 0.0
        for each in pools:
            log_probs = log_softmax(sharpness * fused_scores(each.pool, each.errors, ranking), axis=1)
            total += float(log_probs[each.pool.ids == each.targets[:, None]].sum())
        found.append(total)
    return max(found)


def test_the_fit_finds_the_weights_by_which_items_were_drawn() -> None:
    wanted = Ranking(1.0, 0.6, 0.8, graph=0.5, neighbors=0.7)
    found = fitted_ranking(drawn_pools(wanted, 8.0, 300), ("graph", "neighbors", "draws", "error"))
    assert (found.preference, found.pi) == (1.0, 0.0)
    assert (found.graph, found.draws, found.error) == pytest.approx((0.5, 0.6, 0.8), rel=0.25)
    assert found.neighbors == pytest.approx(0.7, rel=0.25)


def test_no_other_weights_make_the_withheld_items_more_probable() -> None:
    pools = drawn_pools(Ranking(1.0, 0.6, 0.8, graph=0.5), 8.0, 30)
    found = fitted_ranking(pools, ("graph", "error"))
    best = log_probability(pools, found)
    for term in ("graph", "error"):
        for factor in (0.8, 1.25):
            other = replace(found, **{term: factor * getattr(found, term)})
            assert log_probability(pools, other) < best, f"{term} times {factor}"


def test_a_term_that_says_nothing_or_the_opposite_weighs_little() -> None:
    pools = drawn_pools(Ranking(1.0, 0.0, 0.0), 8.0, 300)
    found = fitted_ranking(pools, ("graph", "draws", "error"))
    assert max(found.graph, found.draws, found.error) < 0.2
    against = drawn_pools(Ranking(1.0, 0.0, -1.0), 8.0, 30)
    assert fitted_ranking(against, ("error",)) == Ranking(1.0, 0.0, 0.0)


def test_terms_that_are_all_wrong_leave_the_preference() -> None:
    assert fitted_ranking(drawn_pools(Ranking(-1.0, 0.0, -1.0), 8.0, 30), ("error",)) == Ranking(1.0, 0.0, 0.0)


def test_without_a_withheld_item_in_a_pool_the_preference_decides() -> None:
    nowhere = [replace(each, targets=np.full(USERS, -2)) for each in known_pools("error")]
    assert fitted_ranking(nowhere, ("graph", "draws", "error")) == Ranking(1.0, 0.0, 0.0)


def test_what_is_within_one_standard_error_is_not_paid_for() -> None:
    pools = known_pools("error")
    rankings = [Ranking(1.0, 0.0, weight) for weight in (0.0, 1.0, 4.0, 16.0, 64.0, 65.0)]
    gains = np.stack([pool_gains(pools, ranking) for ranking in rankings])
    best = gains[gains.mean(axis=1).argmax()]
    error = (best - gains).std(axis=1) / np.sqrt(gains.shape[1])
    (close,) = np.nonzero((best - gains).mean(axis=1) <= error)
    assert 0 < close[0] < 5, "neither the cheapest nor the best"
    assert first_as_good(pools, rankings) == rankings[close[0]]


def test_what_does_not_rank_better_than_the_preference_is_not_served() -> None:
    """Of the likelihood a term can be worth much and of the first ten nothing: here the graph knows of half of the
    items, but these are the preference's last."""
    pools = []
    for seed, each in enumerate(known_pools("preference")):
        far = np.where(each.pool.ids >= 0, each.pool.cosines, np.inf).argsort(axis=1)[:, :6]
        known = np.take_along_axis(each.pool.graph_scores, far, axis=1).argmax(axis=1)
        targets = each.pool.ids[np.arange(USERS), far[np.arange(USERS), known]]
        pools.append(replace(each, targets=targets) if seed % 2 else each)
    rankings, ndcg = choose_rankings(pools, RunConfig())
    assert rankings["fused_all"].graph > 0
    assert ndcg["fused_all"] < ndcg["preference"]
    assert rankings["full"] == rankings["full_text"] == rankings["preference"]


SHARED, LONELY, EACH = 8, 5, 6  # pairs that several users choose, and that one does


def paired_log(cuts: tuple[int, int] | None = None) -> InteractionLog:
    """What a user chooses for validation follows from the item before it, and is nobody's training interaction."""
    random = np.random.default_rng(0)
    firsts = [*np.repeat(np.arange(SHARED), EACH).tolist(), *range(SHARED, SHARED + LONELY)]
    sequences = [[50 + int(random.integers(10)), first, first + 20, int(random.integers(40, 50))] for first in firsts]
    offsets = 4 * np.arange(len(firsts) + 1, dtype=np.int64)
    catalogue = Catalogue([str(item) for item in range(ITEMS)], NAMES, [""] * ITEMS)
    ids, times = [str(user) for user in range(len(firsts))], np.tile(np.arange(4, dtype=np.int64), len(firsts))
    return InteractionLog(offsets, np.concatenate(sequences).astype(np.int32), ids, catalogue, times, cuts)


def preferences_of(log: InteractionLog) -> Preferences:
    users = log.split_users("validation")
    vectors = unit(np.random.default_rng(1), len(users), DIM)
    return Preferences(users.astype(np.int32), log.targets(users, "validation"), vectors, [""] * len(users))


class Nothing:
    """A denoiser that knows nothing."""

    def latest(self, histories: Any, vectors: Any) -> None:
        return None

    def draws(self, preferences: np.ndarray, latest: None) -> np.ndarray:
        return unit(np.random.default_rng(2), len(preferences), DRAWS, DIM)

    def errors(self, preferences: np.ndarray, candidates: np.ndarray, latest: None) -> np.ndarray:
        return np.zeros(candidates.shape[:2], np.float32)


def pools_as_calibrated(log: InteractionLog, config: RunConfig) -> list[ScoredPool]:
    retrieve, near = step(), count_neighbors(log, log.known_lengths("validation"), config.retrieval.neighbors)
    retrieve = retrieve.over(retrieve.retriever, replace(retrieve.graph, neighbors=near))
    return list(
        calibration_pools(log, calibration_parts(log, preferences_of(log), config), Nothing(), retrieve, config)
    )


def test_weights_are_fitted_with_what_is_known_of_others_at_test_and_no_user_hears_of_its_own_target() -> None:
    log = paired_log()
    pools = pools_as_calibrated(log, RunConfig())
    assert sorted(np.concatenate([each.users for each in pools]).tolist()) == list(range(log.num_users))
    for each in pools:
        said = np.where(each.pool.ids == each.targets[:, None], each.pool.neighbor_scores, 0).max(axis=1)
        lonely = each.users >= SHARED * EACH
        assert not said[lonely].any()
        assert (said[~lonely] > 0).mean() > 0.9, "others chose the same"
    assert fitted_ranking(pools, ("neighbors",)).neighbors > 1
    for settings, other in (("evaluation.know_validation=false", log), ("seed=0", paired_log(cuts=(2, 3)))):
        pools = pools_as_calibrated(other, load_config(overrides=[settings]))
        assert fitted_ranking(pools, ("neighbors",)).neighbors < 0.1, "training alone never saw such a pair"


def test_what_others_choose_at_the_same_time_does_not_decide_where_training_knows_better() -> None:
    """Neighbours know every target when what others chose for validation is counted. By training alone they know
    nothing, or say the opposite of the preference."""

    def pools_of(before: Callable[[ScoredPool], np.ndarray]) -> list[ScoredPool]:
        found = []
        for each in known_pools("preference"):
            told = np.where(each.pool.ids == each.targets[:, None], 1, each.pool.neighbor_scores / 10)
            each = replace(each, pool=replace(each.pool, neighbor_scores=told.astype(np.float32)))
            found.append(replace(each, neighbors_before=np.where(each.pool.ids >= 0, before(each), -np.inf)))
        return found

    trusted, _ = choose_rankings(pools_of(lambda each: np.zeros_like(each.pool.cosines)), RunConfig())
    assert trusted["fused_graph"].neighbors > 0.3
    against = pools_of(lambda each: -each.pool.cosines)
    assert fitted_ranking(against, KINDS["fused_graph"]) == trusted["fused_graph"], "by itself the fit would not know"
    rankings, _ = choose_rankings(against, RunConfig())
    assert rankings["fused_graph"].neighbors == rankings["fused_all"].neighbors == rankings["full"].neighbors == 0


def test_users_are_calibrated_in_parts_of_at_most_a_tenth_of_what_all_chose() -> None:
    log = paired_log()
    preferences, sizes = preferences_of(log), []
    for settings in ("seed=0", "evaluation.calibration_users=12", "evaluation.calibration_users=5"):
        config = load_config(overrides=[settings])
        parts = calibration_parts(log, preferences, config)
        chosen = np.concatenate([part.users for part in parts])
        assert len(np.unique(chosen)) == len(chosen) == min(len(preferences), config.evaluation.calibration_users)
        for part in parts:
            assert part.targets.tolist() == log.targets(part.users.astype(np.int64), "validation").tolist()
            np.testing.assert_array_equal(part.vectors, preferences.vectors[part.users])
        sizes.append(len(parts))
    assert sizes == [10, 3, 1]
    for settings in ("evaluation.know_validation=false", "retrieval.neighbors=0"):
        assert len(calibration_parts(log, preferences, load_config(overrides=[settings]))) == 1
    long = replace(log, items=np.zeros(30_000, np.int32), times=None)
    assert number_of_parts(long, 60, RunConfig()) == 2, "a thousandth of the log may be unknown"
