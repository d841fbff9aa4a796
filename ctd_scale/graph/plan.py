"""What the graph stage will need: the real graph is built, a few real steps are made, the rest is arithmetic."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctd_scale import training
from ctd_scale.artifacts import Run, file_digest
from ctd_scale.batches import InteractionLog
from ctd_scale.config import GraphConfig, RunConfig
from ctd_scale.estimates import Estimate, peak_memory
from ctd_scale.graph.build import NO_CAP, build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.export import propagate
from ctd_scale.graph.sampler import steps_per_epoch
from ctd_scale.graph.stream import stream_minibatches
from ctd_scale.graph.train import new_table, train_steps

WARM_UP_STEPS = 10
MEASURED_STEPS = 400
MEASURED_SECONDS = 15.0
FACTS = "facts.json"


def plan_graph(log: InteractionLog, config: RunConfig, run: Run) -> Estimate:
    """Calibrate on this machine, beside the run's folder: one build, 15 s of training, one layer of propagation."""
    settings = config.graph
    run.root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=run.root.parent) as root:
        folder = Path(root) / "graph"
        folder.mkdir()
        started = time.perf_counter()
        # Times cost a sort; where the log to plan with has none, any will do.
        timed_log = log if log.times is not None else _with_times(log) if settings.time_respecting else log
        graph = build_graph(timed_log, folder, timed=settings.time_respecting, hub_cap=settings.hub_cap or NO_CAP)
        building = time.perf_counter() - started
        graph_bytes = sum(file.stat().st_size for file in folder.iterdir())
        started = time.perf_counter()
        file_digest(folder / "neighbors.npy")
        per_byte = (time.perf_counter() - started) / (folder / "neighbors.npy").stat().st_size

        called = time.time()
        export = training.run_training(
            calibration_loop,
            {"config": settings.model_dump(), "seed": config.seed, "graph": str(folder)},
            run=Run(root, "calibration"),
            stage="graph",
            key="calibration",
            resources=config.resources.graph,
        )
        facts: dict[str, float] = json.loads((export / FACTS).read_text())
        ending = time.time() - facts["ended"]
        started = time.perf_counter()
        layer0 = np.zeros((graph.num_nodes, settings.embed_dim), np.float32)
        propagate(graph, layer0, 1, settings.propagation_chunk, Path(root))
        layer = time.perf_counter() - started
    steps = settings.epochs * steps_per_epoch(graph.num_edges, settings.batch_size)
    checkpoints = -(-steps // settings.checkpoint_every_steps)
    table_bytes = graph.num_nodes * settings.embed_dim * 4
    parts = {
        # Again for test, with the validation edges. What is published is hashed then, and when it is fetched.
        "build": 2 * building + 2 * per_byte * graph_bytes,
        "start": facts["started"] - called + max(0.0, facts["prepared"] - facts["warm_up"] * facts["step"]) + ending,
        "steps": steps * facts["step"],
        "checkpoints": checkpoints * facts["checkpoint"],
        "propagation": 2 * (settings.num_layers * layer + 2 * per_byte * table_bytes),
    }
    said = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
    return Estimate(
        "train_graph",
        sum(parts.values()),
        facts["memory"] * config.resources.graph.num_workers,
        # Checkpoints stay until all is published. Meanwhile layer 0 lies there thrice (in the last checkpoint, copied
        # from it, and gathered); what is published for training is there, and what is for test beside its graph and
        # the two layers that it is made from.
        2 * graph_bytes + min(2, checkpoints) * facts["checkpoint_bytes"] + 7.0 * table_bytes,
        f"{graph.num_edges:,} edges, {steps:,} steps of {1000 * facts['step']:.0f} ms; {said}",
    )


def calibration_loop(arguments: dict[str, Any]) -> None:
    """The stage's own loop, for a while: how long it takes to start, to step, to write a checkpoint."""
    started = time.time()
    config, seed = GraphConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    graph = BipartiteGraph.load(Path(arguments["graph"]))
    rank, world_size = training.rank(), training.world_size()
    stop = min(WARM_UP_STEPS + MEASURED_STEPS, config.epochs * steps_per_epoch(graph.num_edges, config.batch_size))
    with peak_memory() as memory:
        table = new_table(config, graph.num_nodes, device, seed)
        stream = stream_minibatches(
            config, arguments["graph"], seed=seed, rank=rank, world_size=world_size, start=0, stop=stop
        )
        prepared = since = time.time()
        steps = 0
        warm_up = min(WARM_UP_STEPS, stop // 2)
        for number, _ in enumerate(train_steps(stream, table, config.l2), start=1):
            if number <= warm_up:
                prepared = since = time.time()
                continue
            steps, since = steps + 1, time.time()
            # Every worker must make the same steps, so only a worker that is alone goes by the clock.
            if world_size == 1 and since - prepared > MEASURED_SECONDS:
                break

        def write(folder: Path) -> None:
            torch.save({"table": table.state_dict(), "step": 0}, folder / f"state-{rank:05}.pt")

        begun = time.time()
        training.report_checkpoint({"step": 0}, write, every_rank=True)
        reported = time.time()
    facts = {
        "started": started,
        "prepared": prepared - started,
        "warm_up": warm_up,
        "step": (since - prepared) / max(1, steps),
        "checkpoint": reported - begun,
        "checkpoint_bytes": 3.0 * graph.num_nodes * config.embed_dim * table.weight.element_size(),
        "memory": memory[0],
    }

    def write_facts(folder: Path) -> None:
        (folder / training.EXPORT).mkdir()
        (folder / training.EXPORT / FACTS).write_text(json.dumps({**facts, "ended": time.time()}))

    training.report_checkpoint({"step": 0}, write_facts)


def _with_times(log: InteractionLog) -> InteractionLog:
    times = np.random.default_rng(0).integers(0, 10**15, len(log.items))
    return InteractionLog(log.offsets, log.items, log.user_ids, log.catalogue, times)
