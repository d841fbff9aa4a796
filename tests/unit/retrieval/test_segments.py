"""Several indexes as one: against one exact search over all the items."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, unit_vectors
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.segments import SegmentedIndex, is_exact


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return unit_vectors(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


def exact_segments(vectors: np.ndarray, offsets: list[int]) -> SegmentedIndex:
    return SegmentedIndex([ExactIndex(vectors[start:stop]) for start, stop in pairwise(offsets)], offsets)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 45), st.integers(0, 99))
def test_exact_segments_answer_as_one_exact_index(sizes: list[int], k: int, seed: int) -> None:
    vectors, queries = unit(sum(sizes), 8, seed), unit(5, 8, seed + 1)
    index = exact_segments(vectors, np.cumsum([0, *sizes]).tolist())
    ids, cosines = index.search(queries * np.float32(3), k)
    expected_ids, expected = ExactIndex(vectors).search(queries, k)
    assert np.array_equal(ids, expected_ids)
    assert np.allclose(cosines, expected, atol=1e-6)
    assert np.array_equal(np.isneginf(cosines), ids == -1)
    assert (ids.dtype, cosines.dtype) == (np.int32, np.float32)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=5), st.integers(1, 25), st.integers(0, 99))
def test_ties_go_by_item_across_segments(sizes: list[int], k: int, seed: int) -> None:
    """Axes, so that cosines are 0, 1 or -1 whatever the shape of a product."""
    axes = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    vectors = axes[np.random.default_rng(seed).integers(0, 6, sum(sizes))]
    index = exact_segments(vectors, np.cumsum([0, *sizes]).tolist())
    for ours, theirs in zip(index.search(axes, k), ExactIndex(vectors).search(axes, k), strict=True):
        assert np.array_equal(ours, theirs)


class Backwards:
    """Finds every item, equal ones in any order: an engine owes no order among them."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.reversed = ExactIndex(vectors[::-1].copy())
        self.last = len(vectors) - 1

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, cosines = self.reversed.search(queries, k)
        return np.where(ids >= 0, self.last - ids, -1).astype(np.int32), cosines


def test_ties_go_by_item_also_within_a_segment() -> None:
    vectors = np.tile(np.array([[0.0, 1.0]], np.float32), (9, 1))
    index = SegmentedIndex.of([Backwards(vectors[:4]), Backwards(vectors[4:])], [4, 5])
    assert index.search(vectors[:1], 7)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_no_item_at_all_and_no_query_at_all() -> None:
    ids, cosines = exact_segments(unit(0, 4), [0, 0, 0]).search(unit(2, 4), 3)
    assert (ids == -1).all()
    assert np.isneginf(cosines).all()
    ids, cosines = exact_segments(unit(6, 4), [0, 2, 6]).search(unit(0, 4), 3)
    assert ids.shape == cosines.shape == (0, 3)


def test_what_a_scann_segment_does_not_find_is_filled_by_the_others() -> None:
    pytest.importorskip("scann")
    built, added = unit(2000, 16), unit(50, 16, seed=1)
    scann = ScannIndex.build(built, target_recall=0.8, leaves=200)
    scann = ScannIndex(scann.searcher, replace(scann.settings, leaves_to_search=1))
    index = SegmentedIndex.of([ExactIndex(added[:20]), scann, ExactIndex(added[20:])], [20, 2000, 30])
    queries, k = unit(6, 16, seed=2), 100
    alone, _ = scann.search(queries, k)
    assert (alone == -1).any(), "too few leaves are opened for so long a list"
    ids, cosines = index.search(queries, k)
    everything = np.concatenate([added[:20], built, added[20:]])
    for row, scores, query, of_scann in zip(ids, cosines, queries, alone, strict=True):
        real = row >= 0
        assert (np.diff(real.astype(int)) <= 0).all(), "padding comes last"
        assert np.array_equal(real, scores > -np.inf)
        assert np.allclose(scores[real], everything[row[real]] @ query, atol=1e-5)
        wanted = {*range(20), *range(2020, 2050), *(of_scann[of_scann >= 0] + 20).tolist()}
        if len(wanted) <= k:
            assert sorted(row[real].tolist()) == sorted(wanted)
        else:
            assert set(row.tolist()) < wanted


def test_a_new_item_behind_a_built_index_is_found() -> None:
    pytest.importorskip("scann")
    built, added = unit(1000, 16), unit(3, 16, seed=1)
    index = SegmentedIndex.of([ScannIndex.build(built, target_recall=0.9), ExactIndex(added)], [1000, 3])
    assert index.search(np.concatenate([added, built[[7]]]), 1)[0].ravel().tolist() == [1000, 1001, 1002, 7]


@pytest.mark.parametrize("offsets", [[0], [0, 5, 4], [1, 2, 3], [0, 1, 2, 3], []])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    index: DenseIndex = ExactIndex(unit(5, 4))
    with pytest.raises(ValueError, match="for 2 segments, expected one more than these"):
        SegmentedIndex([index, index], offsets)


def test_a_query_is_refused_as_one_index_refuses_it() -> None:
    index = exact_segments(unit(6, 4), [0, 2, 6])
    with pytest.raises(ValueError, match="queries have 3 dimensions, the index has 4"):
        index.search(unit(2, 3), 1)
    with pytest.raises(ValueError, match="query 0 is a zero vector"):
        index.search(np.zeros((1, 4), np.float32), 1)


def test_segments_are_exact_where_all_of_them_are() -> None:
    exact = exact_segments(unit(6, 4), [0, 2, 6])
    assert is_exact(exact)
    assert is_exact(SegmentedIndex.of([exact, ExactIndex(unit(2, 4))], [6, 2]))
    assert not is_exact(SegmentedIndex.of([exact, Backwards(unit(2, 4))], [6, 2]))
