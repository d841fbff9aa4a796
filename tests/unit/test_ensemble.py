"""Two preferences averaged: each in its own space, whatever the order of their users."""

from __future__ import annotations

import numpy as np

from ctd_scale.batches import Preferences
from ctd_scale.ensemble import ensemble_scorer
from ctd_scale.metrics import target_ranks

USERS, ITEMS, DIM = 600, 200, 16


def noisy_model(seed: int, truth: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, Preferences]:
    """Items in a space of its own (turned, and of other lengths), and for each user, in another order, the direction of
    the target under noise of its own."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
    items = (truth @ turn * random.uniform(0.5, 2, (ITEMS, 1))).astype(np.float32)
    users = random.permutation(USERS).astype(np.int32)
    said = ((truth[targets] + 0.5 * random.standard_normal((USERS, DIM))) @ turn)[users].astype(np.float32)
    return items, Preferences(users, targets[users].astype(np.int32), said, [""] * USERS)


def test_two_noisy_preferences_know_more_than_one() -> None:
    random = np.random.default_rng(0)
    truth = random.standard_normal((ITEMS, DIM))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    targets, users = random.integers(0, ITEMS, USERS), np.arange(USERS)
    models = [noisy_model(seed, truth, targets) for seed in (1, 2)]

    def mean_log_rank(*chosen: int) -> float:
        score = ensemble_scorer([models[each][0] for each in chosen], [models[each][1] for each in chosen])
        return float(np.log(target_ranks(score(users, []), targets)).mean())

    assert mean_log_rank(0, 1) < 0.8 * min(mean_log_rank(0), mean_log_rank(1))
    assert mean_log_rank(0, 0) == mean_log_rank(0)
    # Any part of the users, in any order.
    some = np.array([7, 3, 59])
    score = ensemble_scorer(*zip(*models, strict=True))
    np.testing.assert_allclose(score(some, []), score(users, [])[some], atol=1e-6)
