"""The graph stage at size: building the CSR out of core, sampling from it, and training on what was sampled.

Rival of the sampler: the same draws by a plain Python loop over nodes (`random.sample` and a dict for the labels).
Rival of the streams: the same training loop that samples by itself, one minibatch after the other.
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Case, arguments, write
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import GraphConfig
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import Minibatch, NeighborSampler, make_minibatch
from ctd_scale.graph.stream import stream_minibatches
from ctd_scale.graph.table import EmbeddingTable
from ctd_scale.graph.train import minibatch_loss
from ctd_scale.training import start_ray

FANOUT = (10, 10)
SEEDS = 1024
STEPS, WARM_UP = 150, 40
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


def steps_per_second(batches: Iterator[Minibatch], graph: BipartiteGraph) -> float:
    """Training steps on what a stream gives, after those that fill the pipeline."""
    config, encoder = GraphConfig(), LightGCN()
    table = EmbeddingTable(graph.num_nodes, config.embed_dim, config.learning_rate, torch.device("cpu"))
    started = 0.0
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            started = time.perf_counter()
        nodes = torch.from_numpy(batch.nodes).long()
        rows = table.rows(nodes)
        loss = minibatch_loss(encoder, rows, batch, config.l2)
        table.update(nodes, *torch.autograd.grad(loss, [rows]))
    return (STEPS - WARM_UP) / (time.perf_counter() - started)


def training_cases(graph: BipartiteGraph, folder: Path, name: str) -> list[Case]:
    config = GraphConfig(batch_size=SEEDS, fanout=FANOUT)
    sampler, negative_sampler = NeighborSampler(graph, FANOUT), NegativeSampler(graph, config)
    plain = steps_per_second(
        (
            make_minibatch(sampler, negative_sampler, seed=0, step=step, batch_size=SEEDS, rank=0, world_size=1)
            for step in range(STEPS)
        ),
        graph,
    )
    cases = []
    for streaming, said in (("in_process", "a thread samples"), ("ray_data", "Ray Data samples")):
        chosen = config.model_copy(update={"streaming": streaming})
        stream = stream_minibatches(chosen, str(folder), seed=0, rank=0, world_size=1, start=0, stop=STEPS)
        ours = steps_per_second(stream, graph)
        cases.append(Case("training", f"{said}, {name}", "steps/s", ours, plain, "one plain process", ours / plain))
    return cases


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    start_ray()
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
            cases += training_cases(graph, target, name)
    write(cases, options.json)


if __name__ == "__main__":
    main()
