"""The graph stage at size: building the graph out of core, sampling from it, training on what was sampled.

Rivals: PyG's NeighborLoader (`--pyg PYTHON`, an interpreter that has torch-sparse; see rivals/neighbor_loader.py), a
plain Python loop over nodes, and, for training, the same loop in one process that samples between its steps.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.report import Case
from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import GraphConfig
from ctd_scale.config_resources import StageResources
from ctd_scale.estimates import peak_memory
from ctd_scale.graph import kernels
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import NO_TIMES, BipartiteGraph
from ctd_scale.graph.export import propagate
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import Minibatch, NeighborSampler, make_minibatch
from ctd_scale.graph.stream import stream_minibatches
from ctd_scale.graph.table import EmbeddingTable
from ctd_scale.graph.train import train_steps

FANOUT = (10, 10)
SEEDS = 1024
STEPS, WARM_UP = 120, 40
# users, items, interactions
SIZES = {
    "1M": (100_000, 50_000, 1_000_000),
    "5M": (500_000, 250_000, 5_000_000),
    "20M": (1_000_000, 1_000_000, 20_000_000),
    "50M": (2_000_000, 1_000_000, 50_000_000),
}
CONFIG = GraphConfig(batch_size=SEEDS, fanout=FANOUT)
RIVAL = Path(__file__).parent / "rivals" / "neighbor_loader.py"


def synthetic_log(folder: Path, users: int, items: int, interactions: int) -> InteractionLog:
    """Histories of very different length over items whose popularity falls as a power law; files, not memory."""
    rng = np.random.default_rng(0)
    activity = rng.dirichlet(np.ones(1000)).repeat(users // 1000) / (users // 1000)
    offsets = np.concatenate([[0], np.cumsum(rng.multinomial(interactions, activity))])
    column = np.lib.format.open_memmap(folder / "items.npy", mode="w+", dtype=np.int32, shape=(interactions,))
    for start in range(0, interactions, 5_000_000):
        part = column[start : start + 5_000_000]
        part[:] = (items * rng.random(len(part)) ** 2).astype(np.int32)
    names = [""] * items
    return InteractionLog(offsets, column, [""] * users, Catalogue(names, names, names))


def per_second(work: Callable[[int], int], seconds: float = 3.0) -> float:
    """Units of work per second, after a few calls to warm up."""
    for call in range(3):
        work(call)
    done, started, call = 0, time.perf_counter(), 3
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


def sampler_cases(graph: BipartiteGraph, folder: Path, name: str, pyg: str | None) -> list[Case]:
    def seeds(call: int) -> np.ndarray:
        return np.random.default_rng(call).choice(graph.num_nodes, SEEDS, replace=False).astype(np.int32)

    def raw(replace: bool) -> Callable[[int], int]:
        sampler = NeighborSampler(graph, FANOUT, replace=replace)

        def work(call: int) -> int:
            nodes, edges = seeds(call), 0
            for hop, fanout in enumerate(FANOUT):
                groups = np.zeros(len(nodes), np.int32)
                lengths = kernels.row_lengths(nodes, groups, graph.offsets, NO_TIMES, NO_TIMES)
                nodes, _ = sampler.draw(nodes, groups, lengths, NO_TIMES, fanout, np.uint64(2 * call + hop))
                edges += len(nodes)
            return edges

        return work

    sampler, negative_sampler = NeighborSampler(graph, FANOUT), NegativeSampler(graph, CONFIG)

    def labelled(call: int) -> int:
        _, blocks = sampler.sample(seeds(call), (call,))
        return sum(len(block.sources) for block in blocks)

    def minibatch(call: int) -> int:
        batch = make_minibatch(sampler, negative_sampler, seed=0, step=call, batch_size=SEEDS, rank=0, world_size=1)
        return sum(len(block.sources) for block in batch.blocks)

    ours = per_second(labelled)
    plain = per_second(lambda call: python_sample(graph, seeds(call).tolist()))
    cases = [
        Case("sampler", f"draws, distinct, {name}", "edges/s", per_second(raw(False))),
        Case("sampler", f"draws, with replacement, {name}", "edges/s", per_second(raw(True))),
        Case("sampler", f"draws, unique and relabel, {name}", "edges/s", ours, plain, "plain Python", ours / plain),
        Case("sampler", f"finished minibatches, {name}", "edges/s", per_second(minibatch)),
    ]
    if pyg is not None:
        done = subprocess.run([pyg, str(RIVAL), str(folder)], capture_output=True, text=True, check=True)
        for kind, theirs in json.loads(done.stdout.splitlines()[-1]).items():
            cases.append(
                Case("sampler", f"unique and relabel, {name}", "edges/s", ours, theirs, f"PyG {kind}", ours / theirs)
            )
    return cases


def timed_steps(minibatches: Iterator[Minibatch], num_nodes: int) -> dict[str, float]:
    """After the steps that fill the pipeline: steps, messages and touched rows per second, and the share of waiting."""
    table = EmbeddingTable(num_nodes, CONFIG.embed_dim, CONFIG.learning_rate, torch.device("cpu"), seed=0)
    messages, rows = 0, 0

    def counted() -> Iterator[Minibatch]:
        nonlocal messages, rows
        for batch in minibatches:
            messages, rows = messages + sum(len(block.sources) for block in batch.blocks), rows + len(batch.nodes)
            yield batch

    clock = training.WaitClock(counted())
    started = 0.0
    for step, _ in enumerate(train_steps(clock, table, CONFIG.l2), start=1):
        if step == WARM_UP:
            started, messages, rows = time.perf_counter(), 0, 0
            clock.share()
    elapsed = time.perf_counter() - started
    steps = STEPS - WARM_UP
    return {"steps": steps / elapsed, "messages": messages / elapsed, "rows": rows / elapsed, "wait": clock.share()}


def bench_loop(arguments: dict[str, Any]) -> None:
    """The steps of the stage's loop inside a Ray Train worker."""
    training.prepare_worker(arguments, 0)
    config = CONFIG.model_copy(update={"streaming": arguments["streaming"]})
    graph = BipartiteGraph.load(Path(arguments["graph"]))
    stream = stream_minibatches(config, arguments["graph"], seed=0, rank=0, world_size=1, start=0, stop=STEPS)
    rates = timed_steps(stream, graph.num_nodes)

    def write(folder: Path) -> None:
        (folder / training.EXPORT).mkdir()
        (folder / training.EXPORT / "rates.json").write_text(json.dumps(rates))

    training.report_checkpoint({"step": STEPS}, write)


def training_cases(graph: BipartiteGraph, folder: Path, name: str) -> list[Case]:
    sampler, negative_sampler = NeighborSampler(graph, FANOUT), NegativeSampler(graph, CONFIG)

    def plain(threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        batches = (
            make_minibatch(sampler, negative_sampler, seed=0, step=step, batch_size=SEEDS, rank=0, world_size=1)
            for step in range(STEPS)
        )
        return timed_steps(batches, graph.num_nodes)

    rival = max((plain(threads) for threads in (1, 2)), key=lambda rates: rates["steps"])
    cases = [
        Case("training", f"ns per sampled edge, one plain process, {name}", "ns", 1e9 / rival["messages"]),
        Case("training", f"ns per touched row, one plain process, {name}", "ns", 1e9 / rival["rows"]),
    ]
    for streaming, said in (("in_process", "a thread samples"), ("ray_data", "Ray Data samples")):
        with tempfile.TemporaryDirectory() as root:
            export = training.run_training(
                bench_loop,
                {"graph": str(folder), "streaming": streaming},
                run=Run(root, "bench"),
                stage="graph",
                key=streaming,
                resources=StageResources(num_workers=1, threads_per_worker=1),
            )
            rates = json.loads((export / "rates.json").read_text())
        said = f"Ray Train, {said}, {name}"
        ratio = rates["steps"] / rival["steps"]
        cases.append(Case("training", said, "steps/s", rates["steps"], rival["steps"], "one plain process", ratio))
        cases.append(Case("training", f"share of waiting for data, {said}", "", rates["wait"]))
        cases.append(Case("training", f"ns per sampled edge, {said}", "ns", 1e9 / rates["messages"]))
        cases.append(Case("training", f"ns per touched row, {said}", "ns", 1e9 / rates["rows"]))
    return cases


def propagation_case(graph: BipartiteGraph, folder: Path, name: str) -> Case:
    layer0 = np.random.default_rng(0).standard_normal((graph.num_nodes, CONFIG.embed_dim), np.float32)
    propagate(BipartiteGraph.from_edges(np.zeros(1, np.int32), np.zeros(1, np.int32), 1, 1), layer0[:2], 1, 1, folder)
    started = time.perf_counter()
    propagate(graph, layer0, 2, CONFIG.propagation_chunk, folder)
    elapsed = time.perf_counter() - started
    return Case("propagation", f"two layers, exact, {name}", "edges/s", 2 * len(graph.neighbors) / elapsed)


def cases_of(name: str, pyg: str | None) -> list[Case]:
    """Everything at one size, in a process of its own, so that its memory is its own."""
    users, items, interactions = SIZES[name]
    with tempfile.TemporaryDirectory() as root:
        log, folder = synthetic_log(Path(root), users, items, interactions), Path(root) / "graph"
        folder.mkdir()
        with peak_memory() as memory:
            started = time.perf_counter()
            graph = build_graph(log, folder)
            elapsed = time.perf_counter() - started
        said = f"{users:,} users, {items:,} items, {graph.num_edges:,} edges"
        return [
            Case("build", f"{name}: {said}", "interactions/s", interactions / elapsed),
            Case("build", f"peak memory, {name}", "MB", memory[0] / 1e6),
            *sampler_cases(graph, folder, name, pyg),
            *training_cases(graph, folder, name),
            propagation_case(graph, Path(root), name),
        ]


def draw(cases: list[Case], path: Path) -> None:
    """Throughput against size."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6, 4))
    for label in ("draws, distinct", "draws, unique and relabel", "finished minibatches"):
        rates = [case.ours for case in cases if case.case.startswith(label)]
        axes.plot(list(SIZES)[: len(rates)], [rate / 1e6 for rate in rates], marker="o", label=label)
    for label in ("one plain process", "Ray Train, a thread samples", "Ray Train, Ray Data samples"):
        cost = [case.ours for case in cases if case.case.startswith(f"ns per sampled edge, {label}")]
        axes.plot(list(SIZES)[: len(cost)], [1e3 / each for each in cost], marker="s", label=f"training: {label}")
    axes.set(xlabel="interactions", ylabel="million sampled edges per second", ylim=(0, None))
    axes.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--pyg", help="an interpreter with torch-sparse, to time PyG's NeighborLoader")
    parser.add_argument("--picture", type=Path, help="where throughput against size is drawn")
    options: argparse.Namespace = parser.parse_args()
    names = list(SIZES)[: 2 if options.size == "small" else 4]
    cases: list[Case] = []
    from benchmarks import bench_graph as importable  # Ray's workers cannot find what is defined in __main__

    for name in names:
        cases += report.apart(importable.cases_of, name, options.pyg)
    report.write(cases, options.json)
    if options.picture is not None:
        draw(cases, options.picture)


if __name__ == "__main__":
    main()
