"""The CSR graph against a dict of sets."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.graph.csr import BipartiteGraph

USERS, ITEMS = 6, 5
PAIRS = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), min_size=1, max_size=40)


def graph_of(pairs: list[tuple[int, int]], users: int = USERS, items: int = ITEMS) -> BipartiteGraph:
    columns = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return BipartiteGraph.from_edges(columns[:, 0], columns[:, 1], users, items)


@given(PAIRS)
def test_neighbours_are_those_of_a_dict_of_sets(pairs: list[tuple[int, int]]) -> None:
    graph = graph_of(pairs)
    reference: defaultdict[int, set[int]] = defaultdict(set)
    for user, item in pairs:
        reference[user].add(USERS + item)
        reference[USERS + item].add(user)
    for node in range(graph.num_nodes):
        neighbors = graph.neighbors[graph.offsets[node] : graph.offsets[node + 1]].tolist()
        assert neighbors == sorted(reference[node])
        assert graph.degrees[node] == len(reference[node])
    assert graph.num_edges == len(set(pairs))


@given(PAIRS)
def test_edges_and_membership(pairs: list[tuple[int, int]]) -> None:
    graph = graph_of(pairs)
    users, items = graph.edge(np.arange(graph.num_edges))
    assert list(zip(users.tolist(), (items - USERS).tolist(), strict=True)) == sorted(set(pairs))
    every_user, every_item = (axis.ravel() for axis in np.meshgrid(np.arange(USERS), np.arange(ITEMS), indexing="ij"))
    expected = [pair in set(pairs) for pair in zip(every_user.tolist(), every_item.tolist(), strict=True)]
    assert graph.has_edge(every_user, every_item + USERS).tolist() == expected


def test_a_graph_comes_back_from_disk(tmp_path: Path) -> None:
    graph = graph_of([(0, 1), (0, 4), (3, 1), (0, 1)], items=7)
    graph.save(tmp_path)
    loaded = BipartiteGraph.load(tmp_path)
    assert (loaded.num_users, loaded.num_items) == (USERS, 7)
    assert np.array_equal(loaded.offsets, graph.offsets)
    assert np.array_equal(loaded.neighbors, graph.neighbors)
