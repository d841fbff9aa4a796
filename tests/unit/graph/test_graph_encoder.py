"""Encoder, losses and exact propagation against dense algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.losses import bpr_loss, l2_loss
from ctd_scale.graph.sampler import NeighborSampler

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
    nodes, blocks = sampler.sample(seeds, np.random.default_rng(2))
    tensors = [
        (torch.from_numpy(np.stack([block.sources, block.targets])), torch.from_numpy(block.weights), block.num_targets)
        for block in blocks
    ]
    encoded = LightGCN()(torch.from_numpy(layer0[nodes]), tensors, len(seeds))
    assert np.allclose(encoded.numpy(), dense_encoding(graph, layer0, num_layers)[seeds], atol=1e-5)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_exact_propagation_in_chunks_is_dense_propagation(graph: BipartiteGraph, num_layers: int, chunk: int) -> None:
    layer0 = np.random.default_rng(3).standard_normal((graph.num_nodes, DIM)).astype(np.float32)
    before = layer0.copy()
    published = propagate(graph, layer0, num_layers, chunk)
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
