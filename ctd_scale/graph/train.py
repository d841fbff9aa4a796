"""Train LightGCN on sampled subgraphs that Ray Data streams into Ray Train, then publish exact embeddings."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog
from ctd_scale.config import GraphConfig, RunConfig
from ctd_scale.graph.build import NO_CAP, build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.losses import bpr_loss, l2_loss
from ctd_scale.graph.sampler import Block, Minibatch, steps_per_epoch
from ctd_scale.graph.stream import stream_minibatches
from ctd_scale.graph.table import EmbeddingTable

# What every worker exports: its rows of layer 0.
PART = "layer0-{rank}.npy"
DEGREES = "item_degrees.npy"


def train_graph(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions -> graph (CSR of the training split), embeddings (users, items), and embeddings_at_test: the same
    layer 0 over all that is known when test is asked for."""
    interactions = run.fetch("interactions")
    log = InteractionLog.load(interactions.path)
    inputs = {interactions.name: interactions.digest}
    facts: dict[str, Any] = {}
    with run.publish("graph", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        graph = build_graph(log, folder, timed=config.graph.time_respecting, hub_cap=config.graph.hub_cap or NO_CAP)
        if graph.num_edges < config.resources.graph.num_workers:
            raise ValueError(
                f"the training split has {graph.num_edges} edges for resources.graph.num_workers="
                f"{config.resources.graph.num_workers}; give more data or use fewer workers"
            )
        facts |= {"users": graph.num_users, "items": graph.num_items, "edges": graph.num_edges}

    artifact = run.fetch("graph")
    export = training.run_training(
        train_loop,
        {"config": config.graph.model_dump(), "seed": config.seed, "graph": str(artifact.path)},
        run=run,
        stage="graph",
        key=config_hash,
        resources=config.resources.graph,
    )
    graph = BipartiteGraph.load(artifact.path)
    layer0 = gather_rows(graph.num_nodes, export)
    inputs[artifact.name] = artifact.digest
    facts |= {"embed_dim": config.graph.embed_dim, **training.usage(run, "graph")}
    with run.publish("embeddings", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        split_nodes(graph, _propagated(graph, layer0, config.graph, folder)).save(folder)
    inputs["embeddings"] = run.fetch("embeddings").digest
    with run.publish("embeddings_at_test", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        layer0[graph.degrees == 0] = 0  # never trained: of themselves they say nothing
        save_at_test(log, layer0, config.graph, folder)


def save_at_test(log: InteractionLog, layer0: np.ndarray, config: GraphConfig, folder: Path) -> None:
    """Embeddings, and degrees of items, where the graph holds all that is known when test is asked for.

    A graph learns what an interaction says without training. Without this, all that users chose for validation is
    missing when test is asked for, and the graph is worth less there than validation has shown.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = build_graph(log, Path(scratch), split="test", hub_cap=config.hub_cap or NO_CAP)
        split_nodes(graph, _propagated(graph, layer0, config, folder)).save(folder)
        np.save(folder / DEGREES, graph.degrees[graph.num_users :])


def _propagated(graph: BipartiteGraph, layer0: np.ndarray, config: GraphConfig, scratch: Path) -> np.ndarray:
    return propagate(graph, layer0, config.num_layers, config.propagation_chunk, scratch)


def gather_rows(num_nodes: int, export: Path) -> np.ndarray:
    """The table [nodes, embed_dim] from the parts that its owners wrote, as a file beside them."""
    parts = [np.load(path, mmap_mode="r") for path in sorted(export.glob(PART.format(rank="*")))]
    whole = open_memmap(export / "layer0.npy", mode="w+", dtype=np.float32, shape=(num_nodes, parts[0].shape[1]))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: BPR on its part of every global minibatch."""
    config, seed = GraphConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    graph = BipartiteGraph.load(Path(arguments["graph"]))
    table = new_table(config, graph.num_nodes, device, seed)
    total_steps = config.epochs * steps_per_epoch(graph.num_edges, config.batch_size)
    step = 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            # Not onto the GPUs that wrote them: they are of other workers, or there are none here. Of what is mapped,
            # this worker's rows alone are read, and go to its own device.
            found = sorted(folder.glob("state-*.pt"))
            parts = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in found]
            table.load_state_dicts([part["table"] for part in parts])
            step = parts[0]["step"]

    def write(folder: Path) -> None:
        rank = training.rank()
        torch.save({"table": table.state_dict(), "step": step}, folder / f"state-{rank:05}.pt")
        if step == total_steps:
            (folder / training.EXPORT).mkdir()
            np.save(folder / training.EXPORT / PART.format(rank=f"{rank:05}"), table.weight.float().cpu().numpy())

    log = training.StepLog(arguments["logs"], total_steps)
    stream = training.WaitClock(
        stream_minibatches(
            config,
            arguments["graph"],
            seed=seed,
            rank=training.rank(),
            world_size=training.world_size(),
            start=step,
            stop=total_steps,
        )
    )
    for loss in train_steps(stream, table, config.l2):
        step += 1
        log.step(step, {"loss": loss, "data_wait": stream.share})
        if step % config.checkpoint_every_steps == 0 and step < total_steps:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write, every_rank=True)
    training.report_checkpoint({"step": step}, write, every_rank=True)
    log.close()


def new_table(config: GraphConfig, num_nodes: int, device: torch.device, seed: int) -> EmbeddingTable:
    """This worker's part of the embeddings before training."""
    return EmbeddingTable(
        num_nodes,
        config.embed_dim,
        config.learning_rate,
        device,
        seed=seed,
        dtype=getattr(torch, config.table_dtype),
        rank=training.rank(),
        world_size=training.world_size(),
    )


def train_steps(minibatches: Iterable[Minibatch], table: EmbeddingTable, l2: float) -> Iterator[torch.Tensor]:
    """Update the table by each minibatch; gives its loss (this worker's part, detached)."""
    encoder, device = LightGCN(), table.weight.device
    for minibatch in minibatches:
        route = table.route(torch.tensor(minibatch.nodes, dtype=torch.long, device=device))
        rows = table.rows(route)
        # A leaf of their own: the gradient of a cut is as large as what it was cut from.
        own = rows[: minibatch.num_seeds].detach().requires_grad_()
        loss = minibatch_loss(encoder, rows, own, minibatch, l2)
        gradients, own_gradients = torch.autograd.grad(loss, [rows, own])
        gradients[: minibatch.num_seeds] += own_gradients
        table.update(route, gradients)
        yield loss.detach()


def minibatch_loss(
    encoder: LightGCN, rows: torch.Tensor, own: torch.Tensor, minibatch: Minibatch, l2: float
) -> torch.Tensor:
    """BPR plus L2 of one minibatch. `rows` [nodes, embed_dim] are the layer-0 embeddings of its nodes, `own` the first
    of them, those of the seeds."""
    device = rows.device
    seeds = encoder(rows, own, sparse_blocks(minibatch.nodes, minibatch.blocks, device))
    triples = [minibatch.users, minibatch.positives, minibatch.negatives]
    index = [torch.tensor(part, device=device) for part in triples]
    users, positives, negatives = (seeds[part] for part in index)
    corrections = torch.tensor(minibatch.corrections, device=device)
    ranking = bpr_loss((users * positives).sum(dim=1) + corrections, (users * negatives).sum(dim=1))
    return ranking + l2 * l2_loss(*(own[part] for part in index))


def sparse_blocks(
    nodes: np.ndarray, blocks: tuple[Block, ...], device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """The blocks as sparse CSR matrices [targets, nodes], in order of application."""
    sizes = [len(nodes), *(block.num_targets for block in blocks)]
    with warnings.catch_warnings():  # torch calls CSR beta, once per process
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        return [
            torch.sparse_csr_tensor(
                torch.tensor(block.starts),
                torch.tensor(block.sources),
                torch.tensor(block.weights),
                size=(block.num_targets, size),
                check_invariants=False,
            ).to(device)
            for size, block in zip(sizes, blocks, strict=False)
        ]
