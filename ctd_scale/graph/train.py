"""Train LightGCN on sampled subgraphs that Ray Data streams into Ray Train, then publish exact embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog
from ctd_scale.config import GraphConfig, RunConfig
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import BlockTensors, LightGCN
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.losses import bpr_loss, l2_loss
from ctd_scale.graph.sampler import Minibatch, steps_per_epoch
from ctd_scale.graph.stream import stream_minibatches
from ctd_scale.graph.table import EmbeddingTable, mean_over_workers


def train_graph(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions -> graph (CSR of the training split) and embeddings (users, items)."""
    interactions = run.fetch("interactions")
    log = InteractionLog.load(interactions.path)
    inputs = {interactions.name: interactions.digest}
    facts: dict[str, Any] = {}
    with run.publish("graph", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        graph = build_graph(log, folder)
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
    layer0 = np.load(export / "layer0.npy")
    embeddings = split_nodes(graph, propagate(graph, layer0, config.graph.num_layers, config.graph.propagation_chunk))
    inputs[artifact.name] = artifact.digest
    facts["embed_dim"] = config.graph.embed_dim
    with run.publish("embeddings", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        embeddings.save(folder)


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: BPR on its part of every global minibatch."""
    config, seed = GraphConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    graph = BipartiteGraph.load(Path(arguments["graph"]))
    encoder = LightGCN()
    table = EmbeddingTable(graph.num_nodes, config.embed_dim, config.learning_rate, device)
    total_steps = config.epochs * steps_per_epoch(graph.num_edges, config.batch_size)
    step = 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            table.load_state_dict(state["table"])
            step = state["step"]

    def write(folder: Path) -> None:
        torch.save({"table": table.state_dict(), "step": step}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        np.save(folder / training.EXPORT / "layer0.npy", table.weight.cpu().numpy())

    log = training.StepLog(arguments["logs"], total_steps)
    stream = stream_minibatches(
        config,
        arguments["graph"],
        seed=seed,
        rank=training.rank(),
        world_size=training.world_size(),
        start=step,
        stop=total_steps,
    )
    for minibatch in stream:
        nodes = torch.tensor(minibatch.nodes, dtype=torch.long, device=device)
        rows = table.rows(nodes)
        loss = minibatch_loss(encoder, rows, minibatch, config.l2)
        (gradients,) = torch.autograd.grad(loss, [rows])
        if training.world_size() > 1:
            nodes, gradients = mean_over_workers(nodes, gradients)
        table.update(nodes, gradients)
        step += 1
        log.step(step, {"loss": loss.detach()})
        if step % config.checkpoint_every_steps == 0 and step < total_steps:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write)
    training.report_checkpoint({"step": step}, write)
    log.close()


def minibatch_loss(encoder: LightGCN, rows: torch.Tensor, minibatch: Minibatch, l2: float) -> torch.Tensor:
    """BPR plus L2 of one minibatch. `rows` [nodes, embed_dim] are the layer-0 embeddings of its nodes."""
    device = rows.device
    blocks: list[BlockTensors] = [
        (
            torch.from_numpy(np.stack([block.sources, block.targets]).astype(np.int64)).to(device),
            torch.tensor(block.weights, device=device),
            block.num_targets,
        )
        for block in minibatch.blocks
    ]
    seeds = encoder(rows, blocks, minibatch.num_seeds)
    triples = [minibatch.users, minibatch.positives, minibatch.negatives]
    index = [torch.tensor(part, device=device) for part in triples]
    users, positives, negatives = (seeds[part] for part in index)
    corrections = torch.tensor(minibatch.corrections, device=device)
    ranking = bpr_loss((users * positives).sum(dim=1) + corrections, (users * negatives).sum(dim=1))
    return ranking + l2 * l2_loss(*(rows[part] for part in index))
