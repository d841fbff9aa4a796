"""What the graph says once the validation interactions are known: against dense propagation, and on a planted set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctd_scale.baselines.popularity import popularity_scorer
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays
from ctd_scale.config import GraphConfig
from ctd_scale.graph.train import DEGREES, save_at_test

ITEMS = 20


def log_of(sequences: list[list[int]]) -> InteractionLog:
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.cumsum([0, *map(len, sequences)]),
        np.concatenate(sequences).astype(np.int32),
        [str(user) for user in range(len(sequences))],
        Catalogue(names, names, [""] * ITEMS),
    )


@pytest.mark.parametrize("num_layers", [1, 3])
def test_embeddings_at_test_are_those_of_dense_propagation(tmp_path: Path, num_layers: int) -> None:
    random = np.random.default_rng(0)
    log = log_of([random.integers(0, ITEMS, random.integers(2, 9)).tolist() for _ in range(30)])
    config = GraphConfig(embed_dim=4, num_layers=num_layers, fanout=(3,) * num_layers, propagation_chunk=7)
    nodes = log.num_users + ITEMS
    layer0 = random.standard_normal((nodes, 4)).astype(np.float32)
    save_at_test(log, layer0, config, tmp_path)

    adjacency = np.zeros((nodes, nodes))
    for user in range(log.num_users):
        known = log.history(user, "test") if user in log.split_users("test") else log.full_history(user)
        adjacency[user, log.num_users + known] = adjacency[log.num_users + known, user] = 1
    degrees = adjacency.sum(axis=1)
    scaled = adjacency / np.sqrt(np.maximum(degrees, 1)[:, None] * np.maximum(degrees, 1))
    layers = [layer0.astype(np.float64)]
    for _ in range(num_layers):
        layers.append(scaled @ layers[-1])
    expected = np.mean(layers, axis=0)
    found = NodeArrays.load(tmp_path)
    np.testing.assert_allclose(found.users, expected[: log.num_users], atol=1e-5)
    np.testing.assert_allclose(found.items, expected[log.num_users :], atol=1e-5)
    assert np.load(tmp_path / DEGREES).tolist() == degrees[log.num_users :].tolist()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["item_degrees.npy", "items.npy", "users.npy"]


def test_what_others_chose_for_validation_counts_at_test_and_not_before() -> None:
    """Item 9 is nobody's in training and everybody's for validation."""
    log = log_of([[user % 4, 4 + user % 3, 9, 10 + user] for user in range(8)])
    users, nothing = np.arange(1), [np.zeros(0, np.int32)]
    assert popularity_scorer(log, "validation")(users, nothing)[0, 9] == 0
    assert popularity_scorer(log, "test")(users, nothing)[0].argmax() == 9
