"""What sampling costs in quality: our graph stage against LightGCN on the whole graph, same size, epochs and loss.

The rival propagates over the whole graph at every step and updates every embedding with Adam, as the paper does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Case, parser, show, write
from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.baselines.lightgcn import lightgcn_scorer
from ctd_scale.batches import SPLITS, InteractionLog, NodeArrays, Split
from ctd_scale.config import GraphConfig, RunConfig, load_config
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.losses import bpr_loss, l2_loss
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.permutation import permuted
from ctd_scale.graph.sampler import Minibatch, NeighborSampler, make_minibatch, steps_per_epoch
from ctd_scale.graph.table import EmbeddingTable
from ctd_scale.graph.train import train_steps
from ctd_scale.interactions.prepare import prepare_interactions
from ctd_scale.ranking import rank_targets

# Configurations of `jobs/configs` and how many seeds; as many of them, and of epochs, as a laptop can wait for.
DATASETS = {"ml100k": 6, "lastfm": 6, "beauty": 3}
EPOCHS = 40
CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CHUNK_USERS = 512


def ndcg(log: InteractionLog, embeddings: NodeArrays, split: Split) -> float:
    """NDCG@10 over the whole catalogue, seen items masked."""
    ranks = rank_targets(log, lightgcn_scorer(embeddings), split, mask_seen=True, chunk_users=CHUNK_USERS)
    return ranks.summary(log.num_items)["ndcg@10"]


def sampled(graph: BipartiteGraph, config: GraphConfig, seed: int, scratch: Path) -> NodeArrays:
    """Ours: sampled neighbourhoods, lazy Adam, exact propagation at the end."""
    table = EmbeddingTable(graph.num_nodes, config.embed_dim, config.learning_rate, torch.device("cpu"), seed=seed)
    sampler, negative_sampler = NeighborSampler(graph, config.fanout), NegativeSampler(graph, config)

    def batches() -> Iterator[Minibatch]:
        for step in range(config.epochs * steps_per_epoch(graph.num_edges, config.batch_size)):
            yield make_minibatch(
                sampler, negative_sampler, seed=seed, step=step, batch_size=config.batch_size, rank=0, world_size=1
            )

    for _ in train_steps(batches(), table, config.l2):
        pass
    layers = propagate(graph, table.weight.numpy(), config.num_layers, config.propagation_chunk, scratch)
    return split_nodes(graph, layers)


def whole_graph(graph: BipartiteGraph, config: GraphConfig, seed: int) -> NodeArrays:
    """The rival, from the paper: dense Adam, the whole graph at every step."""
    generator = torch.Generator().manual_seed(seed)
    table = (0.1 * torch.randn(graph.num_nodes, config.embed_dim, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=config.learning_rate)
    root = np.sqrt(np.maximum(graph.degrees, 1)).astype(np.float32)
    rows = np.repeat(np.arange(graph.num_nodes), np.diff(graph.offsets))
    adjacency = torch.sparse_csr_tensor(
        torch.tensor(graph.offsets),
        torch.tensor(graph.neighbors).long(),
        torch.tensor(1 / (root[rows] * root[graph.neighbors])),
        size=(graph.num_nodes, graph.num_nodes),
        check_invariants=True,
    )

    def encode() -> torch.Tensor:
        layer, total = table, table
        for _ in range(config.num_layers):
            layer = adjacency @ layer
            total = total + layer
        return total / (config.num_layers + 1)

    negative_sampler = NegativeSampler(graph, config)
    per_epoch = steps_per_epoch(graph.num_edges, config.batch_size)
    for step in range(config.epochs * per_epoch):
        epoch, position = divmod(step, per_epoch)
        places = np.arange(position * config.batch_size, min((position + 1) * config.batch_size, graph.num_edges))
        users, positives = graph.edge(permuted(places, graph.num_edges, (seed, 0, epoch)))
        negatives, _ = negative_sampler.draw(users, positives, np.random.default_rng((seed, 1, step)))
        index = [torch.from_numpy(part) for part in (users, positives, negatives)]
        encoded = encode()
        user, positive, negative = (encoded[part] for part in index)
        loss = bpr_loss((user * positive).sum(dim=1), (user * negative).sum(dim=1))
        loss = loss + config.l2 * l2_loss(*(table[part] for part in index))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return split_nodes(graph, encode().detach().numpy())


def cases_of(dataset: str, config: RunConfig, epochs: int, seeds: Sequence[int]) -> list[Case]:
    with tempfile.TemporaryDirectory() as root:
        run = Run(root, "quality")
        prepare_interactions(config.interactions, run, "key")
        log, folder = InteractionLog.load(run.fetch("interactions").path), Path(root) / "graph"
        folder.mkdir()
        graph = build_graph(log, folder)
        config = config.model_copy(update={"graph": config.graph.model_copy(update={"epochs": epochs})})
        found: dict[Split, list[tuple[float, float]]] = {split: [] for split in SPLITS}
        seconds = np.zeros(2)
        for seed in seeds:
            started = time.perf_counter()
            ours = sampled(graph, config.graph, seed, Path(root))
            between = time.perf_counter()
            rival = whole_graph(graph, config.graph, seed)
            seconds += between - started, time.perf_counter() - between
            for split in SPLITS:
                found[split].append((ndcg(log, ours, split), ndcg(log, rival, split)))
    about = f"{dataset}, {epochs} epochs, mean of {len(seeds)} seeds"
    cases = []
    for split in SPLITS:
        pair, spread = np.mean(found[split], axis=0), np.std(found[split], axis=0)
        name = f"NDCG@10, {split}, {about}, spread {spread[0]:.4f} and {spread[1]:.4f}"
        cases.append(Case("quality", name, "", pair[0], pair[1], "whole graph", pair[0] / pair[1]))
    seconds /= len(seeds)
    cases.append(
        Case("quality", f"training time, {about}", "s", seconds[0], seconds[1], "whole graph", seconds[1] / seconds[0])
    )
    return cases


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data-dir", default="", help="folder of the ready-made sets (env CTD_DATA_DIR)")
    made.add_argument("--only", choices=DATASETS, help="one of the sets")
    options = made.parse_args()
    torch.set_num_threads(1)
    training.start_ray()
    cases: list[Case] = []
    full = options.size == "full"
    for dataset in [options.only] if options.only else DATASETS if full else ["ml100k"]:
        config = load_config(CONFIGS / f"{dataset}.toml", [f'interactions.data_dir="{options.data_dir}"'])
        measured = cases_of(dataset, config, EPOCHS if full else 5, range(DATASETS[dataset] if full else 1))
        show(measured)
        cases += measured
    write(cases, options.json)


if __name__ == "__main__":
    main()
