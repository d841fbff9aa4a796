"""Vectorised neighbour sampling: from positive edges to the message-passing blocks of a minibatch.

A minibatch is a function of (seed, step, rank) alone, so it is the same whoever computes it and in whatever order:
actors may die, runs may resume. What is drawn for a node does not even depend on the rank: two workers train on the
neighbourhoods that one would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Integer, UInt64
from numpy import ndarray

from ctd_scale.graph import kernels
from ctd_scale.graph.csr import NO_TIMES, BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.permutation import permuted


@dataclass(frozen=True)
class Block:
    """One hop of messages as a CSR matrix: target t, the t-th node, hears `weights[e]` times the node at `sources[e]`
    for all e in starts[t] .. starts[t + 1]."""

    starts: Int32[ndarray, "rows"]
    sources: Int32[ndarray, "messages"]
    weights: Float32[ndarray, "messages"]

    @property
    def num_targets(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Minibatch:
    """BPR triples as positions among the seeds, what to add to their margins, and what is needed to encode the seeds.

    `nodes` are the node ids of the deepest layer, the `num_seeds` seeds first; `blocks` in order of application.
    """

    users: Int64[ndarray, "batch"]
    positives: Int64[ndarray, "batch"]
    negatives: Int64[ndarray, "batch"]
    corrections: Float32[ndarray, "batch"]
    num_seeds: int
    nodes: Int32[ndarray, "nodes"]
    blocks: tuple[Block, ...]

    def to_arrow(self) -> pa.Table:
        """One row, so that a finished minibatch travels through Ray Data as it is."""
        columns = {
            "users": self.users,
            "positives": self.positives,
            "negatives": self.negatives,
            "corrections": self.corrections,
            "nodes": self.nodes,
            "num_seeds": np.array([self.num_seeds]),
            "rows": np.array([len(block.starts) for block in self.blocks]),
            "messages": np.array([len(block.sources) for block in self.blocks]),
            "starts": np.concatenate([block.starts for block in self.blocks]),
            "sources": np.concatenate([block.sources for block in self.blocks]),
            "weights": np.concatenate([block.weights for block in self.blocks]),
        }
        return pa.table({name: pa.LargeListArray.from_arrays([0, len(v)], pa.array(v)) for name, v in columns.items()})

    @classmethod
    def from_arrow(cls, row: pa.Table) -> Minibatch:
        read = {name: row[name].combine_chunks().flatten().to_numpy() for name in row.column_names}
        by_row = np.split(read["starts"], np.cumsum(read["rows"])[:-1])
        cuts = np.cumsum(read["messages"])[:-1]
        blocks = map(Block, by_row, np.split(read["sources"], cuts), np.split(read["weights"], cuts))
        return cls(
            read["users"],
            read["positives"],
            read["negatives"],
            read["corrections"],
            int(read["num_seeds"][0]),
            read["nodes"],
            tuple(blocks),
        )


class NeighborSampler:
    """Draws up to `fanout[l]` neighbours per node and hop, weighted so that the sum is unbiased.

    LightGCN needs `sum_{w in N(v)} e_w / sqrt(d_v d_w)`. Of the neighbours that v hears from, n are drawn, and each
    term is scaled by d_v / n. Every hop draws anew for all of its targets, also for those that an outer hop drew for
    already: reused draws would be correlated and bias paths that return to a node.

    In a graph with times every seed has a bound, and all that is drawn for it is older: the neighbourhood is that of
    the graph before the bound, degrees included.
    """

    def __init__(self, graph: BipartiteGraph, fanout: tuple[int, ...], *, replace: bool = False) -> None:
        self.graph = graph
        self.fanout = fanout
        self._replace = replace
        self._root = np.sqrt(graph.degrees, dtype=np.float32)
        self._keys, self._places = np.empty(0, np.int64), np.empty(0, np.int32)

    def sample(
        self,
        seeds: Integer[ndarray, "seeds"],
        key: tuple[int, ...],
        *,
        groups: Integer[ndarray, "seeds"] | None = None,
        bounds: Int64[ndarray, "groups"] = NO_TIMES,
    ) -> tuple[Int32[ndarray, "nodes"], tuple[Block, ...]]:
        """Nodes (seeds first, which must be distinct) and blocks (in order of application) that encode the seeds.

        `key` says which sample: the same one draws the same for a node, whatever the other seeds are. In a graph with
        times, seed s may hear what is older than `bounds[groups[s]]`; seeds are distinct pairs with their group.
        """
        nodes = seeds.astype(np.int32)
        group = np.zeros(len(seeds), np.int32) if groups is None else groups.astype(np.int32)
        blocks = []
        for fanout, hop_key in zip(self.fanout, _hash_keys(key, len(self.fanout)), strict=True):
            lengths = self._lengths(nodes, group, bounds)
            neighbors, starts = self.draw(nodes, group, lengths, bounds, fanout, hop_key)
            grown, grown_group, sources = self._relabel(nodes, group, neighbors, starts)
            # d_v / n scales the sum up to all of v's neighbours; 1 / sqrt(d_v d_w) is LightGCN's.
            root = self._roots(grown, grown_group, bounds)
            drawn = np.diff(starts)
            scale = root[: len(nodes)] / np.maximum(drawn, 1).astype(np.float32)
            blocks.append(Block(starts, sources, np.repeat(scale, drawn) / root[sources]))
            nodes, group = grown, grown_group
        return nodes, tuple(reversed(blocks))

    def draw(
        self,
        nodes: Int32[ndarray, "nodes"],
        groups: Int32[ndarray, "nodes"],
        lengths: Int32[ndarray, "nodes"],
        bounds: Int64[ndarray, "groups"],
        fanout: int,
        key: np.uint64,
    ) -> tuple[Int32[ndarray, "messages"], Int32[ndarray, "rows"]]:
        """Neighbour ids, and where those of each node start."""
        graph = self.graph
        return kernels.draw_neighbors(
            nodes, groups, lengths, graph.offsets, graph.neighbors, bounds, fanout, self._replace, key
        )

    def _lengths(
        self, nodes: Int32[ndarray, "nodes"], groups: Int32[ndarray, "nodes"], bounds: Int64[ndarray, "groups"]
    ) -> Int32[ndarray, "nodes"]:
        """How many neighbours each node may hear from. Without bounds times are not looked at."""
        times = self.graph.times if len(bounds) else NO_TIMES
        return kernels.row_lengths(nodes, groups, self.graph.offsets, times, bounds)

    def _relabel(
        self,
        nodes: Int32[ndarray, "nodes"],
        groups: Int32[ndarray, "nodes"],
        neighbors: Int32[ndarray, "messages"],
        starts: Int32[ndarray, "rows"],
    ) -> tuple[Int32[ndarray, "grown"], Int32[ndarray, "grown"], Int32[ndarray, "messages"]]:
        """Append the neighbours that are new; give each message the position of its source."""
        needed = 1 << (2 * (len(nodes) + len(neighbors))).bit_length()
        if len(self._keys) < needed:
            self._keys, self._places = np.full(needed, kernels.EMPTY, np.int64), np.empty(needed, np.int32)
        return kernels.relabel(nodes, groups, neighbors, starts, self.graph.num_nodes, self._keys, self._places)

    def _roots(
        self, nodes: Int32[ndarray, "nodes"], groups: Int32[ndarray, "nodes"], bounds: Int64[ndarray, "groups"]
    ) -> Float32[ndarray, "nodes"]:
        """The square root of each node's degree, in the graph as old as its bound."""
        if not len(bounds):
            return self._root[nodes]
        graph = self.graph
        older = self._lengths(nodes, groups, bounds)
        whole = graph.offsets[nodes + 1] - graph.offsets[nodes]
        # A row that was cut shows a part of its edges; the same part is taken to be older.
        share = np.sqrt(older / np.maximum(whole, 1), dtype=np.float32)
        return np.maximum(self._root[nodes] * share, np.float32(1))


def _hash_keys(key: tuple[int, ...], count: int) -> UInt64[ndarray, "count"]:
    return np.random.SeedSequence(key).generate_state(count, np.uint64)


def steps_per_epoch(num_edges: int, batch_size: int) -> int:
    """Full batches only; the remainder is another one every epoch, because the order is."""
    return max(1, num_edges // batch_size)


def make_minibatch(
    sampler: NeighborSampler,
    negative_sampler: NegativeSampler,
    *,
    seed: int,
    step: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Minibatch:
    """The part of `rank` in the global minibatch of optimizer step `step` (0-based over all epochs)."""
    graph = sampler.graph
    epoch, position = divmod(step, steps_per_epoch(graph.num_edges, batch_size))
    places = np.arange(position * batch_size, min((position + 1) * batch_size, graph.num_edges))
    edges = permuted(places, graph.num_edges, (seed, 0, epoch))
    users, positives = graph.edge(edges)
    negatives, corrections = negative_sampler.draw(users, positives, np.random.default_rng((seed, 1, step)))
    mine = slice(rank, None, world_size)
    triples = np.stack([users, positives, negatives])[:, mine]
    # All three of a triple are seen as they were before its edge.
    bounds, group = np.unique(graph.positive_times[edges[mine]], return_inverse=True) if graph.timed else (NO_TIMES, 0)
    keys, inverse = np.unique(group * graph.num_nodes + triples, return_inverse=True)
    groups, seeds = np.divmod(keys, graph.num_nodes)
    nodes, blocks = sampler.sample(seeds, (seed, 2, step), groups=groups, bounds=bounds)
    user_seeds, positive_seeds, negative_seeds = inverse.reshape(triples.shape)
    return Minibatch(user_seeds, positive_seeds, negative_seeds, corrections[mine], len(seeds), nodes, blocks)
