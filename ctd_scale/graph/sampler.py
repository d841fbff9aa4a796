"""Vectorised neighbour sampling: from positive edges to the message-passing blocks of a minibatch.

A minibatch is a function of (seed, epoch, step, rank) alone, so it is the same whoever computes it and in whatever
order: actors may die, runs may resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Integer
from numpy import ndarray

from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.permutation import permuted


@dataclass(frozen=True)
class Block:
    """One hop of messages: `sources[e] -> targets[e]` with `weights[e]`; targets are the first `num_targets` nodes."""

    sources: Int32[ndarray, "messages"]
    targets: Int32[ndarray, "messages"]
    weights: Float32[ndarray, "messages"]
    num_targets: int


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
            "sizes": np.array([self.num_seeds, *(block.num_targets for block in self.blocks)]),
            "messages": np.array([len(block.sources) for block in self.blocks]),
            "sources": np.concatenate([block.sources for block in self.blocks]),
            "targets": np.concatenate([block.targets for block in self.blocks]),
            "weights": np.concatenate([block.weights for block in self.blocks]),
        }
        return pa.table({name: pa.LargeListArray.from_arrays([0, len(v)], pa.array(v)) for name, v in columns.items()})

    @classmethod
    def from_arrow(cls, row: pa.Table) -> Minibatch:
        read = {name: row[name].combine_chunks().flatten().to_numpy() for name in row.column_names}
        num_seeds, *num_targets = read["sizes"].tolist()
        cuts = np.cumsum(read["messages"])[:-1]
        parts = zip(
            *(np.split(read[name], cuts) for name in ("sources", "targets", "weights")), num_targets, strict=True
        )
        blocks = tuple(Block(*part) for part in parts)
        users, positives, negatives = read["users"], read["positives"], read["negatives"]
        return cls(users, positives, negatives, read["corrections"], num_seeds, read["nodes"], blocks)


class NeighborSampler:
    """Draws up to `fanout[l]` distinct neighbours per node and hop, weighted so that the sum is unbiased.

    LightGCN needs `sum_{w in N(v)} e_w / sqrt(d_v d_w)`. Of d_v neighbours, n = min(d_v, fanout) are drawn without
    replacement, and each term is scaled by d_v / n. Every hop draws anew for all of its targets, also for those
    that an outer hop drew for already: reused draws would be correlated and bias paths that return to a node.
    """

    def __init__(self, graph: BipartiteGraph, fanout: tuple[int, ...]) -> None:
        self.graph = graph
        self.fanout = fanout
        self._offsets = np.asarray(graph.offsets)
        self._degrees = np.diff(self._offsets).astype(np.int32)
        self._root = np.sqrt(self._degrees, dtype=np.float32)
        self._position = np.full(graph.num_nodes, -1, np.int32)

    def sample(
        self, seeds: Integer[ndarray, "seeds"], random: np.random.Generator
    ) -> tuple[Int32[ndarray, "nodes"], tuple[Block, ...]]:
        """Nodes (seeds first, which must be distinct) and blocks (in order of application) that encode the seeds."""
        nodes, blocks = seeds.astype(np.int32), []
        for fanout in self.fanout:
            neighbors, targets = self.draw(nodes, fanout, random)
            degrees = self._degrees[nodes]
            # d_v / n scales the sum up to all of v's neighbours; 1 / sqrt(d_v d_w) is LightGCN's.
            scale = self._root[nodes] / np.maximum(np.minimum(degrees, fanout), 1).astype(np.float32)
            weights = scale[targets] / self._root[neighbors]
            grown, sources = self._relabel(nodes, neighbors)
            blocks.append(Block(sources, targets, weights, len(nodes)))
            nodes = grown
        return nodes, tuple(reversed(blocks))

    def draw(
        self, nodes: Int32[ndarray, "nodes"], fanout: int, random: np.random.Generator
    ) -> tuple[Int32[ndarray, "messages"], Int32[ndarray, "messages"]]:
        """Neighbour ids, and the position of the node that each belongs to."""
        starts, degrees = self._offsets[nodes], self._degrees[nodes]
        few, many = np.flatnonzero(degrees <= fanout), np.flatnonzero(degrees > fanout)
        counts = degrees[few]
        slot = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        drawn = _distinct(degrees[many], fanout, random) + starts[many]
        picks = np.concatenate([np.repeat(starts[few], counts) + slot, drawn.ravel()])
        targets = np.concatenate([np.repeat(few, counts), np.tile(many, fanout)])
        return self.graph.neighbors[picks], targets.astype(np.int32)

    def _relabel(
        self, nodes: Int32[ndarray, "nodes"], neighbors: Int32[ndarray, "messages"]
    ) -> tuple[Int32[ndarray, "grown"], Int32[ndarray, "messages"]]:
        """Append the neighbours that are new; give each message the position of its source."""
        position = self._position
        position[nodes] = np.arange(len(nodes), dtype=np.int32)
        unknown = np.sort(neighbors[position[neighbors] < 0])
        new = unknown[np.flatnonzero(np.diff(unknown, prepend=-1))]
        grown = np.concatenate([nodes, new])
        position[new] = np.arange(len(nodes), len(grown), dtype=np.int32)
        sources = position[neighbors]
        position[grown] = -1
        return grown, sources


def _distinct(sizes: Int32[ndarray, "rows"], count: int, random: np.random.Generator) -> Int32[ndarray, "count rows"]:
    """`count` distinct numbers below each size, uniformly (Floyd's algorithm, all rows at once)."""
    chosen = np.empty((count, len(sizes)), np.int32)
    for slot in range(count):
        last = sizes - np.int32(count - slot)
        draw = (random.random(len(sizes)) * (last + 1)).astype(np.int32)
        taken = np.zeros(len(sizes), np.bool_)
        for earlier in chosen[:slot]:
            taken |= earlier == draw
        chosen[slot] = np.where(taken, last, draw)
    return chosen


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
    users, positives = graph.edge(permuted(places, graph.num_edges, (seed, 0, epoch)))
    negatives, corrections = negative_sampler.draw(users, positives, np.random.default_rng((seed, 1, step)))
    mine = slice(rank, None, world_size)
    users, positives, negatives = users[mine], positives[mine], negatives[mine]
    seeds, inverse = np.unique(np.concatenate([users, positives, negatives]), return_inverse=True)
    nodes, blocks = sampler.sample(seeds, np.random.default_rng((seed, 2, step, rank)))
    user_seeds, positive_seeds, negative_seeds = np.split(inverse, 3)
    return Minibatch(user_seeds, positive_seeds, negative_seeds, corrections[mine], len(seeds), nodes, blocks)
