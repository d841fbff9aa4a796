"""Training finds a planted truth, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import NeighborSampler, make_minibatch
from ctd_scale.graph.table import EmbeddingTable
from ctd_scale.graph.train import minibatch_loss, train_loop, train_steps

USERS, ITEMS = 24, 20


def two_communities() -> tuple[BipartiteGraph, np.ndarray]:
    """Users know 6 of the 10 items of their own community and none of the other; also all (user, item) of one
    community."""
    random = np.random.default_rng(0)
    own = np.arange(USERS)[:, None] % 2 == np.arange(ITEMS) % 2
    known = np.zeros_like(own)
    for user in range(USERS):
        known[user, random.choice(np.flatnonzero(own[user]), 6, replace=False)] = True
    users, items = np.nonzero(known)
    return BipartiteGraph.from_edges(users, items, USERS, ITEMS), own


def test_withheld_edges_of_the_right_community_rank_first(tmp_path: Path) -> None:
    graph, own = two_communities()
    table = EmbeddingTable(graph.num_nodes, 8, 0.05, torch.device("cpu"), seed=0)
    sampler = NeighborSampler(graph, (4, 3))
    negative_sampler = NegativeSampler(graph, GraphConfig())
    batches = (
        make_minibatch(sampler, negative_sampler, seed=0, step=step, batch_size=48, rank=0, world_size=1)
        for step in range(100)
    )
    losses = [loss.item() for loss in train_steps(batches, table, 1e-4)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    embeddings = split_nodes(graph, propagate(graph, table.weight.numpy(), 2, 1000, tmp_path))
    scores = embeddings.users @ embeddings.items.T
    for user in range(USERS):
        known = graph.neighbors[graph.offsets[user] : graph.offsets[user + 1]] - USERS
        withheld = np.setdiff1d(np.flatnonzero(own[user]), known)
        assert len(withheld) == 4
        assert scores[user, withheld].min() > scores[user, ~own[user]].max()


def test_the_loss_of_a_minibatch_by_hand(tmp_path: Path) -> None:
    graph, _ = two_communities()
    layer0 = np.random.default_rng(0).normal(scale=0.1, size=(graph.num_nodes, 4)).astype(np.float32)
    everything = int(graph.degrees.max())
    sampler = NeighborSampler(graph, (everything, everything))
    batch = make_minibatch(
        sampler, NegativeSampler(graph, GraphConfig()), seed=0, step=0, batch_size=16, rank=0, world_size=1
    )
    encoded = propagate(graph, layer0, 2, 1000, tmp_path)
    terms = []
    for user, positive, negative in zip(
        *(batch.nodes[part] for part in (batch.users, batch.positives, batch.negatives)), strict=True
    ):
        margin = encoded[user] @ encoded[positive] - encoded[user] @ encoded[negative]
        norms = sum(float(layer0[node] @ layer0[node]) for node in (user, positive, negative))
        terms.append(np.log1p(np.exp(-margin)) + 0.5 * 0.3 * norms)
    rows = torch.from_numpy(layer0[batch.nodes])
    got = minibatch_loss(LightGCN(), rows, rows[: batch.num_seeds], batch, 0.3).item()
    assert got == pytest.approx(np.mean(terms), rel=1e-4)


def test_a_step_moves_rows_by_the_gradient_of_the_loss() -> None:
    graph, _ = two_communities()
    batch = make_minibatch(
        NeighborSampler(graph, (3, 2)),
        NegativeSampler(graph, GraphConfig()),
        seed=0,
        step=0,
        batch_size=16,
        rank=0,
        world_size=1,
    )
    table = EmbeddingTable(graph.num_nodes, 4, 0.1, torch.device("cpu"), seed=0)
    given: list[torch.Tensor] = []
    route = table.route(torch.from_numpy(batch.nodes).long())
    rows = table.rows(route)
    loss = minibatch_loss(LightGCN(), rows, rows[: batch.num_seeds], batch, 0.3)
    table.update = lambda route, gradients: given.append(gradients)  # type: ignore[method-assign]
    (got,) = train_steps([batch], table, 0.3)
    assert got == loss
    torch.testing.assert_close(given[0], *torch.autograd.grad(loss, [rows]))


def test_a_killed_loop_ends_where_an_uninterrupted_one_ends(tmp_path: Path, one_worker: Any) -> None:
    graph, _ = two_communities()
    graph.save(tmp_path)
    config = GraphConfig(
        embed_dim=4, fanout=(3, 2), epochs=4, batch_size=32, streaming="in_process", checkpoint_every_steps=5
    )
    arguments = {"config": config.model_dump(), "seed": 3, "graph": str(tmp_path)}
    whole = np.load(one_worker.run(train_loop, arguments) / "layer0-00000.npy")
    steps, losses = one_worker.steps.copy(), [curve["loss"] for curve in one_worker.curves]
    per_epoch = graph.num_edges // 32
    assert steps == list(range(1, 4 * per_epoch + 1))
    assert 10 % per_epoch, "the kill must come in the middle of an epoch"

    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, arguments)
    assert one_worker.steps == steps[:10]
    resumed = np.load(one_worker.run(train_loop, arguments) / "layer0-00000.npy")
    assert one_worker.steps == steps
    np.testing.assert_allclose([curve["loss"] for curve in one_worker.curves], losses, atol=1e-6)
    np.testing.assert_allclose(resumed, whole, atol=1e-6)
