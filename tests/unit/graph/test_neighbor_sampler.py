"""Sampled blocks: what they may hold, that their sum is unbiased, and what a minibatch is a function of."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import Block, Minibatch, NeighborSampler, make_minibatch, steps_per_epoch
from ctd_scale.graph.stream import DIRECT_EDGES, StalledError, chosen_streaming, stream_minibatches, watched

# Four users and three items with cycles of length 4 and 6, so that paths of three hops return.
PAIRS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]


def random_graph(seed: int, users: int = 12, items: int = 15, share: float = 0.3) -> BipartiteGraph:
    pairs = np.argwhere(np.random.default_rng(seed).random((users, items)) < share)
    return BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], users, items)


def minibatch(graph: BipartiteGraph, step: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> Minibatch:
    return make_minibatch(
        NeighborSampler(graph, (3, 2)),
        NegativeSampler(graph, GraphConfig()),
        seed=seed,
        step=step,
        batch_size=10,
        rank=rank,
        world_size=world_size,
    )


def assert_equal(left: Minibatch, right: Minibatch) -> None:
    for name in ("users", "positives", "negatives", "corrections", "nodes"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), name
    assert left.num_seeds == right.num_seeds
    assert len(left.blocks) == len(right.blocks)
    for one, other in zip(left.blocks, right.blocks, strict=True):
        assert one.num_targets == other.num_targets
        for name in ("starts", "sources", "weights"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def targets_of(block: Block) -> np.ndarray:
    """The position of the node that each message goes to."""
    return np.repeat(np.arange(block.num_targets), np.diff(block.starts))


def triples(batch: Minibatch) -> list[tuple[int, ...]]:
    return list(
        zip(*(batch.nodes[part].tolist() for part in (batch.users, batch.positives, batch.negatives)), strict=True)
    )


# -- neighbourhoods ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_drawn_neighbours_are_distinct_neighbours_with_unbiased_weights(seed: int, fanout: list[int]) -> None:
    graph = random_graph(seed % 100)
    random = np.random.default_rng(seed)
    seeds = random.permutation(graph.num_nodes)[:5]
    nodes, blocks = NeighborSampler(graph, tuple(fanout)).sample(seeds, (seed,))
    assert nodes[: len(seeds)].tolist() == seeds.tolist()
    assert len(set(nodes.tolist())) == len(nodes)
    assert blocks[-1].num_targets == len(seeds)
    for inner, outer in itertools.pairwise(blocks):  # an outer hop reads what the inner one made
        assert outer.sources.max(initial=0) < inner.num_targets
    for block, limit in zip(reversed(blocks), fanout, strict=True):
        drawn: dict[int, list[int]] = {node: [] for node in nodes[: block.num_targets].tolist()}
        for source, target, weight in zip(block.sources, targets_of(block), block.weights, strict=True):
            node, neighbor = int(nodes[target]), int(nodes[source])
            drawn[node].append(neighbor)
            degree = graph.degrees[node]
            scale = degree / min(degree, limit)
            assert weight == pytest.approx(scale / np.sqrt(degree * graph.degrees[neighbor]))
        for node, neighbors in drawn.items():
            everyone = graph.neighbors[graph.offsets[node] : graph.offsets[node + 1]].tolist()
            assert len(neighbors) == len(set(neighbors)) == min(limit, len(everyone))
            assert set(neighbors) <= set(everyone)


@pytest.mark.parametrize("fanout", [(1,), (2,), (2, 1), (1, 1, 1), (2, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("replace", [False, True])
def test_the_sampled_sum_is_unbiased(fanout: tuple[int, ...], replace: bool) -> None:
    copies, users, items = 20_000, 4, 3
    # Disjoint copies of one tiny graph: one call draws 20,000 times.
    pairs = np.array(PAIRS)
    every = np.concatenate([pairs + copy * np.array([users, items]) for copy in range(copies)])
    graph = BipartiteGraph.from_edges(every[:, 0], every[:, 1], copies * users, copies * items)
    values = np.random.default_rng(0).standard_normal(users + items)
    layer0 = np.concatenate([np.tile(values[:users], copies), np.tile(values[users:], copies)])

    seeds = np.arange(graph.num_nodes)
    nodes, blocks = NeighborSampler(graph, fanout, replace=replace).sample(seeds, (1,))
    layer = layer0[nodes]
    for block in blocks:
        layer = np.bincount(targets_of(block), block.weights * layer[block.sources], minlength=block.num_targets)
    estimates = np.concatenate(
        [layer[: copies * users].reshape(copies, users), layer[copies * users :].reshape(copies, items)], axis=1
    )

    tiny = BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], users, items)
    adjacency = np.zeros((users + items, users + items))
    adjacency[pairs[:, 0], users + pairs[:, 1]] = adjacency[users + pairs[:, 1], pairs[:, 0]] = 1
    adjacency /= np.sqrt(np.outer(tiny.degrees, tiny.degrees))
    exact = np.linalg.matrix_power(adjacency, len(fanout)) @ values
    error = estimates.std(axis=0) / np.sqrt(copies)
    assert error.max() < 0.02, "too noisy to tell a bias"
    assert error.max() > 0, "nothing was sampled"
    assert (np.abs(estimates.mean(axis=0) - exact) <= 4.5 * error + 1e-6).all()


@given(st.integers(0, 2**32 - 1))
def test_what_a_node_draws_does_not_depend_on_the_other_seeds(seed: int) -> None:
    graph = random_graph(seed % 100)
    order = np.random.default_rng(seed).permutation(graph.num_nodes)

    def drawn(seeds: np.ndarray) -> dict[int, list[tuple[int, float]]]:
        """By seed: neighbours of the first hop, with their weights."""
        nodes, blocks = NeighborSampler(graph, (2, 2)).sample(seeds, (seed,))
        found: dict[int, list[tuple[int, float]]] = {int(node): [] for node in seeds}
        for source, target, weight in zip(blocks[-1].sources, targets_of(blocks[-1]), blocks[-1].weights, strict=True):
            found[int(nodes[target])].append((int(nodes[source]), float(weight)))
        return found

    everyone, some = drawn(order), drawn(order[3:9])
    assert some == {node: everyone[node] for node in some}


def test_with_replacement_a_neighbour_may_come_twice() -> None:
    graph = random_graph(9, users=1, items=20, share=1.1)
    draws = [NeighborSampler(graph, (8,), replace=True).sample(np.array([0]), (key,))[1][0] for key in range(50)]
    assert {len(block.sources) for block in draws} == {8}
    assert any(len(set(block.sources.tolist())) < 8 for block in draws)


# -- minibatches ---------------------------------------------------------------------------------------------


def test_a_minibatch_depends_on_seed_step_and_rank_alone() -> None:
    graph = random_graph(0)
    used = NeighborSampler(graph, (3, 2))
    arguments = {"seed": 0, "batch_size": 10, "world_size": 2}
    for step in (9, 3, 5):
        make_minibatch(used, NegativeSampler(graph, GraphConfig()), step=step, rank=1, **arguments)
    again = make_minibatch(used, NegativeSampler(graph, GraphConfig()), step=4, rank=0, **arguments)
    assert_equal(again, minibatch(graph, 4, rank=0, world_size=2))
    for other in (
        minibatch(graph, 5, world_size=2),
        minibatch(graph, 4, seed=1, world_size=2),
        minibatch(graph, 4, rank=1, world_size=2),
    ):
        assert triples(other) != triples(again)


@given(st.integers(0, 20), st.integers(2, 4))
def test_ranks_together_hold_what_one_rank_holds(step: int, world_size: int) -> None:
    graph = random_graph(1)
    alone = triples(minibatch(graph, step))
    shared = [triples(minibatch(graph, step, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(alone) == sorted(triple for part in shared for triple in part)


def test_every_edge_comes_at_most_once_per_epoch_and_the_remainder_changes() -> None:
    graph = random_graph(2)
    steps = steps_per_epoch(graph.num_edges, 10)
    assert graph.num_edges % 10, "the test needs a remainder"
    missed = []
    for epoch in range(3):
        seen = [triple[:2] for step in range(steps) for triple in triples(minibatch(graph, epoch * steps + step))]
        assert len(seen) == len(set(seen)) == steps * 10
        every = set(zip(*(part.tolist() for part in graph.edge(np.arange(graph.num_edges))), strict=True))
        assert set(seen) < every
        missed.append(every - set(seen))
    assert missed[0] != missed[1] != missed[2]


def test_negatives_are_never_positives() -> None:
    graph = random_graph(3, users=30, items=200, share=0.1)
    for step in range(20):
        users, _, negatives = (np.array(part) for part in zip(*triples(minibatch(graph, step)), strict=True))
        assert (negatives >= graph.num_users).all()
        assert not graph.has_edge(users, negatives).any()


def test_a_user_who_has_everything_does_not_stall() -> None:
    graph = random_graph(4, users=3, items=4, share=1.1)
    negatives = minibatch(graph, 0).nodes[minibatch(graph, 0).negatives]
    assert ((negatives >= 3) & (negatives < 7)).all()


def test_an_epoch_smaller_than_a_batch_is_one_step() -> None:
    graph = random_graph(5, users=2, items=3, share=1.1)
    assert steps_per_epoch(graph.num_edges, 10) == 1
    assert len(triples(minibatch(graph, 7))) == 6


def test_a_minibatch_travels_through_arrow() -> None:
    graph = random_graph(6)
    batches = [minibatch(graph, step) for step in range(4)]
    assert_equal(Minibatch.from_arrow(batches[0].to_arrow()), batches[0])
    table = pa.concat_tables(batch.to_arrow() for batch in batches)
    for index, batch in enumerate(batches):  # Ray Data cuts rows out of larger tables
        assert_equal(Minibatch.from_arrow(table.slice(index, 1)), batch)
        assert_equal(Minibatch.from_arrow(table.combine_chunks().slice(index, 1)), batch)


def test_a_stream_in_process_gives_the_asked_for_steps(tmp_path: Path) -> None:
    graph = random_graph(7)
    graph.save(tmp_path)
    config = GraphConfig(fanout=(3, 2), batch_size=10, streaming="in_process")
    arguments = {"seed": 0, "rank": 1, "world_size": 2}
    streamed = list(stream_minibatches(config, str(tmp_path), start=2, stop=5, **arguments))
    assert len(streamed) == 3
    for step, batch in zip(range(2, 5), streamed, strict=True):
        assert_equal(batch, minibatch(graph, step, rank=1, world_size=2))
    assert list(stream_minibatches(config, str(tmp_path), start=5, stop=5, **arguments)) == []


def test_a_stream_that_stalls_fails_by_name() -> None:
    graph, waits = random_graph(8), threading.Event()

    def source() -> Iterator[Minibatch]:
        yield minibatch(graph, 0)
        yield minibatch(graph, 1)
        waits.wait()

    stream = watched(source(), 0.2, "graph.streaming='test'")
    assert_equal(next(stream), minibatch(graph, 0))
    assert_equal(next(stream), minibatch(graph, 1))
    with pytest.raises(StalledError, match=r"graph.streaming='test' gave no minibatch for 0.2 s, after 2 of them"):
        next(stream)
    waits.set()


def test_what_a_source_raises_arrives() -> None:
    def source() -> Iterator[Minibatch]:
        yield minibatch(random_graph(8), 0)
        raise OSError("the disk is gone")

    stream = watched(source(), 60, "test")
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_a_stream_that_is_left_ends_its_thread() -> None:
    def source() -> Iterator[Minibatch]:
        while True:
            yield minibatch(random_graph(8), 0)

    before = threading.active_count()
    stream = watched(source(), 60, "test")
    next(stream)
    stream.close()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_small_graphs_are_sampled_directly_unless_told_otherwise() -> None:
    assert chosen_streaming(GraphConfig(), DIRECT_EDGES) == "in_process"
    assert chosen_streaming(GraphConfig(), DIRECT_EDGES + 1) == "ray_data"
    assert chosen_streaming(GraphConfig(streaming="ray_data"), 1) == "ray_data"
    assert chosen_streaming(GraphConfig(streaming="in_process"), DIRECT_EDGES + 1) == "in_process"
