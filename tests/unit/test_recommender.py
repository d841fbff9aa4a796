"""Candidates, fused scores and final order, against loops and against the whole catalogue."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_pools import DRAWS, ITEMS, RANKINGS, USERS, errors_of, histories, pool_of, step, users

from ctd_scale.batches import Ranking
from ctd_scale.candidates import RetrieveStep, _union, density_of_draws, fused_scores
from ctd_scale.recommender import answers, excluded_items
from ctd_scale.retrieval.boosts import Boosts

# -- parts ---------------------------------------------------------------------------------------------------


@given(
    arrays(np.int32, st.tuples(st.just(3), st.integers(0, 5)), elements=st.integers(-1, 6)),
    arrays(np.int32, st.tuples(st.just(3), st.integers(0, 5)), elements=st.integers(-1, 6)),
)
def test_a_union_is_that_of_sets(left: np.ndarray, right: np.ndarray) -> None:
    united = _union(left, right)
    assert united.dtype == np.int32
    for row, a, b in zip(united, left, right, strict=True):
        real = row[row >= 0].tolist()
        assert real == sorted({*a.tolist(), *b.tolist()} - {-1})
        assert row.tolist() == real + [-1] * (len(row) - len(real))
    assert united.shape[1] == max(1, *((row >= 0).sum() for row in united))


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3)),
        elements=st.floats(-1, 1, width=32),
    ),
    st.floats(0.01, 2),
)
def test_the_density_of_draws_is_a_log_mean_exp(cosines: np.ndarray, tau: float) -> None:
    got = density_of_draws(cosines, tau)
    draws = cosines.shape[1]
    for user in range(cosines.shape[0]):
        for item in range(cosines.shape[2]):
            values = cosines[user, :, item].astype(float)
            total = sum(math.exp((value - values.max()) / tau) for value in values)
            expected = values.max() + tau * (math.log(total) - math.log(draws))
            assert got[user, item] == pytest.approx(expected, abs=1e-5)
            assert values.mean() - 1e-5 <= got[user, item] <= values.max() + 1e-5


def test_padding_has_no_density() -> None:
    cosines = np.full((1, 3, 2), -np.inf, dtype=np.float32)
    cosines[0, :, 0] = [0.1, 0.5, 0.3]
    assert np.isneginf(density_of_draws(cosines, 0.1)[0, 1])
    assert density_of_draws(np.full((1, 7, 1), 0.25, dtype=np.float32), 0.1).item() == pytest.approx(0.25)


def said_after(retrieve: RetrieveStep, seed: int) -> np.ndarray:
    """What is chosen next to the items of each history, of every item."""
    neighbors = retrieve.graph.neighbors
    assert neighbors is not None
    return neighbors.after(histories(seed)).toarray()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_fused_scores_by_hand(ranking: Ranking) -> None:
    preferences, draws, _ = users(0)
    pool = pool_of(step(), 0, ["", "Word3 word7", "", "word20"])
    errors, reading, said = errors_of(pool, 0), step().graph.queries(histories(0)), said_after(step(), 0)
    scores = fused_scores(pool, errors, ranking)
    assert (pool.ids < 0).any(), "the pools must differ in size"
    for user in range(USERS):
        real = [place for place, item in enumerate(pool.ids[user]) if item >= 0]
        mean = sum(float(errors[user, place]) for place in real) / len(real)
        for place, item in enumerate(pool.ids[user]):
            if item < 0:
                assert np.isneginf(scores[user, place])
                continue
            vector = step().retriever.vectors[item]
            cosines = [float(draw @ vector) for draw in draws[user]]
            density = 0.1 * math.log(sum(math.exp(cosine / 0.1) for cosine in cosines) / DRAWS)
            expected = (
                ranking.preference * float(preferences[user] @ vector)
                + ranking.graph * float(reading[user] @ step().graph.retriever.vectors[item])
                + ranking.neighbors * said[user, item]
                + ranking.draws * density
                - ranking.error * (float(errors[user, place]) - mean)
            )
            assert scores[user, place] == pytest.approx(expected, abs=1e-4)


def test_a_ranking_by_error_needs_errors() -> None:
    pool = pool_of(step(), 0, [""] * USERS)
    with pytest.raises(ValueError, match="no errors were given"):
        fused_scores(pool, None, Ranking(1.0, 0.0, 1.0))
    assert np.isfinite(fused_scores(pool, None, Ranking(1.0, 1.0, 0.0))[pool.ids >= 0]).all()


def test_excluded_items_and_answers() -> None:
    history = np.array([3, 1, 3], dtype=np.int32)
    assert [ids.tolist() for ids in excluded_items([history], True)] == [[1, 3]]
    assert [ids.tolist() for ids in excluded_items([history], False)] == [[]]
    (answer,) = answers(np.array([[5, 2, -1]]), np.array([[0.5, 0.25, -np.inf]]), ["so"])
    assert (answer.items, answer.scores, answer.text) == ([5, 2], [0.5, 0.25], "so")


# -- pool ----------------------------------------------------------------------------------------------------


def test_a_pool_holds_the_neighbours_of_preference_draws_and_history_and_the_matches() -> None:
    retrieve = step(candidates=9)
    preferences, draws, excluded = users(1)
    pool = pool_of(retrieve, 1, ["", "word3", "", "word20 word21"])
    readings, said = retrieve.graph.queries(histories(1)), said_after(retrieve, 1)
    vectors = retrieve.retriever.vectors
    for user in range(USERS):
        allowed = np.setdiff1d(np.arange(ITEMS), excluded[user])
        expected = set(allowed[np.argsort(-(vectors[allowed] @ preferences[user]))[:9]].tolist())
        for draw in draws[user]:
            expected |= set(allowed[np.argsort(-(vectors[allowed] @ draw))[: 9 // DRAWS]].tolist())
        near = retrieve.graph.retriever.vectors[allowed] @ readings[user]
        expected |= set(allowed[np.argsort(-near)[:9]].tolist())
        named = allowed[said[user, allowed] > 0]
        expected |= set(named[np.argsort(-said[user, named])[:9]].tolist())
        expected |= set(pool.matches[user].tolist()) - set(excluded[user].tolist())
        assert pool.ids[user][pool.ids[user] >= 0].tolist() == sorted(expected)
        real = pool.ids[user] >= 0
        assert np.array_equal(pool.vectors[user][real], vectors[pool.ids[user][real]])
        assert np.allclose(pool.cosines[user][real], vectors[pool.ids[user][real]] @ preferences[user], atol=1e-6)
    assert [sorted(match.tolist()) for match in pool.matches] == [[], [3], [], [20, 21]]


def test_a_user_who_may_see_nothing_gets_nothing() -> None:
    retrieve = step()
    preferences, draws, _ = users(2)
    everything = [np.arange(ITEMS, dtype=np.int32)] * USERS
    pool = retrieve.pool(preferences, [""] * USERS, everything, draws=draws, histories=histories(2))
    for ranking in RANKINGS:
        ids, scores = retrieve.rank(pool, errors_of(pool, 2), ranking, 5)
        assert (ids == -1).all()
        assert np.isneginf(scores).all()


# -- order ---------------------------------------------------------------------------------------------------


def ranked(seed: int, ranking: Ranking, k: int, texts: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    retrieve = step(seed)
    pool = pool_of(retrieve, seed, texts or ["", "word3", "", "word20"])
    return retrieve.rank(pool, errors_of(pool, seed), ranking, k)


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from(RANKINGS), st.integers(1, ITEMS + 5))
def test_a_list_is_a_prefix_of_every_longer_one(seed: int, ranking: Ranking, k: int) -> None:
    ids, scores = ranked(seed, ranking, k)
    all_ids, all_scores = ranked(seed, ranking, ITEMS + 5)
    assert ids.shape == scores.shape == (USERS, k)
    assert np.array_equal(ids, all_ids[:, :k])
    assert np.allclose(scores, all_scores[:, :k], atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from(RANKINGS))
def test_asked_for_all_every_allowed_item_comes_once_in_order(seed: int, ranking: Ranking) -> None:
    ids, scores = ranked(seed, ranking, ITEMS)
    _, _, excluded = users(seed)
    for row, values, out in zip(ids, scores, excluded, strict=True):
        allowed = sorted(set(range(ITEMS)) - set(out.tolist()))
        assert sorted(row[row >= 0].tolist()) == allowed
        assert (row[len(allowed) :] == -1).all()
        assert np.isneginf(values[len(allowed) :]).all()
        assert (np.diff(values[: len(allowed)]) <= 1e-6).all()


def test_the_list_begins_with_the_pool_in_the_order_of_its_fused_scores() -> None:
    retrieve, ranking = step(3), Ranking(1.0, 0.5, 0.75)
    preferences, _, _ = users(3)
    pool = pool_of(retrieve, 3, [""] * USERS)
    errors = errors_of(pool, 3)
    scores = fused_scores(pool, errors, ranking)
    ids, best = retrieve.rank(pool, errors, ranking, ITEMS)
    for user in range(USERS):
        real = pool.ids[user] >= 0
        order = np.argsort(-scores[user][real], kind="stable")
        size = int(real.sum())
        assert ids[user, :size].tolist() == pool.ids[user][real][order].tolist()
        assert np.allclose(best[user, :size], scores[user][real][order], atol=1e-6)
        # Then the rest of the catalogue by the preference.
        rest = ids[user, size:][ids[user, size:] >= 0]
        cosines = retrieve.retriever.vectors[rest] @ preferences[user]
        assert (np.diff(cosines) <= 1e-6).all()


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from(RANKINGS), st.floats(0, 3), st.integers(0, ITEMS - 1))
def test_a_match_never_lowers_an_item(seed: int, ranking: Ranking, pi: float, item: int) -> None:
    ranking = replace(ranking, pi=pi)
    before, _ = ranked(seed, ranking, ITEMS, [""] * USERS)
    after, _ = ranked(seed, ranking, ITEMS, [f"word{item}"] * USERS)
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        assert (item in new) == (item in old), "a match is no way around an exclusion"
        if item in old:
            assert new.index(item) <= old.index(item)
        # The others keep their order.
        assert [other for other in new if other != item] == [other for other in old if other != item]


def test_a_match_does_raise() -> None:
    before, _ = ranked(5, Ranking(1.0, 0.0, 0.0, pi=3.0), ITEMS, [""] * USERS)
    item = int(before[0, 5])
    after, _ = ranked(5, Ranking(1.0, 0.0, 0.0, pi=3.0), ITEMS, [f"word{item}"] * USERS)
    assert after[0].tolist().index(item) < 5


def test_a_batch_is_its_singles() -> None:
    retrieve, ranking = step(7), RANKINGS[-1]
    texts = ["", "word3", "", "word20"]
    table = np.random.default_rng(0).random((USERS, ITEMS)).astype(np.float32)

    def answer(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        pool = pool_of(retrieve, 7, texts, rows)
        errors = np.take_along_axis(table[rows], np.maximum(pool.ids, 0), axis=1)
        return retrieve.rank(pool, errors, ranking, 30)

    ids, scores = answer(slice(None))
    for user in range(USERS):
        single_ids, single_scores = answer(slice(user, user + 1))
        assert np.array_equal(single_ids[0], ids[user])
        assert np.allclose(single_scores[0], scores[user], atol=1e-5)


# -- boosts --------------------------------------------------------------------------------------------------


def boosts_of(seed: int, factors: list[float]) -> list[Boosts | None]:
    """Of every user but the first, half of the items with one of these factors each."""
    random = np.random.default_rng((seed, 6))
    found: list[Boosts | None] = [None]
    for _ in range(USERS - 1):
        items = np.sort(random.choice(ITEMS, ITEMS // 2, replace=False)).astype(np.int32)
        found.append(Boosts(items, random.choice(factors, len(items)).astype(np.float32)))
    return found


@settings(max_examples=30)
@given(
    st.integers(0, 999),
    st.lists(st.sampled_from([0.01, 0.5, 0.8, 1.2, 1.5, 3.0, 100.0]), min_size=1, max_size=5, unique=True),
    st.integers(1, 9),
)
def test_boosted_preferences_are_ranked_as_the_whole_catalogue(seed: int, factors: list[float], k: int) -> None:
    retrieve, (preferences, _, excluded), boosts = step(seed, candidates=9), users(seed), boosts_of(seed, factors)
    pool = retrieve.pool(preferences, [""] * USERS, excluded, draws=None, histories=None, boosts=boosts)
    ids, scores = retrieve.rank(pool, None, Ranking(1.0, 0.0, 0.0), k)
    for user, each in enumerate(boosts):
        wanted = []
        for item in sorted(set(range(ITEMS)) - set(excluded[user].tolist())):
            score = float(preferences[user] @ retrieve.retriever.vectors[item])
            if each is not None and item in each.items:
                factor = float(each.factors[each.items.tolist().index(item)])
                score = score * factor if score > 0 else score / factor
            wanted.append((-score, item))
        best = sorted(wanted)[:k]
        assert ids[user][ids[user] >= 0].tolist() == [item for _, item in best]
        assert np.allclose(scores[user][ids[user] >= 0], [-score for score, _ in best], rtol=1e-4, atol=1e-5)


def test_a_boost_of_others_changes_nothing_of_mine() -> None:
    retrieve, (preferences, draws, excluded) = step(4), users(4)
    about = {"draws": draws, "histories": histories(4)}
    plain = retrieve.pool(preferences, [""] * USERS, excluded, **about)
    mixed = retrieve.pool(preferences, [""] * USERS, excluded, **about, boosts=boosts_of(4, [2.0]))
    for ranking in RANKINGS:
        (ids, scores), (other, others) = (
            retrieve.rank(each, errors_of(each, 4), ranking, 20) for each in (plain, mixed)
        )
        assert ids[0].tolist() == other[0].tolist()
        assert np.array_equal(scores[0], others[0])
        assert not np.array_equal(ids[1:], other[1:])


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from(RANKINGS), st.floats(1, 5), st.integers(0, ITEMS - 1))
def test_a_boost_never_lowers_and_its_opposite_never_raises(
    seed: int, ranking: Ranking, factor: float, item: int
) -> None:
    retrieve, (preferences, draws, excluded) = step(seed), users(seed)

    def order(given: float) -> list[list[int]]:
        boosts = [Boosts(np.array([item], np.int32), np.array([given], np.float32))] * USERS
        about = {"draws": draws, "histories": histories(seed)}
        pool = retrieve.pool(preferences, [""] * USERS, excluded, **about, boosts=boosts)
        found: list[list[int]] = retrieve.rank(pool, errors_of(pool, seed), ranking, ITEMS)[0].tolist()
        return found

    for plain, higher, lower in zip(order(1.0), order(factor), order(1 / factor), strict=True):
        assert (item in higher) == (item in plain) == (item in lower), "a boost is no way around an exclusion"
        if item in plain:
            assert higher.index(item) <= plain.index(item)
            assert lower.index(item) >= plain.index(item)
