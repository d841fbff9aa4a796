"""The best documents of a few words over several windows, against the sum over all documents."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.retrieval.postings import LONG, WINDOW, Postings, best_documents, postings_of

DOCUMENTS = 3 * WINDOW + 1234
WORDS = 60


@pytest.fixture(scope="module")
def postings() -> Postings:
    """From words in nearly every document to words in three; impacts are quarters, so that sums are exact and many are
    the same. Impacts of the first window are larger, and no word is in the last."""
    random = np.random.default_rng(0)
    each = [
        np.sort(random.choice(DOCUMENTS - 1234, max(3, int(0.9 * DOCUMENTS / 1.3**word)), replace=False))
        for word in range(WORDS)
    ]
    ids = np.concatenate(each).astype(np.int32)
    impacts = random.integers(1, 40, len(ids)).astype(np.float32) / 4
    impacts[ids < WINDOW] *= 4
    offsets = np.cumsum([0, *map(len, each)])
    return postings_of(offsets, ids, impacts, DOCUMENTS)


def full_sum(postings: Postings, words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    scores = np.zeros(DOCUMENTS, np.float32)
    for word, count in zip(words, counts, strict=True):
        of_word = slice(postings.offsets[word], postings.offsets[word + 1])
        scores[postings.ids[of_word]] += postings.impacts[of_word] * count
    return scores


def test_the_windows_of_long_words_are_found_beforehand(postings: Postings) -> None:
    lengths = np.diff(postings.offsets)
    assert (postings.rows >= 0).tolist() == (lengths > 4 * LONG).tolist()
    assert 0 < (postings.rows < 0).sum() < WORDS
    for word in np.flatnonzero(postings.rows >= 0):
        of_word = slice(postings.offsets[word], postings.offsets[word + 1])
        ids, impacts, row = postings.ids[of_word], postings.impacts[of_word], postings.rows[word]
        assert postings.starts[row].tolist() == np.searchsorted(ids, WINDOW * np.arange(5)).tolist()
        for window in range(4):
            within = impacts[ids // WINDOW == window]
            assert postings.highest[row, window] == within.max(initial=0)


@pytest.mark.parametrize("limit", [1, 20, 500])
def test_the_list_is_that_of_the_full_sum_ties_by_number(postings: Postings, limit: int) -> None:
    random = np.random.default_rng(limit)
    for _ in range(60):
        words = random.choice(WORDS, random.integers(1, 12), replace=False)
        counts = random.integers(1, 3, len(words)).astype(np.float32)
        ids, sums = best_documents(words, counts, postings, limit)
        scores = full_sum(postings, words, counts)
        best = np.lexsort((np.arange(DOCUMENTS), -scores))[: min(limit, int((scores > 0).sum()))]
        assert ids.tolist() == best.tolist()
        assert sums.tolist() == scores[best].tolist()


def test_more_are_asked_for_than_there_are(postings: Postings) -> None:
    words = np.array([WORDS - 1])
    ids, sums = best_documents(words, np.ones(1, np.float32), postings, 100)
    assert sorted(ids.tolist()) == postings.ids[postings.offsets[-2] :].tolist()
    assert (np.diff(sums) <= 0).all()


def test_a_matrix_without_postings() -> None:
    empty = postings_of(np.zeros(3, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 5)
    ids, sums = best_documents(np.array([0, 1]), np.ones(2, np.float32), empty, 4)
    assert len(ids) == len(sums) == 0
