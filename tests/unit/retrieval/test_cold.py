"""Vectors of new items from their words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.cold import TextProjection, _conjugate_gradients, fit_projection
from ctd_scale.retrieval.dense import unit_vectors
from ctd_scale.retrieval.text import TextIndex

ITEMS, DIM, SORTS = 600, 16, 6


def planted(rng: np.random.Generator) -> tuple[Catalogue, np.ndarray, np.ndarray]:
    """Items of six sorts and forty themes; a vector is that of its sort and its theme, and some noise."""
    sorts, themes = rng.integers(0, SORTS, ITEMS), rng.integers(0, 40, ITEMS)
    of_sorts, of_themes = rng.standard_normal((SORTS, DIM)), rng.standard_normal((40, DIM))
    vectors = 2 * of_sorts[sorts] + of_themes[themes] + 0.2 * rng.standard_normal((ITEMS, DIM))
    titles = [f"theme{theme} number{item}" for item, theme in enumerate(themes)]
    catalogue = Catalogue(list(map(str, range(ITEMS))), titles, [f"sort{sort}" for sort in sorts])
    return catalogue, unit_vectors(vectors.astype(np.float32)), unit_vectors(of_sorts.astype(np.float32))


def test_a_new_item_lies_where_its_words_say() -> None:
    catalogue, vectors, of_sorts = planted(np.random.default_rng(0))
    text = TextIndex.build(catalogue)
    trained = np.arange(ITEMS) >= 100
    shuffled = vectors.copy()
    shuffled[~trained] = vectors[np.random.default_rng(1).permutation(100)]  # what is not trained must not count
    projection = fit_projection(text, shuffled, trained, seed=0)
    projected = projection(text.describe(catalogue.titles[:100], catalogue.categories[:100]))
    assert np.allclose(np.linalg.norm(projected, axis=1), 1, atol=1e-5)
    assert (projected * vectors[:100]).sum(axis=1).mean() > 0.9
    assert projection.cosine == pytest.approx((projected * vectors[:100]).sum(axis=1).mean(), abs=0.05)
    unseen = projection(text.describe(["quite another word"], ["sort3"]))
    assert (unseen @ of_sorts.T).argmax() == 3


def test_an_item_of_unknown_words_is_the_mean() -> None:
    catalogue, vectors, _ = planted(np.random.default_rng(0))
    projection = fit_projection(TextIndex.build(catalogue), vectors, np.ones(ITEMS, bool), seed=0)
    (nowhere,) = projection(TextIndex.build(catalogue).describe(["unheard of"], [""]))
    assert np.allclose(nowhere, vectors.mean(axis=0) / np.linalg.norm(vectors.mean(axis=0)), atol=1e-5)


def test_conjugate_gradients_solve_the_normal_equations() -> None:
    catalogue, vectors, _ = planted(np.random.default_rng(2))
    counts = TextIndex.build(catalogue).counts.tocsr()
    dense = counts.toarray().astype(np.float64)
    exact = np.linalg.solve(dense.T @ dense + 3 * np.eye(dense.shape[1]), dense.T @ vectors)
    assert np.allclose(_conjugate_gradients(counts, vectors, 3.0), exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("trained", [1, 2])
def test_few_trained_items_are_enough(trained: int, tmp_path: Path) -> None:
    catalogue, vectors, _ = planted(np.random.default_rng(0))
    text = TextIndex.build(catalogue)
    projection = fit_projection(text, vectors, np.arange(ITEMS) < trained, seed=0)
    projection.save(tmp_path)
    described = text.describe(catalogue.titles[:5], catalogue.categories[:5])
    assert np.array_equal(TextProjection.load(tmp_path)(described), projection(described))
    with pytest.raises(ValueError, match="no item has a training interaction"):
        fit_projection(text, vectors, np.zeros(ITEMS, bool), seed=0)
