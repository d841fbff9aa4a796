"""What is chosen next to an item, against loops over every pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from ctd_scale.batches import SPLITS, Catalogue, InteractionLog, Split
from ctd_scale.retrieval import neighbors
from ctd_scale.retrieval.neighbors import (
    BACKWARDS,
    EARLIER,
    FADING,
    RECENT,
    WINDOW,
    ItemNeighbors,
    count_neighbors,
    nearest,
    scores_of,
)

ITEMS = 25


def log_of(sequences: list[list[int]], items: int = ITEMS) -> InteractionLog:
    lengths = np.array([len(each) for each in sequences])
    names = [str(item) for item in range(items)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(sequences).astype(np.int32),
        [str(user) for user in range(len(sequences))],
        Catalogue(names, names, [""] * items),
    )


def random_log(seed: int = 0, users: int = 40) -> InteractionLog:
    """Sequences shorter and longer than the window, with repeats; nobody chose the last item."""
    random = np.random.default_rng(seed)
    return log_of([random.integers(0, ITEMS - 1, random.integers(1, 30)).tolist() for _ in range(users)])


def counted(log: InteractionLog, split: Split, count: int) -> ItemNeighbors:
    return count_neighbors(log, log.known_lengths(split), count)


def plain_weights(log: InteractionLog, split: Split) -> np.ndarray:
    """a_ij by the definition."""
    sums = np.zeros((ITEMS, ITEMS))
    for user, known in enumerate(log.known_lengths(split)):
        start = int(log.offsets[user])
        sequence = log.items[start : start + int(known)].tolist()
        for place, first in enumerate(sequence):
            for distance, second in enumerate(sequence[place + 1 : place + 1 + WINDOW], start=1):
                sums[first, second] += FADING ** (distance - 1)
                sums[second, first] += BACKWARDS * FADING ** (distance - 1)
    norm = np.sqrt(sums.sum(axis=1)[:, None] * sums.sum(axis=0)[None])
    return np.divide(sums, norm, out=np.zeros_like(sums), where=norm > 0)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [ITEMS, 4])
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_the_largest_weights_are_kept(block: int, count: int, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "BLOCK", block)
    log = random_log()
    found, expected = counted(log, split, count).weights, plain_weights(log, split)
    assert found.has_sorted_indices
    assert found.nnz > 0
    for row, values in zip(found.toarray(), expected, strict=True):
        kept = np.flatnonzero(row)
        np.testing.assert_allclose(row[kept], values[kept], rtol=1e-6)
        np.testing.assert_allclose(np.sort(row)[-count:], np.sort(values)[-count:], rtol=1e-6)


def test_of_equal_neighbors_the_first_is_kept() -> None:
    log = log_of([[0, 5, 9], [0, 3, 9], [0, 8, 9]])  # by validation each user has one item before its target
    weights = counted(log, "test", 2).weights
    assert weights.indices[weights.indptr[0] : weights.indptr[1]].tolist() == [3, 5]


def test_what_always_follows_is_said_first_and_no_user_hears_of_its_target() -> None:
    random = np.random.default_rng(3)
    pairs = {first: first + 12 for first in range(12)}
    sequences = [[item for first in random.permutation(12)[:6] for item in (first, pairs[first])] for _ in range(60)]
    near = counted(log_of(sequences), "test", 10)
    said = near.after([np.array([first], np.int32) for first in pairs]).toarray()
    assert said.argmax(axis=1).tolist() == list(pairs.values())
    lonely = log_of([[0, 1, 2, 24], [3, 4, 5, 23]])  # the targets of test: nobody else has them
    weights = counted(lonely, "test", 10).weights.toarray()
    assert not weights[:, 23:].any()
    assert not weights[23:].any()
    validation = counted(lonely, "validation", 10).weights.toarray()
    assert weights[1, 2] > 0 == validation[1, 2]


def test_sequences_end_where_the_next_begins() -> None:
    weights = counted(log_of([[0, 1, 7, 7], [2, 3, 7, 7]]), "validation", 10).weights.toarray()
    assert weights[0, 1] > 0 < weights[2, 3]
    assert weights[1, 2] == weights[2, 1] == weights[0, 3] == 0


def test_a_history_is_read_from_its_end() -> None:
    near = counted(random_log(), "test", ITEMS)
    dense = near.weights.toarray().astype(np.float64)
    long = np.arange(RECENT + 5, dtype=np.int32) % 7
    histories = [np.array([3, 1, 3], np.int32), np.zeros(0, np.int32), np.array([ITEMS - 1], np.int32), long]
    said = near.after(histories)
    assert said.has_sorted_indices
    expected = [dense[3] + EARLIER * dense[1], np.zeros(ITEMS), np.zeros(ITEMS)]
    expected.append(sum(EARLIER**ago * dense[long[-1 - ago]] for ago in range(7)))  # older ones are repeats
    np.testing.assert_allclose(said.toarray(), np.sqrt(expected), rtol=1e-5, atol=1e-7)
    # All that is older than the latest so many adds nothing.
    old = np.concatenate([np.full(9, 8), long[:RECENT]]).astype(np.int32)
    np.testing.assert_array_equal(near.after([old]).toarray(), near.after([old[9:]]).toarray())


def test_candidates_and_scores_by_hand() -> None:
    random = np.random.default_rng(1)
    values = random.random((3, ITEMS)).astype(np.float32) * (random.random((3, ITEMS)) < 0.6)
    values[2] = 0
    said = csr_matrix(values)
    excluded = [np.array([1, 4], np.int32), np.zeros(0, np.int32), np.array([0], np.int32)]
    deleted = random.random(ITEMS) < 0.2
    for hidden in (None, deleted):
        found = nearest(said, excluded, hidden, 6)
        for row, ids in enumerate(found):
            allowed = [
                item
                for item in np.flatnonzero(values[row]).tolist()
                if item not in excluded[row] and (hidden is None or not hidden[item])
            ]
            best = sorted(allowed, key=lambda item: (-values[row, item], item))[:6]
            assert ids.tolist() == sorted(best) + [-1] * (6 - len(best))
    ids = np.array([[0, 3, ITEMS - 1, -1], [2, 5, 7, 11], [4, -1, -1, -1]], np.int32)
    expected = np.where(ids >= 0, np.take_along_axis(values, np.maximum(ids, 0), axis=1), -np.inf)
    np.testing.assert_array_equal(scores_of(said, ids), expected)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert ItemNeighbors.load(tmp_path) is None
    near = counted(random_log(), "validation", 5)
    near.save(tmp_path)
    loaded = ItemNeighbors.load(tmp_path)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.weights.toarray(), near.weights.toarray())
    histories = [np.array([3, 1], np.int32)]
    np.testing.assert_array_equal(loaded.after(histories).toarray(), near.after(histories).toarray())
