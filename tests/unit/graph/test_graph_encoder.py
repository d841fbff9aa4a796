"""Encoder, losses and exact propagation against dense algebra."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.nn import LGConv

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import GraphConfig
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN, WeightedSum
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.losses import bpr_loss, l2_loss
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import NeighborSampler, make_minibatch
from ctd_scale.graph.train import sparse_blocks

USERS, ITEMS, DIM = 9, 11, 4


@pytest.fixture(scope="module")
def graph() -> BipartiteGraph:
    """A random graph; the last user and the last item have no edge."""
    pairs = np.argwhere(np.random.default_rng(0).random((USERS - 1, ITEMS - 1)) < 0.4)
    return BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], USERS, ITEMS)


def dense_encoding(graph: BipartiteGraph, layer0: np.ndarray, num_layers: int) -> np.ndarray:
    """Mean of layers, `e^(l+1) = D^-1/2 A D^-1/2 e^(l)`, in float64."""
    adjacency = np.zeros((graph.num_nodes, graph.num_nodes))
    for node in range(graph.num_nodes):
        for neighbor in graph.neighbors[graph.offsets[node] : graph.offsets[node + 1]]:
            adjacency[node, neighbor] = 1 / math.sqrt(graph.degrees[node] * graph.degrees[neighbor])
    layers = [layer0.astype(np.float64)]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    return np.mean(layers, axis=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_full_fanout_is_whole_graph_propagation(graph: BipartiteGraph, num_layers: int) -> None:
    layer0 = np.random.default_rng(0).standard_normal((graph.num_nodes, DIM)).astype(np.float32)
    seeds = np.random.default_rng(1).permutation(graph.num_nodes)[:7]
    sampler = NeighborSampler(graph, (int(graph.degrees.max()),) * num_layers)
    nodes, blocks = sampler.sample(seeds, (2,))
    encoded = LightGCN()(*(torch.from_numpy(layer0[part]) for part in (nodes, seeds)), sparse_blocks(nodes, blocks))
    assert np.allclose(encoded.numpy(), dense_encoding(graph, layer0, num_layers)[seeds], atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_with_times_an_edge_is_encoded_by_the_graph_before_it(num_layers: int) -> None:
    random = np.random.default_rng(0)
    pairs = np.argwhere(random.random((USERS, ITEMS)) < 0.5)
    times = random.integers(0, 12, len(pairs))
    graph = BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], USERS, ITEMS, times)
    sampler = NeighborSampler(graph, (int(graph.degrees.max()),) * num_layers)
    batch = make_minibatch(
        sampler, NegativeSampler(graph, GraphConfig()), seed=0, step=0, batch_size=30, rank=0, world_size=1
    )
    layer0 = random.standard_normal((graph.num_nodes, DIM)).astype(np.float32)
    rows = torch.from_numpy(layer0[batch.nodes])
    encoded = LightGCN()(rows, rows[: batch.num_seeds], sparse_blocks(batch.nodes, batch.blocks)).numpy()
    time_of = {(user, item + USERS): time for (user, item), time in zip(pairs.tolist(), times.tolist(), strict=True)}
    bounds = set()
    for triple in zip(batch.users, batch.positives, batch.negatives, strict=True):
        user, positive, _ = nodes = batch.nodes[list(triple)]
        bound = time_of[int(user), int(positive)]
        old = times < bound
        before = BipartiteGraph.from_edges(pairs[old, 0], pairs[old, 1], USERS, ITEMS)
        expected = dense_encoding(before, layer0, num_layers)[nodes]
        np.testing.assert_allclose(encoded[list(triple)], expected, atol=1e-5)
        bounds.add(bound)
    assert len(bounds) > 5


def test_published_embeddings_of_a_cut_graph_estimate_the_whole_one() -> None:
    """Rows of a hub are scaled up, so where all neighbours are alike the cut changes nothing."""
    users = np.arange(40)
    log = InteractionLog(
        np.arange(41), np.zeros(40, np.int32), [str(user) for user in users], Catalogue(["0"], ["0"], ["0"])
    )
    layer0 = np.ones((41, DIM), np.float32)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole, cut = build_graph(log, Path(one)), build_graph(log, Path(other), hub_cap=7)
        assert len(cut.neighbors) == 40 + 7
        published = [propagate(graph, layer0, 2, 8, Path(one)) for graph in (whole, cut)]
    np.testing.assert_allclose(published[1], published[0], rtol=1e-6)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_exact_propagation_in_chunks_is_dense_propagation(
    graph: BipartiteGraph, num_layers: int, chunk: int, tmp_path: Path
) -> None:
    layer0 = np.random.default_rng(3).standard_normal((graph.num_nodes, DIM)).astype(np.float32)
    before = layer0.copy()
    published = propagate(graph, layer0, num_layers, chunk, tmp_path)
    assert published.dtype == np.float32
    assert np.allclose(published, dense_encoding(graph, layer0, num_layers), atol=1e-5)
    assert np.array_equal(layer0, before)


def test_users_and_items_apart(graph: BipartiteGraph) -> None:
    embeddings = np.arange(graph.num_nodes, dtype=np.float32)[:, None]
    parts = split_nodes(graph, embeddings)
    assert parts.users.ravel().tolist() == list(range(USERS))
    assert parts.items.ravel().tolist() == list(range(USERS, USERS + ITEMS))


def test_bpr_by_hand() -> None:
    positive, negative = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([0.0, 0.5, 2.0])
    expected = [-math.log(1 / (1 + math.exp(-margin))) for margin in (2.0, 0.0, -3.0)]
    assert bpr_loss(positive, negative).item() == pytest.approx(sum(expected) / 3)


def test_l2_by_hand() -> None:
    users, items = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # Half of the mean squared norms: (25 + 0) / 2 and (1 + 4) / 2.
    assert l2_loss(users, items).item() == pytest.approx(0.5 * (12.5 + 2.5))


def test_the_sum_of_a_block_and_its_gradient_are_the_convolutions() -> None:
    random = np.random.default_rng(4)
    dense = random.standard_normal((6, 9)) * (random.random((6, 9)) < 0.4)
    block = torch.from_numpy(dense.astype(np.float32)).to_sparse_csr()
    values = torch.from_numpy(random.standard_normal((9, DIM)).astype(np.float32)).requires_grad_()
    ours = WeightedSum.apply(block, values)
    expected = LGConv(normalize=False)(values, block)
    torch.testing.assert_close(ours, expected)
    upstream = torch.from_numpy(random.standard_normal((6, DIM)).astype(np.float32))
    torch.testing.assert_close(
        torch.autograd.grad(ours, [values], upstream), torch.autograd.grad(expected, [values], upstream)
    )
