"""Exact dense search against a plain sort."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.retrieval.dense import ExactIndex, unit_vectors


def random_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def test_unit_vectors_have_length_one_and_are_made_once() -> None:
    unit = unit_vectors(random_vectors(50, 8) * np.float32(7))
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert unit_vectors(unit) is unit


def test_tiny_and_huge_vectors_keep_their_direction() -> None:
    vectors = np.array([[3e-30, 4e-30], [3e30, 4e30]], dtype=np.float32)
    assert np.allclose(unit_vectors(vectors), [[0.6, 0.8], [0.6, 0.8]])


@pytest.mark.parametrize(("value", "problem"), [(0, "zero"), (np.nan, "NaN"), (np.inf, "NaN or infinity")])
def test_a_vector_without_direction_is_refused_by_name(value: float, problem: str) -> None:
    vectors = random_vectors(10, 4)
    vectors[7] = value
    with pytest.raises(ValueError, match=rf"item 7 .*{problem}"):
        ExactIndex(vectors)
    with pytest.raises(ValueError, match="query 7"):
        ExactIndex(random_vectors(10, 4)).search(vectors, 3)


@pytest.mark.parametrize("chunk_items", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [0, 1, 10, 100, 130])
def test_exact_search_equals_a_full_sort(chunk_items: int, k: int) -> None:
    vectors, queries = random_vectors(100, 8), random_vectors(20, 8, seed=1)
    ids, cosines = ExactIndex(vectors, chunk_items).search(queries, k)
    expected = unit_vectors(queries) @ unit_vectors(vectors).T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    found = min(k, 100)
    assert np.array_equal(ids[:, :found], order)
    assert np.allclose(cosines[:, :found], np.take_along_axis(expected, order, axis=1), atol=1e-6)
    assert (ids[:, found:] == -1).all()
    assert np.isneginf(cosines[:, found:]).all()


def test_exact_search_breaks_ties_by_index_across_chunks() -> None:
    vectors = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (9, 1))
    ids, _ = ExactIndex(vectors, chunk_items=2).search(vectors[:1], 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("order", [1, -1])
def test_exact_search_looks_only_at_what_may_still_be_near(order: int) -> None:
    """Items that get nearer and nearer, or farther, every two alike, over many chunks behind the first."""
    angles = np.repeat(np.linspace(0, 3, 10_000), 2)[::order]
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = random_vectors(6, 2)
    ids, _ = ExactIndex(vectors, chunk_items=5000).search(queries, 9)
    expected = unit_vectors(queries) @ unit_vectors(vectors).T
    assert np.array_equal(ids, np.argsort(-expected, axis=1, kind="stable")[:, :9])


def test_an_empty_batch_is_answered() -> None:
    ids, cosines = ExactIndex(random_vectors(5, 4)).search(np.empty((0, 4), dtype=np.float32), 3)
    assert ids.shape == cosines.shape == (0, 3)


def test_queries_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="queries have 3 dimensions, the index has 4"):
        ExactIndex(random_vectors(5, 4)).search(random_vectors(2, 3), 1)
