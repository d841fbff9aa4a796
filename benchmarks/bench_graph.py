"""The graph stage at size: building the CSR out of core, and sampling from it.

Rival of the sampler: the same draws by a plain Python loop over nodes (`random.sample` and a dict for the labels).
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import Case, arguments, write
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import GraphConfig
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import NeighborSampler, make_minibatch

FANOUT = (10, 10)
SEEDS = 1024
# users, items, interactions
SIZES = {
    "small": [(100_000, 50_000, 1_000_000), (500_000, 250_000, 5_000_000)],
    "full": [
        (100_000, 50_000, 1_000_000),
        (500_000, 250_000, 5_000_000),
        (1_000_000, 1_000_000, 20_000_000),
        (2_000_000, 1_000_000, 50_000_000),
    ],
}


def synthetic_log(folder: Path, users: int, items: int, interactions: int) -> InteractionLog:
    """Histories of geometric length over items whose popularity falls as a power law; files, not memory."""
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(interactions, rng.dirichlet(np.ones(1000)).repeat(users // 1000) / (users // 1000))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    column = np.lib.format.open_memmap(folder / "items.npy", mode="w+", dtype=np.int32, shape=(interactions,))
    for start in range(0, interactions, 5_000_000):
        part = column[start : start + 5_000_000]
        part[:] = (items * rng.random(len(part)) ** 2).astype(np.int32)
    column.flush()
    names = [""] * items
    return InteractionLog(
        np.load(folder / "offsets.npy", mmap_mode="r"),
        np.load(folder / "items.npy", mmap_mode="r"),
        [""] * users,
        Catalogue(names, names, names),
    )


def anonymous_peak() -> int:
    """Peak resident memory of this process in bytes, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def per_second(work: Callable[[int], int], seconds: float = 3.0) -> float:
    """Units of work per second, after one warm-up call."""
    work(0)
    done, started, call = 0, time.perf_counter(), 1
    while time.perf_counter() - started < seconds:
        done += work(call)
        call += 1
    return done / (time.perf_counter() - started)


def python_sample(graph: BipartiteGraph, seeds: list[int]) -> int:
    """One multi-hop sample by plain Python; returns how many edges it drew."""
    labels = {node: number for number, node in enumerate(seeds)}
    frontier, edges = seeds, 0
    for fanout in FANOUT:
        for node in frontier:
            start, stop = int(graph.offsets[node]), int(graph.offsets[node + 1])
            places = range(start, stop) if stop - start <= fanout else random.sample(range(start, stop), fanout)
            for place in places:
                labels.setdefault(int(graph.neighbors[place]), len(labels))
                edges += 1
        frontier = list(labels)
    return edges


def sampler_cases(graph: BipartiteGraph, name: str) -> list[Case]:
    sampler = NeighborSampler(graph, FANOUT)

    def seeds(call: int) -> np.ndarray:
        return np.random.default_rng(call).choice(graph.num_nodes, SEEDS, replace=False).astype(np.int32)

    def raw(call: int) -> int:
        rng, nodes, edges = np.random.default_rng(call), seeds(call), 0
        for fanout in FANOUT:
            nodes, _ = sampler.draw(nodes, fanout, rng)
            edges += len(nodes)
        return edges

    def labelled(call: int) -> int:
        _, blocks = sampler.sample(seeds(call), np.random.default_rng(call))
        return sum(len(block.sources) for block in blocks)

    def minibatch(call: int) -> int:
        batch = make_minibatch(
            sampler, NegativeSampler(graph, GraphConfig()), seed=0, step=call, batch_size=SEEDS, rank=0, world_size=1
        )
        return sum(len(block.sources) for block in batch.blocks)

    plain = per_second(lambda call: python_sample(graph, seeds(call).tolist()))
    ours = per_second(labelled)
    return [
        Case("sampler", f"raw draws, {name}", "edges/s", per_second(raw)),
        Case("sampler", f"draws, unique and relabel, {name}", "edges/s", ours, plain, "plain Python", ours / plain),
        Case("sampler", f"finished minibatches, {name}", "edges/s", per_second(minibatch)),
    ]


def main() -> None:
    options = arguments(__doc__)
    cases = []
    for users, items, interactions in SIZES[options.size]:
        name = f"{interactions // 1_000_000}M interactions"
        with tempfile.TemporaryDirectory() as folder:
            log = synthetic_log(Path(folder), users, items, interactions)
            target = Path(folder) / "graph"
            target.mkdir()
            started = time.perf_counter()
            graph = build_graph(log, target)
            elapsed = time.perf_counter() - started
            cases.append(Case("build", f"{graph.num_edges:,} edges, {name}", "interactions/s", interactions / elapsed))
            cases.append(Case("build", f"peak memory with mapped files, {name}", "MB", anonymous_peak() / 1e6))
            cases += sampler_cases(graph, name)
    write(cases, options.json)


if __name__ == "__main__":
    main()
