"""The hybrid retriever against brute force over the whole catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever, hybrid_scores
from ctd_scale.retrieval.text import TextIndex

NONE = np.empty(0, dtype=np.int32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def random_unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape).astype(np.float32)
    return unit_vectors(vectors.reshape(-1, shape[-1])).reshape(shape)


def retriever(vectors: np.ndarray, pi: float = 0.1, text: TextIndex | None = None) -> HybridRetriever:
    return HybridRetriever(vectors, ExactIndex(vectors), text, pi)


class ShyIndex:
    """Finds only every other item until asked for all: what an approximate engine may do."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.exact = ExactIndex(vectors)
        self.asked: list[tuple[int, int]] = []

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((len(queries), k))
        ids, cosines = self.exact.search(queries, k)
        if k < len(self.exact.vectors):
            ids[:, 1::2], cosines[:, 1::2] = -1, -np.inf
        return ids, cosines


# -- scores --------------------------------------------------------------------------------------------------


def test_the_factor_by_hand() -> None:
    cosines = np.array([0.5, -0.5, 0.0, 0.5, -np.inf], dtype=np.float32)
    matched = np.array([True, True, True, False, True])
    scores = hybrid_scores(cosines, matched, pi=0.25)
    assert scores.dtype == np.float32
    assert np.allclose(scores, [0.625, -0.4, 0.0, 0.5, -np.inf])


@given(st.floats(-1, 1, width=32), st.floats(0, 10))
def test_a_match_never_lowers_a_score(cosine: float, pi: float) -> None:
    cosines = np.array([cosine], dtype=np.float32)
    assert hybrid_scores(cosines, np.array([True]), pi) >= cosines
    assert hybrid_scores(cosines, np.array([False]), pi) == cosines


def test_a_negative_pi_is_refused() -> None:
    with pytest.raises(ValueError, match=r"retrieval\.pi=-0\.1"):
        retriever(np.eye(2, dtype=np.float32), pi=-0.1)


# -- planted truths ------------------------------------------------------------------------------------------


def test_a_withheld_item_equal_to_the_query_ranks_first() -> None:
    vectors = random_unit(np.random.default_rng(0), 500, 16)
    planted = [3, 77, 499]
    ids, scores = retriever(vectors).search(vectors[planted] * np.float32(5), [NONE] * 3, [NONE] * 3, k=4)
    assert ids[:, 0].tolist() == planted
    assert np.allclose(scores[:, 0], 1, atol=1e-6)


@pytest.mark.parametrize("negate", [False, True])
def test_a_match_lifts_exactly_its_item(negate: bool) -> None:
    rng = np.random.default_rng(1)
    vectors = random_unit(rng, 40, 8)
    query = random_unit(rng, 1, 8)
    search = retriever(vectors, pi=0.3).search
    before = dict(zip(*(column[0].tolist() for column in search(query, [NONE], [NONE], k=40)), strict=True))
    item = min(before, key=before.__getitem__) if negate else sorted(before, key=before.__getitem__)[20]
    ids, scores = search(query, [ints(item)], [NONE], k=40)
    after = dict(zip(ids[0].tolist(), scores[0].tolist(), strict=True))
    assert after.pop(item) > before.pop(item)
    assert after == before


def test_a_matched_item_joins_a_list_that_it_is_too_far_away_for() -> None:
    vectors = unit_vectors(np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0.75, 0.25]], dtype=np.float32))
    ids, _ = retriever(vectors, pi=1.0).search(vectors[:1], [ints(3)], [NONE], k=2)
    assert ids.tolist() == [[3, 0]]


def test_excluded_items_never_come_back_even_when_matched() -> None:
    vectors = random_unit(np.random.default_rng(2), 50, 8)
    excluded = [ints(4, 4, 9), np.arange(50, dtype=np.int32)]
    queries = vectors[[4, 9]]
    ids, scores = retriever(vectors).search(queries, [ints(4, 5), ints(9)], excluded, k=50)
    assert set(ids[0].tolist()) == {*range(50), -1} - {4, 9}
    assert (ids[1] == -1).all()
    assert np.isneginf(scores[1]).all()


def test_the_text_of_an_answer_lifts_its_item() -> None:
    titles = ["Heat", "Alien", "Up"]
    text = TextIndex.build(Catalogue(titles, titles, ["crime", "horror", "animation"]))
    vectors = unit_vectors(np.array([[1, 0.1], [1, 0], [1, -0.1]], dtype=np.float32))
    hybrid = retriever(vectors, text=text)
    matches = hybrid.matches(["The user might like animation products, such as Up", ""], limit=5)
    assert [each.tolist() for each in matches] == [[2], []]
    ids, _ = hybrid.search(vectors[[1, 1]], matches, [NONE, NONE], k=1)
    assert ids.tolist() == [[2], [1]]


def test_without_text_nothing_matches() -> None:
    matches = retriever(np.eye(2, dtype=np.float32)).matches(["anything", ""], limit=5)
    assert [each.tolist() for each in matches] == [[], []]


# -- brute force ---------------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, batch, dim = draw(st.integers(1, 30)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    some = st.lists(st.integers(0, items - 1), max_size=40).map(lambda ids: np.array(ids, dtype=np.int32))
    vectors = random_unit(rng, items, dim)
    if draw(st.booleans()):
        vectors = vectors[rng.integers(items, size=items)]  # equal items
    return {
        "vectors": vectors,
        "queries": random_unit(rng, batch, dim) * np.float32(2),
        "matches": [draw(some) for _ in range(batch)],
        "excluded": [draw(some) for _ in range(batch)],
        "k": draw(st.integers(1, 35)),
        "pi": draw(st.sampled_from([0.0, 0.1, 2.0])),
    }


@settings(deadline=None, max_examples=200)
@given(situations())
def test_search_equals_brute_force_over_the_whole_catalogue(given: dict[str, Any]) -> None:
    vectors, k = given["vectors"], given["k"]
    ids, scores = retriever(vectors, given["pi"]).search(given["queries"], given["matches"], given["excluded"], k)
    assert ids.shape == scores.shape == (len(given["queries"]), k)
    for user, query in enumerate(unit_vectors(given["queries"])):
        expected = vectors @ query
        lifted = np.unique(given["matches"][user])
        expected[lifted] = hybrid_scores(expected[lifted], np.ones(len(lifted), dtype=bool), given["pi"])
        allowed = np.setdiff1d(np.arange(len(vectors)), given["excluded"][user])
        best = np.sort(expected[allowed])[::-1][:k]
        real = ids[user, : len(best)]
        assert np.allclose(scores[user, : len(best)], best, atol=1e-6)
        assert np.allclose(expected[real], best, atol=1e-6)
        assert len(np.unique(real)) == len(real)
        assert np.isin(real, allowed).all()
        assert (ids[user, len(best) :] == -1).all()
        assert np.isneginf(scores[user, len(best) :]).all()


@settings(deadline=None)
@given(situations())
def test_a_batch_equals_its_singles(given: dict[str, Any]) -> None:
    hybrid = retriever(given["vectors"], given["pi"])
    pools = hybrid.pool(given["queries"][:, None], given["matches"], given["excluded"], size=given["k"])
    cosines = hybrid.cosines(given["queries"][:, None], pools)
    for user in range(len(pools)):
        one = slice(user, user + 1)
        ids = pools[one, pools[user] >= 0]
        assert np.array_equal(hybrid.cosines(given["queries"][one, None], ids), cosines[one][..., pools[user] >= 0])


@settings(deadline=None)
@given(situations(), st.integers(1, 3))
def test_a_pool_is_the_union_over_its_queries(given: dict[str, Any], per_user: int) -> None:
    vectors, size = given["vectors"], given["k"]
    batch, dim = given["queries"].shape
    queries = random_unit(np.random.default_rng(0), batch, per_user, dim)
    pools = retriever(vectors).pool(queries, given["matches"], given["excluded"], size)
    for user, pool in enumerate(pools):
        allowed = np.setdiff1d(np.arange(len(vectors)), given["excluded"][user])
        wanted = set(given["matches"][user].tolist()) & set(allowed.tolist())
        real = pool[pool >= 0]
        assert real.tolist() == sorted(set(real.tolist()))
        assert (pool[len(real) :] == -1).all()
        assert np.isin(real, allowed).all()
        assert wanted <= set(real.tolist())
        for query in queries[user]:
            # By cosine, not by id: of equal items either may be there.
            nearest = np.sort(vectors[allowed] @ query)[::-1][:size]
            assert np.allclose(np.sort(vectors[real] @ query)[::-1][: len(nearest)], nearest, atol=1e-6)


# -- pool, cosines, rank -------------------------------------------------------------------------------------


def test_who_may_see_few_items_has_those_searched_exactly() -> None:
    vectors = random_unit(np.random.default_rng(3), 64, 8)
    shy = ShyIndex(vectors)
    allowed = np.arange(5, 64, 6)
    excluded = [NONE, np.setdiff1d(np.arange(64), allowed).astype(np.int32)]
    hybrid = HybridRetriever(vectors, shy, None, 0.1)
    pools = hybrid.pool(vectors[:2, None], [NONE, NONE], excluded, size=4)
    assert shy.asked == [(1, 4), (1, 8)], "for the first user alone"
    nearest = allowed[np.argsort(-(vectors[allowed] @ vectors[1]))[:4]]
    assert pools[1].tolist() == sorted(nearest.tolist())
    few = hybrid.search(vectors[:1], [NONE], [np.arange(62, dtype=np.int32)], k=5)[0]
    assert sorted(few[0].tolist()) == [-1, -1, -1, 62, 63]


def test_the_pool_fetches_more_until_enough_are_allowed() -> None:
    vectors = random_unit(np.random.default_rng(3), 64, 8)
    shy = ShyIndex(vectors)
    hybrid = HybridRetriever(vectors, shy, None, 0.1)
    excluded = [NONE, shy.exact.search(vectors[1:2], 30)[0][0]]
    pools = hybrid.pool(vectors[:2, None], [NONE, NONE], excluded, size=4)
    assert [(pool >= 0).sum() for pool in pools] == [4, 4]
    assert not np.isin(pools[1], excluded[1]).any()
    # The second user alone goes on asking, twice as much each time.
    assert shy.asked == [(2, 8), (1, 16), (1, 32), (1, 64)]


def test_a_user_with_nothing_allowed_ends_the_search() -> None:
    vectors = random_unit(np.random.default_rng(4), 20, 4)
    everything = np.arange(20, dtype=np.int32)
    pools = HybridRetriever(vectors, ShyIndex(vectors), None, 0.1).pool(
        vectors[:1, None], [everything], [everything], size=3
    )
    assert pools.shape == (1, 0)


def test_cosines_are_exact_and_padding_is_out_of_reach() -> None:
    rng = np.random.default_rng(5)
    vectors, queries = random_unit(rng, 20, 4), random_unit(rng, 2, 3, 4)
    ids = np.array([[0, 5, 19], [7, -1, -1]], dtype=np.int32)
    cosines = retriever(vectors).cosines(queries * np.float32(9), ids)
    assert cosines.shape == (2, 3, 3)
    assert np.allclose(cosines[0], queries[0] @ vectors[ids[0]].T, atol=1e-6)
    assert np.isneginf(cosines[1, :, 1:]).all()


def test_rank_sorts_by_score_then_index_and_drops_what_is_masked() -> None:
    hybrid = retriever(random_unit(np.random.default_rng(6), 20, 4), pi=0.5)
    ids = np.array([[9, 2, 4, 1, -1]], dtype=np.int32)
    scores = np.array([[0.4, 0.2, 0.4, -np.inf, 0.9]], dtype=np.float32)
    best_ids, best = hybrid.rank(ids, scores, [ints(2, 2)], k=6)
    assert best_ids.tolist() == [[4, 9, 2, -1, -1, -1]]
    assert np.allclose(best[0, :3], [0.4, 0.4, 0.3])
    assert np.isneginf(best[0, 3:]).all()


def test_padding_is_not_taken_for_the_match_of_the_user_before() -> None:
    hybrid = retriever(random_unit(np.random.default_rng(7), 5, 4))
    ids = np.array([[4], [-1]], dtype=np.int32)
    best_ids, _ = hybrid.rank(ids, np.ones((2, 1), dtype=np.float32), [ints(4), NONE], k=1)
    assert best_ids.tolist() == [[4], [-1]]


@pytest.mark.parametrize("bad", [-1, 5])
def test_indices_outside_the_catalogue_are_refused(bad: int) -> None:
    vectors = random_unit(np.random.default_rng(8), 5, 4)
    with pytest.raises(ValueError, match=r"excluded spans .* expected item indices in \[0, 5\)"):
        retriever(vectors).search(vectors[:1], [NONE], [ints(bad)], k=1)


def test_one_list_per_user_is_required() -> None:
    vectors = random_unit(np.random.default_rng(9), 5, 4)
    with pytest.raises(ValueError, match="matches has 1 lists, expected one for each of the 2 users"):
        retriever(vectors).search(vectors[:2], [NONE], [NONE, NONE], k=1)
