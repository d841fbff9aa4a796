"""Ranking in chunks against the plain computation."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ctd_scale import ranking
from ctd_scale.batches import Catalogue, InteractionLog, Split
from ctd_scale.ranking import beyond_accuracy, counted_ranks, load_ranks, rank_targets, save_ranks

USERS, ITEMS = 23, 8


def random_log() -> InteractionLog:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 7, USERS)
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        random.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        [str(user) for user in range(USERS)],
        Catalogue(names, names, [""] * ITEMS),
    )


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("mask_seen", [True, False])
def test_ranks_are_those_of_sorting_every_row(split: Split, mask_seen: bool) -> None:
    """With ties, seen targets and fewer items than places in the list."""
    log, table = random_log(), np.random.default_rng(1).integers(0, 4, (USERS, ITEMS)).astype(np.float32)
    found = rank_targets(log, lambda users, _: table[users], split, mask_seen=mask_seen, chunk_users=5)
    for user, rank, top in zip(log.split_users().tolist(), found.ranks, found.top, strict=True):
        history = log.history(user, split).tolist()
        hidden = set(history) if mask_seen else set()
        target = int(log.targets(np.array([user]), split)[0])
        places = [
            1 + sum(table[user, other] > table[user, target] for other in range(ITEMS) if other not in hidden),
            sum(table[user, other] >= table[user, target] for other in range(ITEMS) if other not in hidden),
        ]
        assert rank == (np.inf if target in hidden else np.mean(places))
        shown = sorted((item for item in range(ITEMS) if item not in hidden), key=lambda item: -table[user, item])
        assert top.tolist() == shown + [-1] * (10 - len(shown))


def test_the_scorer_gets_the_histories_of_its_users_and_its_scores_are_left_alone() -> None:
    log, table = random_log(), np.zeros((USERS, ITEMS), np.float32)

    def scorer(users: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
        for user, history in zip(users.tolist(), histories, strict=True):
            np.testing.assert_array_equal(history, log.history(user, "test"))
        return table[: len(users)]

    rank_targets(log, scorer, "test", mask_seen=True, chunk_users=4)
    assert not table.any()


def test_what_is_shown_is_described_by_the_training_interactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "RARE", 6)
    log, table = random_log(), np.random.default_rng(1).standard_normal((USERS, ITEMS)).astype(np.float32)
    found = rank_targets(log, lambda users, _: table[users], "test", mask_seen=True, chunk_users=5)
    chosen_by = np.zeros((ITEMS, USERS))
    counts = np.zeros(ITEMS)
    for user in range(USERS):
        for item in log.train_sequence(user):
            chosen_by[item, user] = 1
            counts[item] += 1
    cosines, places = [], []
    for row in found.top:
        items = row[row >= 0].tolist()
        places += [np.mean(counts < counts[item]) for item in items]
        for one, other in itertools.combinations(items, 2):
            lengths = np.linalg.norm(chosen_by[one]) * np.linalg.norm(chosen_by[other])
            cosines.append(chosen_by[one] @ chosen_by[other] / lengths if lengths else 0.0)
    targets = log.targets(log.split_users("test"), "test")
    described = beyond_accuracy(log, "test", found)
    assert described["diversity@10"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert described["popularity@10"] == pytest.approx(np.mean(places))
    assert 0 < (counts[targets] < 6).sum() < len(targets)
    assert described["rare_hr@10"] == pytest.approx((found.ranks[counts[targets] < 6] <= 10).mean())


def test_where_no_target_is_rare_none_is_found() -> None:
    names = ["a", "b", "c"]
    log = InteractionLog(
        np.arange(0, 31, 3), np.tile([0, 1, 2], 10).astype(np.int32), list("0123456789"), Catalogue(names, names, names)
    )
    found = rank_targets(log, lambda users, _: np.eye(10, 3, dtype=np.float32), "test", mask_seen=False, chunk_users=99)
    assert beyond_accuracy(log, "test", found)["rare_hr@10"] == 1.0, "nobody chose it in training"
    again = InteractionLog(log.offsets, np.tile([0, 1, 0], 10).astype(np.int32), log.user_ids, log.catalogue)
    assert beyond_accuracy(again, "test", found)["rare_hr@10"] is None


def test_saved_ranks_come_back(tmp_path: Path) -> None:
    users, ranks = np.array([1, 4, 5]), {"one": [1.0, np.inf, 2.5], "other": [3.0, 1.0, 2.0]}
    save_ranks(users, ranks, tmp_path / "ranks.parquet")
    found = load_ranks(tmp_path / "ranks.parquet")
    np.testing.assert_array_equal(found.pop("user_index"), users)
    assert {name: values.tolist() for name, values in found.items()} == ranks


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_counted_ranks_are_those_of_the_sorted_list(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(ranking, "BLOCK_ITEMS", block)
    vectors = rng.integers(-2, 3, (60, 4)).astype(np.float32)  # many are alike, and whole numbers are exact
    queries, targets = rng.integers(-2, 3, (25, 4)).astype(np.float32), rng.integers(0, 60, 25)
    excluded = [rng.integers(0, 60, rng.integers(0, 30)).astype(np.int32) for _ in range(25)]
    found = counted_ranks(vectors, queries, targets, excluded)
    for query, target, out, place in zip(queries, targets, excluded, found, strict=True):
        left = np.setdiff1d(np.arange(60), out)
        order = left[np.argsort(-(vectors[left] @ query), kind="stable")]
        assert place == (np.inf if target in out else 1 + order.tolist().index(target))
    assert np.isinf(found).any()
    assert not np.isinf(found).all()


def test_a_large_catalogue_is_ranked_a_few_users_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ranks, from fewer scores at once."""
    log = random_log()
    scores = np.random.default_rng(1).standard_normal((log.num_users, log.num_items)).astype(np.float32)
    chunks: list[int] = []

    def scorer(users: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
        chunks.append(len(users))
        return scores[users]

    whole = rank_targets(log, scorer, "test", mask_seen=True, chunk_users=1000)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 3 * log.num_items)
    parts = rank_targets(log, scorer, "test", mask_seen=True, chunk_users=1000)
    assert max(chunks[1:]) == 3 < chunks[0]
    assert np.array_equal(whole.ranks, parts.ranks)
    assert np.array_equal(whole.top, parts.top)
