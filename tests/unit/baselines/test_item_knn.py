"""Item-kNN against the plain computation."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.baselines.item_knn import item_knn_scorer, item_similarities
from ctd_scale.batches import SPLITS, Catalogue, InteractionLog, Split
from ctd_scale.config_baselines import ItemKNNConfig

ITEMS = 12


def random_log(users: int = 30) -> InteractionLog:
    """Histories with repeats; the last item of the catalogue is nobody's."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, users)
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        random.integers(0, ITEMS - 1, lengths.sum()).astype(np.int32),
        [str(user) for user in range(users)],
        Catalogue(names, names, [""] * ITEMS),
    )


def plain_similarities(log: InteractionLog, shrinkage: float, split: Split) -> np.ndarray:
    chosen = np.zeros((log.num_users, ITEMS))
    for user in range(log.num_users):
        chosen[user, log.history(user, split)] = 1  # every user has a target
    found = np.zeros((ITEMS, ITEMS))
    for one in range(ITEMS):
        for other in range(ITEMS):
            norm = np.sqrt(chosen[:, one].sum() * chosen[:, other].sum())
            if one != other and norm:
                found[one, other] = chosen[:, one] @ chosen[:, other] / (norm + shrinkage)
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
@pytest.mark.parametrize("neighbors", [ITEMS, 4])
def test_similarities_are_the_nearest_cosines(
    shrinkage: float, neighbors: int, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctd_scale.baselines.item_knn.CHUNK", 5)
    log = random_log()
    found = item_similarities(log, ItemKNNConfig(neighbors=neighbors, shrinkage=shrinkage), split).toarray()
    expected = plain_similarities(log, shrinkage, split)
    for row, values in zip(found, expected, strict=True):
        kept = np.flatnonzero(row)
        assert len(kept) <= neighbors
        np.testing.assert_allclose(row[kept], values[kept], rtol=1e-6)
        np.testing.assert_allclose(np.sort(row)[-neighbors:], np.sort(values)[-neighbors:], rtol=1e-6)


def test_scores_sum_over_the_distinct_items_of_the_history() -> None:
    log = random_log()
    similarities = item_similarities(log, ItemKNNConfig(), "validation")
    histories = [np.array([3, 1, 3], np.int32), np.array([5], np.int32)]
    scores = item_knn_scorer(similarities)(np.array([0, 1]), histories)
    dense = similarities.toarray()
    np.testing.assert_allclose(scores[0], dense[3] + dense[1], rtol=1e-6)
    np.testing.assert_allclose(scores[1], dense[5], rtol=1e-6)
